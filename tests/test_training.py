"""The policy update: exact accumulation, no lost remainder, first-pass ratio 1, weights that move."""

import types

import pytest
import torch

from b2diffurl import models, training
from b2diffurl.branch_sampling import Sampler
from b2diffurl.ddim import ddim_step_with_logprob
from b2diffurl.guidance import guided_noise
from b2diffurl.losses import ddpo_is
from b2diffurl.noise import stream_seed
from b2diffurl.shapes import diffusion
from b2diffurl.training import Pairs, accumulate, loss_scale, split_updates, train_epochs

LENGTH = 4


def lora_unet(rank=4, dtype=torch.float32):
    torch.manual_seed(0)
    unet = diffusion.build_unet(64).to(dtype).eval().requires_grad_(False)
    config = types.SimpleNamespace(seed=3, train=types.SimpleNamespace(lora_rank=rank))
    lora = models.add_lora(unet, config)
    return unet, lora


def sampled_pairs(unet, scheduler, n=5):
    torch.manual_seed(1)
    embeds, negative = torch.randn(n, 16, 64), torch.randn(1, 16, 64)
    sampler = Sampler(unet, scheduler, negative, 5.0, 1.0, batch_size=3)
    seeds = [stream_seed(0, 0, g, 0) for g in range(n)]
    start = 20 - LENGTH
    made = sampler.sample(embeds, seeds, seeds, (start, 20), lambda first, x: None)
    latents = torch.cat([made.start_latents[:, None], made.latents], dim=1)
    return Pairs(latents, made.log_probs, made.timesteps, torch.linspace(-2, 2, n), embeds, negative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_pass_ratio_is_one(scheduler, dtype):
    unet, _ = lora_unet(dtype=dtype)
    pairs = sampled_pairs(unet, scheduler)
    statistics = accumulate(unet, scheduler, pairs, torch.arange(5), 3, 5.0, 1.0, 0.1, torch.Generator().manual_seed(0))
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
    accumulate(
        unet, scheduler, pairs, torch.tensor([0, 2, 3]), batch_size, 5.0, 1.0, 0.1, torch.Generator().manual_seed(0)
    )
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
            accumulate(unet, scheduler, pairs, torch.arange(5), 8, 5.0, 1.0, 0.1, torch.Generator().manual_seed(0))
        gradients.append([p.grad for p in lora.values()])
        kept.append(sum(sizes.values()))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert kept[1] < kept[0] / 2


def test_lora_computes_in_the_precision_of_its_base_with_float32_weights():
    unet, lora = lora_unet(dtype=torch.bfloat16)
    seen = set()
    for module in unet.modules():
        if isinstance(module, models.LoraProjection):
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
        scale = loss_scale(unet, pairs, 5 * LENGTH)
        assert (scale == 1) == (dtype == torch.float32)
        accumulate(unet, scheduler, pairs, torch.arange(5), 8, 5.0, 1.0, 0.1, torch.Generator().manual_seed(0), scale)
        gradients[dtype] = torch.cat([parameter.grad.flatten() for parameter in lora.values()])
    half, full = gradients[torch.float16], gradients[torch.float32]
    assert torch.cosine_similarity(half, full, dim=0) > 0.99
    assert half.norm() == pytest.approx(full.norm().item(), rel=0.02)


def test_an_overflowing_update_is_repeated_at_a_smaller_scale(scheduler, monkeypatch):
    unet, lora = lora_unet()
    pairs = sampled_pairs(unet, scheduler)
    tried, honest = [], training.accumulate

    def overflowing(*arguments):
        statistics = honest(*arguments)
        tried.append(arguments[-1])
        if arguments[-1] > 100:
            next(iter(lora.values())).grad.fill_(float("inf"))
        return statistics

    monkeypatch.setattr(training, "loss_scale", lambda *a: 1600.0)
    monkeypatch.setattr(training, "accumulate", overflowing)
    optimizer = torch.optim.AdamW(lora.values(), lr=1e-3)
    train_epochs(
        unet, scheduler, optimizer, list(lora.values()), pairs, settings(1, 8), torch.Generator(), lambda *a: None
    )
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


def settings(epochs=2, per_update=2):
    return types.SimpleNamespace(
        train=types.SimpleNamespace(
            num_epochs=epochs, trajectories_per_update=per_update, batch_size=4, clip_range=0.1, max_grad_norm=1.0
        ),
        sample=types.SimpleNamespace(guidance_scale=5.0, eta=1.0),
    )


def test_epochs_move_the_weights_towards_the_good_and_leave_no_gradient(scheduler):
    unet, lora = lora_unet()
    pairs = sampled_pairs(unet, scheduler)
    before = {name: p.detach().clone() for name, p in lora.items()}
    optimizer = torch.optim.AdamW(lora.values(), lr=1e-3)
    updates = []
    train_epochs(
        unet, scheduler, optimizer, list(lora.values()), pairs, settings(), torch.Generator().manual_seed(0),
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
    optimizer = torch.optim.AdamW(lora.values(), lr=1e-3)
    with pytest.raises(FloatingPointError):
        train_epochs(
            unet, scheduler, optimizer, list(lora.values()), pairs, settings(1, 8), torch.Generator(), lambda *a: None
        )
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
