"""The policy update: exact accumulation, no lost remainder, first-pass ratio 1, weights that move."""

import contextlib
import dataclasses
import math
import types

import pytest
import torch
from small import SHAPE, build_unet, one_step, policy_of, random_prompts

from b2diffurl import update
from b2diffurl.errors import UserError
from b2diffurl.experience import Experience
from b2diffurl.families import load_family
from b2diffurl.families import lora as lora_module
from b2diffurl.families.sd import StableDiffusion
from b2diffurl.guidance import take
from b2diffurl.losses import ddpo_is
from b2diffurl.noise import stream_seed
from b2diffurl.plan import Plan
from b2diffurl.rollout import assemble, sample
from b2diffurl.run.command import parse
from b2diffurl.update import (
    Learner,
    accumulate,
    loss_scale,
    pretrained_means,
    split_updates,
    train_updates,
    transitions_of,
)

LENGTH = 4
START = 20 - LENGTH


def settings(**train):
    """What the update reads of config.train."""
    defaults = {
        "algorithm": "ddpo_is", "log_prob": "mean", "kl_weight": 0.0, "dpo_beta": 10.0, "target_kl": 0.0,
        "dpo_reference": "sampling", "dpo_clip_range": 0.0,
        "num_epochs": 2, "trajectories_per_update": 2, "batch_size": 4, "clip_range": 0.1, "max_grad_norm": 1.0,
        "accumulate_over": "epoch",
    }  # fmt: skip
    return types.SimpleNamespace(**{**defaults, **train})


def seeded():
    return torch.Generator().manual_seed(0)


def learner_of(scheduler, dtype=torch.float32, rank=4):
    """A Learner with a fresh LoRA."""
    unet = build_unet().to(dtype)
    lora = lora_module.add(unet, StableDiffusion.lora_targets, rank, seed=3)
    return Learner(policy_of(unet, scheduler), torch.optim.AdamW(lora.values(), lr=1e-3))


def sampled(policy, n=5, plan=None):
    """The Experience of n images with advantages from -2 to 2: each by itself, or branches of a plan's groups."""
    plan = plan or Plan(20, START, 1, ((START, 1),))
    groups, table = n // plan.images, plan.transitions
    seeds = [[stream_seed(0, 0, g, name) for g in range(groups) for name in names] for names in plan.streams()]
    cond = random_prompts(groups)
    states, log_prob = sample(policy, plan, cond, seeds, 3, lambda first, latents: None)
    rollout = assemble(plan, states, log_prob, torch.arange(groups))
    number = torch.arange(len(rollout.step)) // LENGTH
    assert len(table.step) == plan.images * LENGTH
    return Experience(rollout, cond, torch.arange(len(number)), torch.linspace(-2, 2, n)[number], number)


def preferences(experience):
    """The same images as winners, the first half of them, and losers."""
    half = len(experience.row) // 2
    return Experience(
        experience.rollout, experience.cond, experience.row[:half], experience.advantage[:half],
        experience.sample[:half], experience.row[half:],
    )  # fmt: skip


@contextlib.contextmanager
def rows_seen(unet):
    """[rows of the UNet's batches], filled meanwhile."""
    seen = []
    hook = unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    yield seen
    hook.remove()


def gradient(learner):
    return torch.cat([parameter.grad.flatten() for parameter in learner.parameters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_pass_ratio_is_one(scheduler, dtype):
    learner = learner_of(scheduler, dtype)
    experience = sampled(learner.policy)
    statistics, asked = accumulate(learner, experience, torch.arange(5), settings(batch_size=3), seeded())
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert (statistics["ratio"] - 1).abs().max() < tolerance
    assert len(statistics["ratio"]) == asked == 5 * LENGTH
    assert sorted(statistics["step"].tolist()) == sorted([*range(START, 20)] * 5)


def away_from_the_sampler(learner):
    """Ratios differ from 1, and B gets gradients through A."""
    with torch.no_grad():
        for parameter in learner.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=seeded()) * 0.05)


def one_by_one(policy, experience, rows, loss_of):
    """Gradient of the mean over the experience's rows of loss_of(row, its float64 density), each computed alone."""
    total = 0.0
    for row in rows:
        total = total + loss_of(row, density_of(policy, experience, experience.row[row])) / len(rows)
    wanted = torch.autograd.grad(total, [p for p in policy.denoiser.parameters() if p.requires_grad])
    return torch.cat([tensor.flatten() for tensor in wanted])


def density_of(policy, experience, transition):
    """torch.distributions' density of one of the rollout's transitions, (1, ...)."""
    rollout = experience.rollout
    x, given = (
        rollout.states[rollout.before[transition]][None],
        take(experience.cond, rollout.prompt[transition].view(1)),
    )
    mean, sigma = one_step(policy, x, int(rollout.step[transition]), given)
    return torch.distributions.Normal(mean.double(), sigma.double().expand_as(mean))


def following(experience, transition):
    return experience.rollout.states[experience.rollout.after[transition]][None].double()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_gradient_is_that_of_the_one_by_one_loop(scheduler, batch_size):
    learner = learner_of(scheduler)
    experience = sampled(learner.policy)
    away_from_the_sampler(learner)

    def loss_of(row, density):
        log_prob = density.log_prob(following(experience, experience.row[row])).mean()[None]
        old = experience.rollout.log_prob[experience.row[row]][None]
        return ddpo_is(log_prob, old, experience.advantage[[row]], 0.1)[0].sum()

    rows = [row for row in range(5 * LENGTH) if experience.sample[row] in (0, 2, 3)]
    wanted = one_by_one(learner.policy, experience, rows, loss_of)
    accumulate(learner, experience, torch.tensor([0, 2, 3]), settings(batch_size=batch_size), seeded())
    torch.testing.assert_close(gradient(learner), wanted.float(), rtol=1e-3, atol=1e-6)


BRANCHES = Plan(20, START, 1, ((START, 3),))


@pytest.mark.parametrize("preference", [False, True])
@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_transitions_that_leave_one_state_share_its_prediction(scheduler, batch_size, preference):
    """Two groups of three branches, whose first transitions leave one state each; the gradient stays the same."""
    learner = learner_of(scheduler)
    policy, experience = learner.policy, sampled(learner.policy, 6, BRANCHES)
    train = settings(algorithm="dpo" if preference else "ddpo_is", batch_size=batch_size)
    if preference:  # the first branch of each group won against its second
        rows = torch.cat([experience.row[experience.sample == n] for n in (0, 3)])
        number = torch.arange(2).repeat_interleave(LENGTH)
        experience = Experience(experience.rollout, experience.cond, rows, number.float(), number, rows + LENGTH)
    away_from_the_sampler(learner)

    def loss_of(row, density):
        transition = experience.row[row]
        ratio = density.log_prob(following(experience, transition)).mean() - experience.rollout.log_prob[transition]
        if preference:
            rival = experience.rival[row]
            other = density_of(policy, experience, rival).log_prob(following(experience, rival)).mean()
            return -torch.log(torch.sigmoid(10 * (ratio - other + experience.rollout.log_prob[rival])))
        ratio, advantage = ratio.exp(), experience.advantage[row].double()
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.1))

    wanted = one_by_one(policy, experience, range(len(experience.row)), loss_of)
    with rows_seen(policy.denoiser) as seen:
        statistics, asked = accumulate(learner, experience, torch.arange(experience.samples), train, seeded())
    states = 2 * (1 + 2 * (LENGTH - 1)) if preference else 2 * (1 + 3 * (LENGTH - 1))
    assert sum(seen) == 2 * asked == 2 * states
    assert len(statistics["loss"]) == len(experience.row)
    assert (gradient(learner) - wanted).norm() < 1e-3 * wanted.norm()


def test_the_base_models_means_are_asked_for_once_for_every_state(scheduler):
    learner = learner_of(scheduler)
    experience = sampled(learner.policy, 6, BRANCHES)
    away_from_the_sampler(learner)
    with rows_seen(learner.policy.denoiser) as seen:
        means, asked = pretrained_means(learner.policy, experience, batch_size=3)
    assert sum(seen) == 2 * asked == 2 * 2 * (1 + 3 * (LENGTH - 1))
    with learner.policy.pretrained(), torch.no_grad():
        for row in range(len(experience.row)):
            alone = density_of(learner.policy, experience, experience.row[row]).mean[0]
            torch.testing.assert_close(means[row], alone.float(), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_memory_not_gradients(scheduler):
    gradients, kept = [], []
    for checkpointing in (False, True):
        learner = learner_of(scheduler)
        experience = sampled(learner.policy)
        for parameter in learner.parameters:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        if checkpointing:
            learner.policy.denoiser.enable_gradient_checkpointing()
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            accumulate(learner, experience, torch.arange(5), settings(batch_size=8), seeded())
        gradients.append(gradient(learner))
        kept.append(sum(sizes.values()))
    torch.testing.assert_close(*gradients)
    assert kept[1] < kept[0] / 2


def test_lora_computes_in_the_precision_of_its_base_with_float32_weights(scheduler):
    learner, seen = learner_of(scheduler, torch.bfloat16), set()
    for module in learner.policy.denoiser.modules():
        if isinstance(module, lora_module.Projection):
            module.register_forward_hook(lambda module, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    mean, _ = learner.policy.transition(torch.randn(1, *SHAPE), torch.tensor([9]), random_prompts(1))
    mean.square().sum().backward()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert {p.grad.dtype for p in learner.parameters} == {torch.float32}


def test_float16_gradients_survive_small_losses(scheduler):
    """Advantages of 1e-3 stand in for SD's 64 times larger latents and 30 times more transitions per update."""
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        learner = learner_of(scheduler)
        for parameter in learner.parameters:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        experience = sampled(learner.policy)
        experience.advantage *= 1e-3
        learner.policy.denoiser.to(dtype)
        for parameter in learner.parameters:
            parameter.data = parameter.data.float()
        scale = loss_scale(learner.policy, experience, 5 * LENGTH, settings())
        assert (scale == 1) == (dtype == torch.float32)
        accumulate(learner, experience, torch.arange(5), settings(batch_size=8), seeded(), scale)
        gradients[dtype] = gradient(learner)
    half, full = gradients[torch.float16], gradients[torch.float32]
    assert torch.cosine_similarity(half, full, dim=0) > 0.99
    assert half.norm() == pytest.approx(full.norm().item(), rel=0.02)


def test_an_overflowing_update_is_repeated_at_a_smaller_scale(scheduler, monkeypatch):
    learner = learner_of(scheduler)
    experience = sampled(learner.policy)
    tried, honest = [], update.accumulate

    def overflowing(*arguments):
        found = honest(*arguments)
        tried.append(arguments[-1])
        if arguments[-1] > 100:
            learner.parameters[0].grad.fill_(float("inf"))
        return found

    monkeypatch.setattr(update, "loss_scale", lambda *a: 1600.0)
    monkeypatch.setattr(update, "accumulate", overflowing)
    updates_of(learner, experience, settings(num_epochs=1, trajectories_per_update=8))
    assert tried == [1600.0, 100.0]
    assert learner.headroom == 1 / 16
    assert all(p.isfinite().all() for p in learner.parameters)


@pytest.mark.parametrize(("n", "size"), [(1, 128), (52, 32), (128, 128), (130, 128), (7, 1), (0, 4)])
def test_every_sample_is_in_exactly_one_update(n, size):
    order = torch.randperm(n)
    updates = split_updates(order, size)
    assert torch.equal(torch.cat(updates) if updates else order, order)
    sizes = [len(u) for u in updates]
    assert len(updates) == -(-n // size)
    assert not sizes or (max(sizes) <= size and max(sizes) - min(sizes) <= 1)


def test_epochs_move_the_weights_towards_the_good_and_leave_no_gradient(scheduler):
    learner = learner_of(scheduler)
    experience, updates = sampled(learner.policy), []
    before = [p.detach().clone() for p in learner.parameters]
    train_updates(
        learner, experience, settings(), seeded(),
        lambda statistics, norm: updates.append((len(statistics["loss"]), norm)),
    )  # fmt: skip
    assert sum(count for count, _ in updates) == 2 * 5 * LENGTH  # two epochs, nothing dropped or carried over
    assert len(updates) == 2 * 3
    named = lora_module.parameters(learner.policy.denoiser)
    assert all(not torch.equal(p, b) for (name, p), b in zip(named.items(), before, strict=True) if "lora_B" in name)
    assert all(p.grad is None for p in learner.parameters)
    with torch.no_grad():
        new = [
            density_of(learner.policy, experience, row).log_prob(following(experience, row)).mean()
            for row in experience.row
        ]
    gain = ((torch.stack(new) - experience.rollout.log_prob) * experience.advantage).sum()
    assert gain > 0


def test_non_finite_gradient_stops_before_the_weights(scheduler):
    learner = learner_of(scheduler)
    experience = sampled(learner.policy)
    experience.advantage[0] = float("nan")
    before = [p.detach().clone() for p in learner.parameters]
    with pytest.raises(FloatingPointError):
        updates_of(learner, experience, settings(num_epochs=1, trajectories_per_update=8))
    assert all(torch.equal(p, b) for p, b in zip(learner.parameters, before, strict=True))


def test_fresh_lora(scheduler):
    unet = learner_of(scheduler, torch.bfloat16).policy.denoiser
    lora = lora_module.parameters(unet)
    attentions = [name for name, module in unet.named_modules() if type(module).__name__ == "Attention"]
    assert len(lora) == 2 * 4 * len(attentions)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in lora.values())
    assert all(not p.any() for name, p in lora.items() if "lora_B" in name)
    down = torch.cat([p.flatten() for name, p in lora.items() if "lora_A" in name])
    assert down.std().item() == pytest.approx(1 / 4, rel=0.05)
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == set(lora)


def test_a_lora_of_chosen_layers():
    unet = build_unet()
    chosen = {name.partition(".lora_")[0] for name in lora_module.add(unet, ("attn2.to_k", "to_v"), rank=2, seed=0)}
    wanted = {name for name, _ in unet.named_modules() if name.endswith(("attn2.to_k", ".to_v"))}
    assert chosen == wanted
    assert any("attn1.to_v" in name for name in chosen)
    assert not any("attn1.to_k" in name for name in chosen)
    with pytest.raises(UserError, match=r"lora_targets: UNet2DConditionModel has no linear layer 'o_k'"):
        lora_module.add(build_unet(), ("to_q", "o_k"), rank=2, seed=0)
    with pytest.raises(UserError, match="has no linear layer 'attn2'"):
        lora_module.add(build_unet(), ("attn2",), rank=2, seed=0)
    flag = "--config.train.lora_targets=('to_z',)"
    with pytest.raises(UserError, match="has no linear layer 'to_z'"):  # before anything is loaded
        load_family(parse(["x", "--config", "config/stage_process.py:shapes", flag])[0])


@pytest.mark.parametrize("algorithm", ["ddpo_is", "ddpo_sf", "dpok", "dpo", "dpo to the base"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_algorithms_gradient_is_that_of_its_definition(scheduler, algorithm, reduction):
    """Against autograd through torch.distributions' float64 densities, one by one, on the real UNet."""
    learner = learner_of(scheduler)
    policy, experience = learner.policy, sampled(learner.policy, n=4)
    train = settings(algorithm=algorithm[:7].split()[0], log_prob=reduction, kl_weight=0.3, dpo_beta=0.7, batch_size=3)
    clip = 0.03 if reduction == "sum" else 1.2e-4  # of some ratios to the base model, and not of others
    if algorithm == "dpok":
        experience.pretrained_mean, _ = pretrained_means(policy, experience, 3)
    if train.algorithm == "dpo":
        experience = preferences(experience)
    if algorithm == "dpo to the base":
        train.dpo_reference, train.dpo_clip_range = "base", clip
        losers = dataclasses.replace(experience, row=experience.rival, rival=None)
        for own, name in ((experience, "pretrained_mean"), (losers, "rival_pretrained_mean")):
            setattr(experience, name, pretrained_means(policy, own, 3)[0])
    away_from_the_sampler(learner)
    reduce = torch.Tensor.sum if reduction == "sum" else torch.Tensor.mean
    dimensions = experience.dimensions if reduction == "sum" else 1

    def log_ratio(transition, density):
        old = experience.rollout.log_prob[transition].double() * dimensions
        return reduce(density.log_prob(following(experience, transition))) - old

    def loss_of(row, density):
        transition, advantage = experience.row[row], experience.advantage[row].double()
        if algorithm == "ddpo_sf":
            return -advantage * reduce(density.log_prob(following(experience, transition)))
        if algorithm == "dpo":
            rival = experience.rival[row]
            margin = log_ratio(transition, density) - log_ratio(rival, density_of(policy, experience, rival))
            return -torch.log(torch.sigmoid(0.7 * margin))
        if algorithm == "dpo to the base":
            rival = experience.rival[row]
            pairs = (transition, density, experience.pretrained_mean[row]), (
                rival, density_of(policy, experience, rival), experience.rival_pretrained_mean[row],
            )  # fmt: skip
            ratios = []
            for at, own, mean in pairs:
                base = torch.distributions.Normal(mean.double()[None], own.scale)
                value = following(experience, at)
                ratios.append((reduce(own.log_prob(value)) - reduce(base.log_prob(value))).exp())
            beyond.extend(float(abs(ratio - 1) > clip) for ratio in ratios)
            winner, loser = (ratio.clamp(1 - clip, 1 + clip).log() for ratio in ratios)
            return -torch.log(torch.sigmoid(0.7 * (winner - loser)))
        ratio = log_ratio(transition, density).exp()
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.1))
        if algorithm == "dpok":
            base = torch.distributions.Normal(experience.pretrained_mean[row].double()[None], density.scale)
            loss = loss + 0.3 * reduce(torch.distributions.kl_divergence(density, base))
        return loss

    beyond = []
    wanted = one_by_one(policy, experience, range(len(experience.row)), loss_of)
    statistics, _ = accumulate(learner, experience, torch.arange(experience.samples), train, seeded())
    assert wanted.norm() > 0
    assert (gradient(learner) - wanted).norm() < 1e-3 * wanted.norm()
    if beyond:
        assert statistics["base_clipped"].mean().item() == pytest.approx(sum(beyond) / len(beyond))
        assert 0 < sum(beyond) < len(beyond), beyond


def test_pretrained_means_are_the_base_models_and_leave_the_lora_trainable(scheduler):
    learner = learner_of(scheduler)
    experience = sampled(learner.policy, n=3)
    base, _ = pretrained_means(learner.policy, experience, 4)
    away_from_the_sampler(learner)
    torch.testing.assert_close(pretrained_means(learner.policy, experience, 4)[0], base)
    assert all(p.requires_grad for p in learner.parameters)
    with torch.no_grad():
        mean, _, _ = transitions_of(learner.policy, experience, experience.row[9:10])
    assert (mean - base[9:10]).abs().max() > 1e-4


def updates_of(learner, experience, train):
    return updates_and_states(learner, experience, train)[0]


def updates_and_states(learner, experience, train):
    """[{name: mean over an update's transitions}], and how many states were asked about."""
    updates = []
    asked = train_updates(
        learner, experience, train, seeded(),
        lambda statistics, norm: updates.append({name: v.mean().item() for name, v in statistics.items()}),
    )  # fmt: skip
    return updates, asked


def test_score_function_makes_one_update(scheduler):
    learner = learner_of(scheduler)
    updates = updates_of(learner, sampled(learner.policy), settings(algorithm="ddpo_sf"))
    assert len(updates) == 1
    assert updates[0]["ratio"] == pytest.approx(1, abs=1e-5)


def test_target_kl_ends_the_stage(scheduler):
    learner = learner_of(scheduler)
    experience = sampled(learner.policy)
    free = updates_of(learner, experience, settings(num_epochs=3))
    bound = (free[3]["approx_kl"] + max(u["approx_kl"] for u in free[:3])) / 2
    assert free[3]["approx_kl"] > bound  # or the bound would stop an earlier update
    stopped, asked = updates_and_states(learner_of(scheduler), experience, settings(num_epochs=3, target_kl=bound))
    assert [u["loss"] for u in stopped] == [u["loss"] for u in free[:3]]  # the fourth is seen, not made
    assert asked == (2 + 2 + 1 + 2) * LENGTH  # and counted
    experience.rollout.log_prob += 2e-6  # as rounding would
    assert len(updates_of(learner_of(scheduler), experience, settings(num_epochs=3, target_kl=1e-14))) == 1


def test_dpo_learns_to_prefer_the_winners(scheduler):
    learner = learner_of(scheduler)
    experience = preferences(sampled(learner.policy, n=6))
    updates, asked = updates_and_states(learner, experience, settings(algorithm="dpo", num_epochs=6, dpo_beta=100.0))
    assert asked == 6 * 6 * LENGTH
    assert updates[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert sum(u["loss"] for u in updates[-3:]) / 3 < math.log(2) - 0.02  # of the last epoch; one update has one pair
    assert len(updates) == 6 * 3  # three winners with their losers, one such pair an update of two trajectories


def test_a_baseline_is_subtracted_from_the_advantages(scheduler):
    gradients = []
    for advantages, baselines in (([0.5, -1.0], [0.2, -0.3]), ([0.3, -0.7], None)):
        learner = learner_of(scheduler)
        experience = sampled(learner.policy, n=2)
        experience.pretrained_mean, _ = pretrained_means(learner.policy, experience, 4)
        experience.advantage = torch.tensor(advantages)[experience.sample]
        experience.baseline = torch.tensor(baselines)[experience.sample] if baselines else None
        accumulate(learner, experience, torch.arange(2), settings(algorithm="dpok"), seeded())
        gradients.append(gradient(learner))
    torch.testing.assert_close(*gradients)


def test_dpok_holds_the_policy_near_the_base(scheduler):
    kl = {}
    for weight in (0.0, 100.0):
        learner = learner_of(scheduler)
        experience = sampled(learner.policy)
        experience.pretrained_mean, _ = pretrained_means(learner.policy, experience, 4)
        updates = updates_of(learner, experience, settings(algorithm="dpok", kl_weight=weight, num_epochs=4))
        assert updates[0]["kl_pretrained"] == pytest.approx(0, abs=1e-9)
        kl[weight] = updates[-1]["kl_pretrained"]
    assert kl[100.0] < kl[0.0] / 3


def test_every_epoch_is_shuffled_by_itself():
    for unit in ("epoch", "stage"):
        train = settings(trajectories_per_update=10, accumulate_over=unit)
        first, second = torch.cat(update.cut_updates(train, 50, seeded())).view(2, 50)
        for order in (first, second):
            assert order.sort().values.tolist() == list(range(50))
            assert not torch.equal(order, torch.arange(50))
        assert not torch.equal(first, second)


def test_base_means_are_asked_of_winners_and_of_losers(scheduler):
    learner = learner_of(scheduler)
    experience = preferences(sampled(learner.policy, n=4))
    alone = [dataclasses.replace(experience, row=own, rival=None) for own in (experience.row, experience.rival)]
    wanted = [pretrained_means(learner.policy, own, 3)[0] for own in alone]
    train = settings(algorithm="dpo", dpo_reference="base", batch_size=3)
    asked = update.ask_pretrained(learner.policy, experience, train)
    assert asked == 4 * LENGTH
    assert torch.equal(experience.pretrained_mean, wanted[0])
    assert torch.equal(experience.rival_pretrained_mean, wanted[1])
