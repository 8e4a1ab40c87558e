"""Gradient halves by step: sums that belong together, cosines by their definition, and the command on a stage."""

import json

import pytest
import torch
from test_run import configure
from test_update import BRANCHES, LENGTH, away_from_the_sampler, gradient, learner_of, sampled, seeded, settings

from b2diffurl import gradient_signal
from b2diffurl.errors import UserError
from b2diffurl.families import lora
from b2diffurl.gradient_signal import gradients, main, summary
from b2diffurl.stages import sample, select
from b2diffurl.update import accumulate


def test_the_halves_and_steps_make_up_the_updates_gradient(scheduler):
    learner = learner_of(scheduler)
    experience = sampled(learner.policy, 6, BRANCHES)
    away_from_the_sampler(learner)
    half, train = experience.sample // 3, settings(batch_size=4)
    found = gradients(learner.policy, lora.parameters(learner.policy.denoiser), experience, half, train)
    learner.optimizer.zero_grad()
    accumulate(learner, experience, torch.arange(6), train, seeded())
    assert len(found) == LENGTH
    total = sum(own.sum(0) for own in found.values()) / len(experience.row)
    assert (total - gradient(learner)).norm() < 1e-4 * total.norm()


def test_the_summary_in_numbers():
    found = {
        3: torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]),
        4: torch.tensor([[0.0, 10.0, 0.0], [0.0, 0.0, 10.0]]),
    }
    table = summary(found, {3: 1.0, 4: 9.0})
    assert [row["cosine"] for row in table["steps"]] == pytest.approx([1, 0])
    assert [row["share"] for row in table["steps"]] == pytest.approx([8 / 208, 200 / 208])
    whole, weighted = torch.tensor([[1.0, 11, 0], [1, 1, 10]]), torch.tensor([[9.0, 19, 0], [9, 9, 10]])
    for kind, halves in (("one", whole), ("inverse_gain", weighted)):
        wanted = (halves[0] @ halves[1] / halves[0].norm() / halves[1].norm()).item()
        assert table["all_steps"][kind] == pytest.approx(wanted)
        assert [row["up_to"][kind] for row in table["steps"]] == pytest.approx([1, wanted])


def test_the_command_on_a_stage(tmp_path, monkeypatch):
    more = ["--config.select.credit=all", "--config.stage=0"]
    for step in (sample, select):
        step.main(configure(tmp_path, *more))
    groups = {}

    def spied(policy, parameters, experience, half, train):
        latents = experience.rollout.states[experience.rollout.before[experience.row]]
        first = experience.rollout.step[experience.row] == 2  # where a group's images are the same state
        for latent, own in zip(latents[first], half[first].tolist(), strict=True):
            groups.setdefault(latent.numpy().tobytes(), set()).add(own)
        return gradients(policy, parameters, experience, half, train)

    monkeypatch.setattr(gradient_signal, "gradients", spied)
    main(configure(tmp_path, *more), tmp_path / "out")
    assert [len(own) for own in groups.values()] == [1] * len(groups)
    assert set.union(*groups.values()) == {0, 1}
    table = json.loads((tmp_path / "out/gradient_signal.json").read_text())
    assert [row["step"] for row in table["steps"]] == [2, 3, 4]
    assert table["all_steps"].keys() == {"one", "inverse_gain"}
    main(configure(tmp_path, *more, "--config.train.algorithm=dpok", "--config.train.log_prob=mean"), tmp_path / "dpok")
    assert (tmp_path / "dpok/gradient_signal.json").is_file()


def test_a_stage_without_a_selection_is_one_line(tmp_path):
    more = ["--config.select.pos_threshold=99", "--config.select.neg_threshold=-99"]
    for step in (sample, select):
        step.main(configure(tmp_path, *more))
    with pytest.raises(UserError, match="nothing was selected"):
        main(configure(tmp_path, *more), tmp_path / "out")


def test_half_without_transitions_and_no_gradient_at_all_are_one_line(scheduler, tmp_path):
    learner = learner_of(scheduler)
    experience, named = sampled(learner.policy, 6, BRANCHES), lora.parameters(learner.policy.denoiser)
    with pytest.raises(UserError, match=r"one half of the groups has no transition there; give more"):
        gradients(learner.policy, named, experience, torch.zeros(len(experience.row)), settings(batch_size=4))
    with pytest.raises(UserError, match="the gradient is 0"):
        summary({1: torch.zeros(2, 3), 2: torch.zeros(2, 3)}, {1: 1.0, 2: 1.0})


def test_float16_gradients_are_scaled(scheduler):
    """Of a transition they can be below float16's smallest number; a small one has the directions of a large one."""
    learner, both = learner_of(scheduler, torch.float16), []
    experience = sampled(learner.policy, 6, BRANCHES)
    named, half = lora.parameters(learner.policy.denoiser), experience.sample // 3
    for size in (1.0, 1e-4):
        experience.advantage = torch.linspace(-2, 2, 6)[experience.sample] * size
        found = gradients(learner.policy, named, experience, half, settings(batch_size=4))
        both.append(torch.cat([own.flatten() for own in found.values()]) / size)
    assert (both[0] - both[1]).norm() < 0.2 * both[0].norm()
