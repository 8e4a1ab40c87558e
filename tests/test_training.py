"""The policy update: exact accumulation, no lost remainder, first-pass ratio 1, weights that move."""

import math
import types

import pytest
import torch
from small import build_unet

from b2diffurl import update
from b2diffurl.ddim import ddim_step_with_logprob, transition
from b2diffurl.families import lora as lora_module
from b2diffurl.guidance import guided_noise
from b2diffurl.losses import ddpo_is
from b2diffurl.noise import stream_noise, stream_seed
from b2diffurl.rollout import Sampler
from b2diffurl.update import (
    Pairs,
    accumulate,
    loss_scale,
    pretrained_means,
    split_updates,
    step_distribution,
    train_updates,
)

LENGTH, SHAPE = 4, (4, 8, 8)
STEPS = range(20 - LENGTH, 20)


def settings(**train):
    """What the update reads of a configuration."""
    defaults = {
        "algorithm": "ddpo_is", "log_prob": "mean", "kl_weight": 0.0, "dpo_beta": 10.0, "target_kl": 0.0,
        "num_epochs": 2, "trajectories_per_update": 2, "batch_size": 4, "clip_range": 0.1, "max_grad_norm": 1.0,
        "accumulate_over": "epoch",
    }  # fmt: skip
    return types.SimpleNamespace(
        mixed_precision="no",
        allow_tf32=False,
        train=types.SimpleNamespace(**{**defaults, **train}),
        sample=types.SimpleNamespace(guidance_scale=5.0, eta=1.0),
    )


def seeded():
    return torch.Generator().manual_seed(0)


def lora_unet(rank=4, dtype=torch.float32):
    unet = build_unet().to(dtype)
    config = types.SimpleNamespace(seed=3, train=types.SimpleNamespace(lora_rank=rank))
    lora = lora_module.add(unet, config)
    return unet, lora


def sampled_pairs(unet, scheduler, n=5):
    torch.manual_seed(1)
    embeds, negative = torch.randn(n, 16, 64), torch.randn(1, 16, 64)
    sampler = Sampler(unet, scheduler, negative, 5.0, 1.0, batch_size=3)
    noise = torch.stack([stream_noise(stream_seed(0, 0, g, 0), LENGTH + 1, SHAPE) for g in range(n)])
    start = sampler.initial(noise[:, 0])
    parts = [sampler.denoise(start[i : i + 3], embeds[i : i + 3], noise[i : i + 3, 1:], STEPS) for i in range(0, n, 3)]
    path, log_probs = (torch.cat(own) for own in zip(*parts, strict=True))
    latents = torch.cat([start[:, None], path], dim=1)
    return Pairs(latents, log_probs, scheduler.timesteps[STEPS], torch.linspace(-2, 2, n), embeds, negative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_pass_ratio_is_one(scheduler, dtype):
    unet, _ = lora_unet(dtype=dtype)
    pairs = sampled_pairs(unet, scheduler)
    statistics = accumulate(unet, scheduler, pairs, torch.arange(5), settings(batch_size=3), seeded())
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert (statistics["ratio"] - 1).abs().max() < tolerance
    assert len(statistics["ratio"]) == 5 * LENGTH


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_gradient_is_that_of_the_one_by_one_loop(scheduler, batch_size):
    unet, lora = lora_unet()
    pairs = sampled_pairs(unet, scheduler)
    with torch.no_grad():  # leave the sampling policy, so that ratios differ from 1 and B gets gradients through A
        for parameter in lora.values():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    total = 0.0
    for n in (0, 2, 3):
        for k in range(LENGTH):
            t = pairs.timesteps[k : k + 1]
            x, after = pairs.latents[n : n + 1, k], pairs.latents[n : n + 1, k + 1]
            predicted = guided_noise(unet, x, t, pairs.embeds[n : n + 1], pairs.negative_embeds, 5.0)
            _, log_prob = ddim_step_with_logprob(scheduler, predicted, t, x, 1.0, prev_sample=after)
            loss, _ = ddpo_is(log_prob, pairs.log_probs[n : n + 1, k], pairs.advantages[n : n + 1], 0.1)
            total = total + loss.sum() / (3 * LENGTH)
    wanted = torch.autograd.grad(total, list(lora.values()))
    accumulate(unet, scheduler, pairs, torch.tensor([0, 2, 3]), settings(batch_size=batch_size), seeded())
    for parameter, gradient in zip(lora.values(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_memory_not_gradients(scheduler):
    gradients, kept = [], []
    for checkpointing in (False, True):
        unet, lora = lora_unet()
        pairs = sampled_pairs(unet, scheduler)
        for parameter in lora.values():
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        if checkpointing:
            unet.enable_gradient_checkpointing()
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            accumulate(unet, scheduler, pairs, torch.arange(5), settings(batch_size=8), seeded())
        gradients.append([p.grad for p in lora.values()])
        kept.append(sum(sizes.values()))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert kept[1] < kept[0] / 2


def test_lora_computes_in_the_precision_of_its_base_with_float32_weights():
    unet, lora = lora_unet(dtype=torch.bfloat16)
    seen = set()
    for module in unet.modules():
        if isinstance(module, lora_module.Projection):
            module.register_forward_hook(lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    x, embeds = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 64)
    guided_noise(unet, x, torch.tensor([501]), embeds, embeds, 5.0).square().sum().backward()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert {p.grad.dtype for p in lora.values()} == {torch.float32}


def test_float16_gradients_survive_small_losses(scheduler):
    """Advantages of 1e-3 stand in for SD's 64 times larger latents and 30 times more pairs an update."""
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        unet, lora = lora_unet()
        for parameter in lora.values():
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        pairs = sampled_pairs(unet, scheduler)
        pairs.advantages *= 1e-3
        unet.to(dtype)
        for parameter in lora.values():
            parameter.data = parameter.data.float()
        scale = loss_scale(unet, pairs, 5 * LENGTH, settings())
        assert (scale == 1) == (dtype == torch.float32)
        accumulate(unet, scheduler, pairs, torch.arange(5), settings(batch_size=8), seeded(), scale)
        gradients[dtype] = torch.cat([parameter.grad.flatten() for parameter in lora.values()])
    half, full = gradients[torch.float16], gradients[torch.float32]
    assert torch.cosine_similarity(half, full, dim=0) > 0.99
    assert half.norm() == pytest.approx(full.norm().item(), rel=0.02)


def test_an_overflowing_update_is_repeated_at_a_smaller_scale(scheduler, monkeypatch):
    unet, lora = lora_unet()
    pairs = sampled_pairs(unet, scheduler)
    tried, honest = [], update.accumulate

    def overflowing(*arguments):
        statistics = honest(*arguments)
        tried.append(arguments[-1])
        if arguments[-1] > 100:
            next(iter(lora.values())).grad.fill_(float("inf"))
        return statistics

    monkeypatch.setattr(update, "loss_scale", lambda *a: 1600.0)
    monkeypatch.setattr(update, "accumulate", overflowing)
    updates_of(unet, scheduler, lora, pairs, settings(num_epochs=1, trajectories_per_update=8))
    assert tried == [1600.0, 100.0]
    assert all(p.isfinite().all() for p in lora.values())


@pytest.mark.parametrize(("n", "size"), [(1, 128), (52, 32), (128, 128), (130, 128), (7, 1), (0, 4)])
def test_every_sample_is_in_exactly_one_update(n, size):
    order = torch.randperm(n)
    updates = split_updates(order, size)
    assert torch.equal(torch.cat(updates) if updates else order, order)
    sizes = [len(u) for u in updates]
    assert len(updates) == -(-n // size)
    assert not sizes or (max(sizes) <= size and max(sizes) - min(sizes) <= 1)


def test_epochs_move_the_weights_towards_the_good_and_leave_no_gradient(scheduler):
    unet, lora = lora_unet()
    pairs = sampled_pairs(unet, scheduler)
    before = {name: p.detach().clone() for name, p in lora.items()}
    optimizer = torch.optim.AdamW(lora.values(), lr=1e-3)
    updates = []
    train_updates(
        unet, scheduler, optimizer, list(lora.values()), pairs, settings(), seeded(),
        lambda statistics, norm: updates.append((len(statistics["loss"]), norm)),
    )  # fmt: skip
    assert sum(count for count, _ in updates) == 2 * 5 * LENGTH  # two epochs, nothing dropped or carried over
    assert len(updates) == 2 * 3
    assert all(not torch.equal(p, before[name]) for name, p in lora.items() if "lora_B" in name)
    assert all(p.grad is None for p in lora.values())
    rows = torch.arange(5).repeat_interleave(LENGTH)
    steps = torch.arange(LENGTH).repeat(5)
    with torch.no_grad():
        predicted = guided_noise(
            unet, pairs.latents[rows, steps], pairs.timesteps[steps], pairs.embeds[rows],
            pairs.negative_embeds.expand(len(rows), -1, -1), 5.0,
        )  # fmt: skip
    _, log_prob = ddim_step_with_logprob(
        scheduler, predicted, pairs.timesteps[steps], pairs.latents[rows, steps], 1.0, pairs.latents[rows, steps + 1]
    )
    gain = ((log_prob - pairs.log_probs[rows, steps]) * pairs.advantages[rows]).sum()
    assert gain > 0


def test_non_finite_gradient_stops_before_the_weights(scheduler):
    unet, lora = lora_unet()
    pairs = sampled_pairs(unet, scheduler)
    pairs.advantages[0] = float("nan")
    before = {name: p.detach().clone() for name, p in lora.items()}
    with pytest.raises(FloatingPointError):
        updates_of(unet, scheduler, lora, pairs, settings(num_epochs=1, trajectories_per_update=8))
    assert all(torch.equal(p, before[name]) for name, p in lora.items())


def test_fresh_lora():
    unet, lora = lora_unet(rank=4, dtype=torch.bfloat16)
    attentions = [name for name, module in unet.named_modules() if type(module).__name__ == "Attention"]
    assert len(lora) == 2 * 4 * len(attentions)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in lora.values())
    assert all(not p.any() for name, p in lora.items() if "lora_B" in name)
    down = torch.cat([p.flatten() for name, p in lora.items() if "lora_A" in name])
    assert down.std().item() == pytest.approx(1 / 4, rel=0.05)
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == set(lora)


def one_by_one(unet, scheduler, pairs, loss_of, rows):
    """Gradient of the mean over rows and steps of loss_of(row, step, mean, σ, log-prob), each computed alone."""
    total, count = 0.0, len(rows) * LENGTH
    for n in rows:
        for k in range(LENGTH):
            t, x = pairs.timesteps[k : k + 1], pairs.latents[n : n + 1, k]
            predicted = guided_noise(unet, x, t, pairs.embeds[n : n + 1], pairs.negative_embeds, 5.0)
            mean, sigma = transition(scheduler, predicted, t, x, 1.0)
            density = torch.distributions.Normal(mean.double(), sigma.double().expand_as(mean))
            total = total + loss_of(n, k, density, pairs.latents[n : n + 1, k + 1].double()) / count
    return torch.autograd.grad(total, [p for p in unet.parameters() if p.requires_grad])


def away_from_the_sampler(lora):
    with torch.no_grad():
        for parameter in lora.values():
            parameter.add_(torch.randn(parameter.shape, generator=seeded()) * 0.05)


@pytest.mark.parametrize("algorithm", ["ddpo_is", "ddpo_sf", "dpok", "dpo"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_algorithms_gradient_is_that_of_its_definition(scheduler, algorithm, reduction):
    """Against autograd through torch.distributions' float64 densities, pair by pair, on the real UNet."""
    unet, lora = lora_unet()
    pairs = sampled_pairs(unet, scheduler, n=4)
    config = settings(algorithm=algorithm, log_prob=reduction, kl_weight=0.3, dpo_beta=0.7, batch_size=3)
    if algorithm == "dpok":
        pairs.pretrained_means = pretrained_means(unet, scheduler, pairs, config)
    away_from_the_sampler(lora)
    reduce = torch.Tensor.sum if reduction == "sum" else torch.Tensor.mean
    dimensions = pairs.latents[0, 0].numel() if reduction == "sum" else 1

    def log_ratio(n, k, density, following):
        return reduce(density.log_prob(following)) - pairs.log_probs[n, k].double() * dimensions

    def loss_of(n, k, density, following):
        advantage = pairs.advantages[n].double()
        if algorithm == "ddpo_sf":
            return -advantage * reduce(density.log_prob(following))
        ratio = log_ratio(n, k, density, following).exp()
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.1))
        if algorithm == "dpok":
            base = torch.distributions.Normal(pairs.pretrained_means[n, k].double()[None], density.scale)
            loss = loss + 0.3 * reduce(torch.distributions.kl_divergence(density, base))
        return loss

    if algorithm == "dpo":
        wanted, count = 0.0, 2 * LENGTH
        parameters = [p for p in unet.parameters() if p.requires_grad]
        for n in (0, 1):
            for k in range(LENGTH):
                ratios = []
                for row in (n, n + 2):
                    t, x = pairs.timesteps[k : k + 1], pairs.latents[row : row + 1, k]
                    predicted = guided_noise(unet, x, t, pairs.embeds[row : row + 1], pairs.negative_embeds, 5.0)
                    mean, sigma = transition(scheduler, predicted, t, x, 1.0)
                    density = torch.distributions.Normal(mean.double(), sigma.double().expand_as(mean))
                    ratios.append(log_ratio(row, k, density, pairs.latents[row : row + 1, k + 1].double()))
                wanted = wanted - torch.log(torch.sigmoid(0.7 * (ratios[0] - ratios[1]))) / count
        wanted, chosen = torch.autograd.grad(wanted, parameters), torch.arange(2)
    else:
        wanted, chosen = one_by_one(unet, scheduler, pairs, loss_of, range(4)), torch.arange(4)
    accumulate(unet, scheduler, pairs, chosen, config, seeded())
    got = torch.cat([p.grad.flatten() for p in lora.values()])
    wanted = torch.cat([gradient.flatten() for gradient in wanted])
    assert wanted.norm() > 0
    assert (got - wanted).norm() < 1e-3 * wanted.norm()


def test_pretrained_means_are_the_base_models_and_leave_the_lora_trainable(scheduler):
    unet, lora = lora_unet()
    pairs = sampled_pairs(unet, scheduler, n=3)
    base = pretrained_means(unet, scheduler, pairs, settings())
    away_from_the_sampler(lora)
    torch.testing.assert_close(pretrained_means(unet, scheduler, pairs, settings()), base)
    assert all(p.requires_grad for p in lora.values())
    rows, steps = torch.tensor([2]), torch.tensor([1])
    with torch.no_grad():
        mean, _ = step_distribution(unet, scheduler, pairs, rows, steps, settings())
    assert (mean - base[rows, steps]).abs().max() > 1e-4


def updates_of(unet, scheduler, lora, pairs, config):
    return updates_and_transitions(unet, scheduler, lora, pairs, config)[0]


def updates_and_transitions(unet, scheduler, lora, pairs, config):
    updates = []
    optimizer = torch.optim.AdamW(lora.values(), lr=1e-3)
    seen, _ = train_updates(
        unet, scheduler, optimizer, list(lora.values()), pairs, config, seeded(),
        lambda statistics, norm: updates.append({name: v.mean().item() for name, v in statistics.items()}),
    )  # fmt: skip
    return updates, seen


def test_score_function_makes_one_update(scheduler):
    unet, lora = lora_unet()
    pairs = sampled_pairs(unet, scheduler)
    updates = updates_of(unet, scheduler, lora, pairs, settings(algorithm="ddpo_sf"))
    assert len(updates) == 1
    assert updates[0]["ratio"] == pytest.approx(1, abs=1e-5)


def test_target_kl_ends_the_stage(scheduler):
    unet, lora = lora_unet()
    pairs = sampled_pairs(unet, scheduler)
    free = updates_of(unet, scheduler, lora, pairs, settings(num_epochs=3))
    bound = (free[3]["approx_kl"] + max(u["approx_kl"] for u in free[:3])) / 2
    assert free[3]["approx_kl"] > bound  # or the bound would stop an earlier update
    unet, lora = lora_unet()
    stopped, seen = updates_and_transitions(unet, scheduler, lora, pairs, settings(num_epochs=3, target_kl=bound))
    assert [u["loss"] for u in stopped] == [u["loss"] for u in free[:3]]  # the fourth is seen, not made
    assert seen == (2 + 2 + 1 + 2) * LENGTH  # and counted
    unet, lora = lora_unet()
    pairs.log_probs += 2e-6  # as rounding would
    assert len(updates_of(unet, scheduler, lora, pairs, settings(num_epochs=3, target_kl=1e-14))) == 1


def test_dpo_learns_to_prefer_the_winners(scheduler):
    unet, lora = lora_unet()
    pairs = sampled_pairs(unet, scheduler, n=6)
    config = settings(algorithm="dpo", num_epochs=6, dpo_beta=100.0)
    updates, seen = updates_and_transitions(unet, scheduler, lora, pairs, config)
    assert seen == 6 * 6 * LENGTH
    assert updates[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert updates[-1]["preferred"] > 0.7
    assert len(updates) == 6 * 3  # three winners with their losers, one such pair an update of two trajectories


def test_a_baseline_is_subtracted_from_the_advantages(scheduler):
    gradients = []
    for advantages, baselines in (([0.5, -1.0], [[0.2] * LENGTH, [-0.3] * LENGTH]), ([0.3, -0.7], None)):
        unet, lora = lora_unet()
        pairs = sampled_pairs(unet, scheduler, n=2)
        config = settings(algorithm="dpok")
        pairs.pretrained_means = pretrained_means(unet, scheduler, pairs, config)
        pairs.advantages = torch.tensor(advantages)
        pairs.baselines = torch.tensor(baselines) if baselines else None
        accumulate(unet, scheduler, pairs, torch.arange(2), config, seeded())
        gradients.append(torch.cat([p.grad.flatten() for p in lora.values()]))
    torch.testing.assert_close(*gradients)


def test_dpok_holds_the_policy_near_the_base(scheduler):
    kl = {}
    for weight in (0.0, 100.0):
        unet, lora = lora_unet()
        pairs = sampled_pairs(unet, scheduler)
        config = settings(algorithm="dpok", kl_weight=weight, num_epochs=4)
        pairs.pretrained_means = pretrained_means(unet, scheduler, pairs, config)
        updates = updates_of(unet, scheduler, lora, pairs, config)
        assert updates[0]["kl_pretrained"] == pytest.approx(0, abs=1e-9)
        kl[weight] = updates[-1]["kl_pretrained"]
    assert kl[100.0] < kl[0.0] / 3
