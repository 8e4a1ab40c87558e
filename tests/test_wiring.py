"""Every setting reaches what it sets: each test here fails if one line passes a wrong number on."""

import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import build_unet

from b2diffurl import models, update
from b2diffurl.ddim import gaussian_log_prob, transition
from b2diffurl.families import lora
from b2diffurl.guidance import guided_noise
from b2diffurl.run import metrics
from b2diffurl.run.command import parse
from b2diffurl.run.folder import Run, checkpoint
from b2diffurl.stages import sample, select, train


def configure(*settings):
    flags = [f"--config.{setting}" for setting in settings]
    return parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0]


def test_adamw_gets_its_settings():
    config = configure(
        "train.learning_rate=0.003", "train.adam_beta1=0.7", "train.adam_beta2=0.95", "train.adam_epsilon=1e-5",
        "train.adam_weight_decay=0.02",
    )  # fmt: skip
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = train.build_optimizer(config, {"weight": weight})
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 0.003, "betas": (0.7, 0.95), "eps": 1e-5, "weight_decay": 0.02,
    }  # fmt: skip
    assert isinstance(optimizer, torch.optim.AdamW)


def test_a_linear_rate_falls_from_stage_to_stage_towards_0():
    config = configure("train.lr_schedule=linear", "train.learning_rate=0.008", "schedule.stage_count=4")
    rates = []
    for config.stage in range(4):
        optimizer = train.build_optimizer(config, {"weight": torch.nn.Parameter(torch.zeros(1))})
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.008, 0.006, 0.004, 0.002])


def test_advantages_are_clamped_and_weighted_by_their_sign(tmp_path):
    config = configure(
        "sample.groups=2", "sample.branches=2", "train.adv_clip=3", "train.beta1=0.5", "train.beta2=2",
        f"save_path={tmp_path}", "exp_name=t",
    )  # fmt: skip
    run = Run(config)
    run.stage.mkdir(parents=True)
    shape = (4, 8, 8)
    save_file(
        {
            "latents": torch.randn(4, 3, *shape), "start_latents": torch.randn(2, *shape),
            "log_probs": torch.randn(4, 3), "timesteps": torch.tensor([101, 51, 1]),
            "prompt_embeds": torch.randn(2, 16, 64), "negative_embeds": torch.randn(1, 16, 64),
            "prompt_index": torch.tensor([0, 0, 1, 1]),
        },
        run.stage / "samples.safetensors",
    )  # fmt: skip
    normalised = torch.tensor([9.0, 2.0, 0.0, -1.0], dtype=torch.float64)
    pairs = train.load_pairs(config, run, torch.arange(4), normalised, "cpu")
    assert pairs.advantages.tolist() == [1.5, 1.0, 0.0, -2.0]
    assert train.load_pairs(config, run, torch.arange(4), -normalised, "cpu").advantages.tolist() == [-6, -4, 0, 0.5]


def test_an_update_is_no_longer_than_the_bound_on_the_gradient(scheduler):
    """With plain gradient descent at rate 1 the weights move by the clipped gradient itself."""
    for bound, wanted in ((1e-3, 1e-3), (1e9, None)):
        unet = build_unet()
        config = configure("train.log_prob=mean", f"train.max_grad_norm={bound}", "train.num_epochs=1")
        parameters = [*lora.add(unet, config).values()]
        before = torch.cat([p.detach().flatten() for p in parameters])
        latents, embeds = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 16, 64)
        pairs = update.Pairs(latents, torch.zeros(2, 2), scheduler.timesteps[-2:], torch.ones(2), embeds, embeds[:1])
        pairs.log_probs = first_pass(unet, scheduler, pairs)
        norms = []
        update.train_updates(
            unet, scheduler, torch.optim.SGD(parameters, lr=1.0), parameters, pairs, config,
            torch.Generator().manual_seed(0), lambda statistics, norm, norms=norms: norms.append(norm),
        )  # fmt: skip
        moved = (torch.cat([p.detach().flatten() for p in parameters]) - before).norm().item()
        assert moved == pytest.approx(wanted or norms[0], rel=1e-3)
        assert norms[0] > 2e-3  # before clipping


def test_the_loss_scales_headroom_goes_on_from_stage_to_stage(elsewhere, monkeypatch):
    """An overflow that was found once is not met again at the first update of every later stage."""
    given = []

    def overflowing(*arguments):
        seen, headroom = updates(*arguments)
        given.append(arguments[-1])
        return seen, headroom / 16

    updates = update.train_updates
    monkeypatch.setattr(train, "train_updates", overflowing)
    settings = (
        f"save_path={elsewhere}", "exp_name=t", "sample.groups=2", "sample.branches=2", "sample.num_steps=2",
        "schedule.left=1", "schedule.right=1", "select.pos_threshold=-9", "train.learning_rate=1e-5",
    )  # fmt: skip
    for stage in (0, 1):
        for step in (sample, select, train):
            step.main(configure(*settings, f"stage={stage}"))
    assert given == [1, 1 / 16]


@torch.no_grad()
def first_pass(unet, scheduler, pairs):
    """The log-densities (n, s) of stored transitions under the UNet as it is."""
    count, length = pairs.log_probs.shape
    rows, steps = torch.arange(count).repeat_interleave(length), torch.arange(length).repeat(count)
    settings = types.SimpleNamespace(sample=types.SimpleNamespace(guidance_scale=5.0, eta=1.0))
    mean, sigma = update.step_distribution(unet, scheduler, pairs, rows, steps, settings)
    return gaussian_log_prob(pairs.latents[rows, steps + 1], mean, sigma).view(count, length)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
def test_latents_are_carried_in_their_precision_and_log_probabilities_are_of_the_rounded_ones(precision):
    config = configure(f"mixed_precision={precision}", "train.log_prob=mean")
    loaded = models.Models(config)
    sampler, embeds = loaded.sampler(), loaded.embed(["a red circle", "a blue ring"])
    noise = torch.randn(2, 3, *sampler.latent_shape, generator=torch.Generator().manual_seed(0))
    start = sampler.initial(noise[:, 0])
    path, log_probs = sampler.denoise(start, embeds, noise[:, 1:], range(18, 20))
    assert start.dtype == path.dtype == (torch.float16 if precision == "fp16" else torch.float32)
    assert log_probs.dtype == torch.float32
    before = start
    for i, step in enumerate((18, 19)):
        timesteps = sampler.scheduler.timesteps[step].expand(2)
        negative = sampler.negative_embeds.expand(2, -1, -1)
        predicted = guided_noise(sampler.unet, before, timesteps, embeds, negative, 5.0)
        mean, sigma = transition(sampler.scheduler, predicted, timesteps, before, 1.0)
        stored = gaussian_log_prob(path[:, i], mean, sigma)
        torch.testing.assert_close(log_probs[:, i], stored, rtol=0, atol=1e-5)  # the same call: the same bits nearly
        if precision == "fp16":  # or this test could not tell the two apart
            exact = gaussian_log_prob(mean + sigma * noise[:, i + 1], mean, sigma)
            assert (exact - stored).abs().max() > 1e-4
        before = path[:, i]


def test_the_authors_accumulation_and_the_even_one():
    """Kept -> the authors' updates and ours, as counted on their code: 100 -> 1, 2; 130 -> 2, 4; 300 -> 4, 6."""
    config = configure("train.trajectories_per_update=128", "train.num_epochs=2")
    for kept, authors, even in ((40, 0, 2), (64, 1, 2), (100, 1, 2), (130, 2, 4), (300, 4, 6)):
        counts = update.count_updates(config, kept)
        assert counts == {"stage": authors, "epoch": even}
        for unit in counts:
            config.train.accumulate_over = unit
            updates = update.plan_updates(config, kept, torch.Generator().manual_seed(0))
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
    settings = (
        f"save_path={elsewhere}", "exp_name=t", "sample.groups=2", "sample.branches=2", "sample.num_steps=2",
        "schedule.left=1", "schedule.right=1", "select.pos_threshold=-9", "select.neg_threshold=-9",
        "train.accumulate_over=stage", "train.trajectories_per_update=5",
    )  # fmt: skip
    for step in (sample, select, train):
        step.main(configure(*settings))
    assert "2 selected trajectories in 2 epochs do not fill an update of" in capsys.readouterr().out
    stored = load_file(checkpoint(elsewhere / "t/stage0") / "pytorch_lora_weights.safetensors")
    assert not any(tensor.any() for name, tensor in stored.items() if "lora_B" in name or "lora.up" in name)
    (line,) = [line for line in metrics.read(elsewhere / "t/metrics.jsonl") if line["step"] == "train"]
    assert (line["train/updates"], line["train/updates_by_stage"], line["train/updates_by_epoch"]) == (0, 0, 2)
