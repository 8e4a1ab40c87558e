"""Every setting reaches what it sets: each test here fails if one line passes a wrong number on."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import SHAPE, build_unet, policy_of, random_prompts

from b2diffurl import gaussian, update
from b2diffurl.ddim import DDIM
from b2diffurl.experience import Experience
from b2diffurl.families import lora
from b2diffurl.families.sd import StableDiffusion
from b2diffurl.guidance import take
from b2diffurl.models import Models
from b2diffurl.noise import draw_prompts, stream_noise, stream_seed
from b2diffurl.rollout import Rollout, denoise
from b2diffurl.run import metrics, storage
from b2diffurl.run.command import parse
from b2diffurl.run.folder import checkpoint_of
from b2diffurl.stages import sample, train
from b2diffurl.stages.loop import run_stage
from b2diffurl.stages.sample import image_rows
from b2diffurl.step_weights import step_weights

TINY = (  # a stage that does everything once; the best of each group is trained on
    "exp_name=t", "sample.groups=2", "sample.branches=2", "sample.num_steps=2", "schedule.left=1", "schedule.right=1",
    "select.pos_threshold=-9", "select.neg_threshold=-9",
)  # fmt: skip


def configure(*settings):
    flags = [f"--config.{setting}" for setting in settings]
    return parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0]


def test_adamw_gets_its_settings():
    config = configure(
        "train.learning_rate=0.003", "train.adam_beta1=0.7", "train.adam_beta2=0.95", "train.adam_epsilon=1e-5",
        "train.adam_weight_decay=0.02",
    )  # fmt: skip
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = update.build_optimizer(config.train, {"weight": weight})
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 0.003, "betas": (0.7, 0.95), "eps": 1e-5, "weight_decay": 0.02,
    }  # fmt: skip
    assert isinstance(optimizer, torch.optim.AdamW)


def test_a_linear_rate_falls_from_stage_to_stage_towards_0(elsewhere):
    """As AdamW's state says that it was; in the third and last stage a third is left."""
    settings = (*TINY, f"save_path={elsewhere}", "train.lr_schedule=linear", "train.learning_rate=0.006")
    rates, build = [], update.build_optimizer

    def built(*arguments):
        optimizer = build(*arguments)
        rates.append(optimizer.param_groups[0]["lr"])
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_optimizer", built)
        for stage in range(3):
            run_stage(configure(*settings, f"stage={stage}", "schedule.stage_count=3"))
    assert rates == pytest.approx([0.006, 0.004, 0.002])


def test_advantages_are_clamped_and_weighted_by_their_sign_on_their_way_to_the_update(elsewhere):
    settings = (*TINY, f"save_path={elsewhere}", "select.credit=all", "train.adv_clip=0.4", "train.positive_weight=0.5",
                "train.negative_weight=2", "sample.groups=4")  # fmt: skip
    run_stage(configure(*settings))
    rows = json.loads((elsewhere / "t/stage0/scores.json").read_text())["scores"]
    stored = load_file(elsewhere / "t/stage0/selected.safetensors")
    clamped = [max(-0.4, min(0.4, row["normalised"])) for row in rows]
    assert max(clamped) == 0.4
    assert stored["advantage"].tolist() == pytest.approx([0.5 * r if r > 0 else 2 * r for r in clamped])


def test_an_update_is_no_longer_than_the_bound_on_the_gradient(scheduler):
    """With plain gradient descent at rate 1 the weights move by the clipped gradient itself."""
    for bound, wanted in ((1e-3, 1e-3), (1e9, None)):
        unet = build_unet()
        config = configure("train.log_prob=mean", f"train.max_grad_norm={bound}", "train.num_epochs=1")
        parameters = [*lora.add(unet, StableDiffusion.lora_targets, rank=4, seed=3).values()]
        learner = update.Learner(policy_of(unet, scheduler), torch.optim.SGD(parameters, lr=1.0))
        before = torch.cat([p.detach().flatten() for p in parameters])
        sample, step = torch.arange(2).repeat_interleave(2), torch.tensor([18, 19, 18, 19])
        at = 3 * sample + step - 18
        rollout = Rollout(torch.randn(6, *SHAPE), at, at + 1, step, torch.zeros(4), torch.zeros(4, dtype=torch.long))
        experience = Experience(rollout, random_prompts(1), torch.arange(4), torch.ones(4), sample)
        with torch.no_grad():
            given = take(experience.cond, rollout.prompt)
            density = learner.policy.transition(rollout.states[at], step, given)
            rollout.log_prob = gaussian.log_prob(rollout.states[at + 1], *density)
        norms, generator = [], torch.Generator().manual_seed(0)
        update.train_updates(
            learner, experience, config.train, generator, lambda statistics, norm, norms=norms: norms.append(norm)
        )
        moved = (torch.cat([p.detach().flatten() for p in parameters]) - before).norm().item()
        assert moved == pytest.approx(wanted or norms[0], rel=1e-3)
        assert norms[0] > 2e-3  # before clipping


def test_the_loss_scales_headroom_goes_on_from_stage_to_stage(elsewhere, monkeypatch):
    """An overflow that was found once is not met again at the first update of every later stage."""
    given, updates = [], update.train_updates

    def overflowing(learner, *others):
        given.append(learner.headroom)
        asked = updates(learner, *others)
        learner.headroom /= 16
        return asked

    monkeypatch.setattr(train, "train_updates", overflowing)
    for stage in (0, 1):
        run_stage(configure(*TINY, f"save_path={elsewhere}", f"stage={stage}", "train.learning_rate=1e-5"))
    assert given == [1, 1 / 16]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
def test_latents_are_carried_in_their_precision_and_log_probabilities_are_of_the_rounded_ones(precision):
    config = configure(f"mixed_precision={precision}", "train.log_prob=mean")
    loaded = Models(config)
    policy, cond = loaded.policy(), loaded.family.embed(["a red circle", "a blue ring"])
    noise = torch.randn(2, 3, *loaded.family.latent_shape, generator=torch.Generator().manual_seed(0))
    states, log_probs = denoise(policy, policy.initial(noise[:, 0]), cond, noise[:, 1:], range(18, 20))
    assert {latents.dtype for latents in states} == {torch.float16 if precision == "fp16" else torch.float32}
    assert {log_prob.dtype for log_prob in log_probs} == {torch.float32}
    for i, step in enumerate((18, 19)):
        with torch.no_grad():
            mean, sigma = policy.transition(states[i], torch.full((2,), step), cond)
        stored = gaussian.log_prob(states[i + 1], mean, sigma)
        torch.testing.assert_close(log_probs[i], stored, rtol=0, atol=1e-5)  # the same call: the same bits nearly
        if precision == "fp16":  # or this test could not tell the two apart
            exact = gaussian.log_prob(mean + sigma * noise[:, i + 1], mean, sigma)
            assert (exact - stored).abs().max() > 1e-4


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_policy_is_the_librarys_step_on_the_guided_prediction(scheduler, guidance):
    """Guidance, conditioning, η and the step's index, each where it belongs: against the two halves, and diffusers."""
    policy, cond = policy_of(build_unet(), scheduler), random_prompts(3)
    policy.guidance, policy.kernel = guidance, DDIM(scheduler, 0.6)
    x, step = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 11, 19])
    with torch.no_grad():
        mean, sigma = policy.transition(x, step, cond)
        for i, t in enumerate(scheduler.timesteps[step]):
            embeds = [policy.negative["encoder_hidden_states"], cond["encoder_hidden_states"][i : i + 1]]
            halves = [policy.denoiser(x[i : i + 1], t, encoder_hidden_states=own).sample for own in embeds]
            predicted = halves[0] + guidance * (halves[1] - halves[0])
            none = torch.zeros_like(predicted)
            wanted = scheduler.step(predicted, t, x[i : i + 1], eta=0.6, variance_noise=none).prev_sample
            one = scheduler.step(predicted, t, x[i : i + 1], eta=0.6, variance_noise=none + 1).prev_sample
            torch.testing.assert_close(mean[i], wanted[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(sigma[i].expand_as(wanted[0]), (one - wanted)[0], rtol=1e-3, atol=1e-3)


def test_the_authors_accumulation_and_the_even_one():
    """Kept -> the authors' updates and ours, as counted on their code: 100 -> 1, 2; 130 -> 2, 4; 300 -> 4, 6."""
    config = configure("train.trajectories_per_update=128", "train.num_epochs=2")
    for kept, authors, even in ((40, 0, 2), (64, 1, 2), (100, 1, 2), (130, 2, 4), (300, 4, 6)):
        counts = update.count_updates(config.train, kept)
        assert counts == {"stage": authors, "epoch": even}
        for unit in counts:
            config.train.accumulate_over = unit
            updates = update.cut_updates(config.train, kept, torch.Generator().manual_seed(0))
            assert len(updates) == counts[unit]
            seen = torch.bincount(torch.cat([*updates, torch.arange(0)]), minlength=kept)
            if unit == "stage":
                assert {len(chosen) for chosen in updates} <= {128}
                assert seen.max() <= 2
            else:
                assert seen.tolist() == [2] * kept
    assert configure().train.accumulate_over == "epoch"
    assert parse(["x", "--config", "config/stage_process.py:sdv1.4"])[0].train.accumulate_over == "stage"


def test_a_stage_whose_samples_fill_no_update_is_a_valid_outcome(elsewhere, capsys):
    settings = ("train.accumulate_over=stage", "train.trajectories_per_update=5")
    run_stage(configure(*TINY, f"save_path={elsewhere}", *settings))
    assert "2 selected trajectories in 2 epochs do not fill an update of" in capsys.readouterr().out
    stored = load_file(checkpoint_of(elsewhere / "t/stage0") / "pytorch_lora_weights.safetensors")
    assert not any(tensor.any() for name, tensor in stored.items() if "lora_B" in name or "lora.up" in name)
    (line,) = [line for line in metrics.read(elsewhere / "t/metrics.jsonl") if line["step"] == "train"]
    assert (line["train/updates"], line["train/updates_by_stage"], line["train/updates_by_epoch"]) == (0, 0, 2)


def test_prompts_and_noise_are_of_the_stage():
    assert draw_prompts(300, 0, 45, 20) != draw_prompts(300, 1, 45, 20) != draw_prompts(301, 1, 45, 20)
    first, second = (image_rows(configure(f"stage={stage}")) for stage in (0, 1))
    assert [row["prompt"] for row in first] != [row["prompt"] for row in second]
    assert not {row["seed"] for row in first} & {row["seed"] for row in second}


def test_the_kernel_and_the_lora_get_their_settings():
    assert Models(configure("sample.eta=0.4")).kernel.eta == 0.4
    flags = ("--config.sample.sampler=dance_sde", "--config.sample.noise_level=0.3")
    kernel = Models(parse(["x", "--config", "config/stage_process.py:shapes_flow", *flags])[0]).kernel
    assert (kernel.sampler, kernel.noise_level) == ("dance_sde", 0.3)
    given = "train.lora_rank=2", "train.lora_targets=('attn2.to_k',)"
    made = [Models(configure(*given, f"seed={seed}")).trainable()[1] for seed in (7, 8)]
    assert made[0]
    assert all("attn2.to_k.lora_" in name for name in made[0])
    downs = [[own for name, own in lora.items() if "lora_A" in name] for lora in made]
    assert {len(own) for own in downs[0]} == {2}
    assert not torch.equal(downs[0][0], downs[1][0])


def test_a_stages_update_gets_its_weights_seed_history_and_noise(elsewhere, monkeypatch):
    seen, updates = [], train.train_updates

    def spy(learner, experience, settings, generator, on_update):
        seen.append((experience, learner.policy, generator.initial_seed()))
        return updates(learner, experience, settings, generator, on_update)

    monkeypatch.setattr(train, "train_updates", spy)
    waited = []
    stage = elsewhere / "t/stage0"
    monkeypatch.setattr(sample.processes, "barrier", lambda: waited.append((stage / "samples.json").exists()))
    more = (
        "train.step_weights=inverse_gain", "select.history=0", "sample.num_steps=3", "schedule.right=3",
        "schedule.left=2", "seed=9",
    )  # fmt: skip
    config = configure(*TINY, f"save_path={elsewhere}", *more)
    loaded = Models(config)
    sample.main(config, loaded=loaded)
    assert waited[-1]  # a process that leaves the step finds its file
    run_stage(config, loaded=loaded)
    ((experience, policy, seed),) = seen
    assert seed == stream_seed(9, 0, "all", "training")
    wanted = step_weights(policy.kernel.gain, experience.rollout.step[experience.row], "inverse_gain")
    assert torch.equal(experience.weight, wanted)
    stored = json.loads((stage / "scores.json").read_text())
    assert stored["history"] == []
    line = next(line for line in metrics.read(elsewhere / "t/metrics.jsonl") if line["step"] == "select")
    rewards = np.array([row["reward"] for row in stored["scores"]]).reshape(2, 2)
    assert line["reward/std"] == pytest.approx(rewards.std(ddof=1), abs=1e-6)
    assert line["reward/std_within_groups"] == pytest.approx(rewards.var(1, ddof=1).mean() ** 0.5, abs=1e-6)
    assert line["select/kept_best"] == sum(row["kept"] and row["normalised"] > 0 for row in stored["scores"])
    sampled = storage.read_tensors(stage / "samples.safetensors", "")
    rows = json.loads((stage / "samples.json").read_text())
    for row in rows:  # the picture's own seed is that of its own noise
        noise = stream_noise(row["seed"], 2, loaded.family.latent_shape)
        own = slice(4 * row["group"] + 2 * row["branch"], 4 * row["group"] + 2 * row["branch"] + 2)
        before, after = (sampled["states"][sampled[name][own]] for name in ("before", "after"))
        cond = {"encoder_hidden_states": sampled["cond.encoder_hidden_states"][sampled["prompt"][own]]}
        with torch.no_grad():
            mean, sigma = loaded.policy().transition(before, sampled["step"][own], cond)
        torch.testing.assert_close(after, mean + sigma * noise, rtol=1e-3, atol=1e-3)
