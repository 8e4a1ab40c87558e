"""What a first run meets in one precision: memory, largest batches, rates, the first pass, fifty updates."""

import dataclasses
import functools

import torch

from ..guidance import take
from ..models import Models
from ..rollout import denoise
from ..run.command import parse
from ..update import Learner, accumulate, build_optimizer, loss_scale, train_updates
from . import densities, meter, random_weights, rates

GOAL = 6e9  # bytes of a GPU in which training, one transition per call, should fit


def configure(precision, scratch):
    """The configuration of a Precision: sdv1.4 on the random weights; without a GPU, shapes with small batches."""
    settings = [f"mixed_precision={precision}", "train.log_prob=mean"]
    if torch.cuda.is_available():
        preset, clip = "sdv1.4", scratch / "clip"
        settings += [f"pretrained.model={scratch / 'pipeline'}", f"reward.model=local-dir:{clip}", "reward.weights="]
    else:
        preset = "shapes"
        settings += ["sample.batch_size=5", "train.batch_size=8", "reward.batch_size=4", "sample.num_steps=8"]
        settings += ["schedule.left=6", "schedule.right=8"]
    return parse(["", "--config", f"config/stage_process.py:{preset}", *(f"--config.{given}" for given in settings)])[0]


class Precision:
    """The checks of one precision; they share the models, and a LoRA that does something."""

    def __init__(self, config, checkpoint):
        self.config, self.checkpoint, self.cuda = config, checkpoint, torch.cuda.is_available()

    @functools.cached_property
    def loaded(self):
        """The Models; the LoRA is written when they are."""
        loaded = Models(self.config)
        random_weights.write_lora(loaded, self.checkpoint)
        return loaded

    def memory(self):
        """Memory of an update, one transition per call, without and with gradient checkpointing."""
        lines, figures, train = [], {}, self.config.train
        _, experience = densities.sampled(self.loaded, self.checkpoint, 1, 1)
        self.loaded.family.decode(experience.rollout.states[-1:])  # so that all that a run keeps on the device is there
        policy, parameters = self.loaded.trainable(self.checkpoint)
        denoiser = policy.denoiser
        switches = {"without": denoiser.disable_gradient_checkpointing, "with": denoiser.enable_gradient_checkpointing}
        for name, switch in switches.items():
            switch()
            learner, figures[name] = Learner(policy, build_optimizer(train, parameters)), {}
            with meter.peak_memory(figures[name]):
                scale = loss_scale(policy, experience, 1, train)
                accumulate(learner, experience, torch.arange(1), train, torch.Generator(), scale)
                learner.optimizer.step()
                learner.optimizer.zero_grad()
            lines.append(f"{name} gradient checkpointing: peak {gib(figures[name]['peak_bytes'])}")
            if self.cuda:
                free, total = torch.cuda.mem_get_info()
                used = figures[name]["device_bytes"] = total - free
                met = "" if used < GOAL else "not "
                lines[-1] += f" allocated, {gib(used)} of the device used: {met}under {GOAL / 1e9:g} GB"
        denoiser.disable_gradient_checkpointing()
        return lines, figures

    def largest_batches(self):
        """How many images per sampling call and transitions per training call there can be, found by doubling."""
        most, found = (256 if self.cuda else 8), {}
        _, experience = densities.sampled(self.loaded, self.checkpoint, 1, 1)
        config, policy = self.config.copy_and_resolve_references(), self.loaded.policy(self.checkpoint)

        def sample(n):
            latents, cond = experience.rollout.states[[0] * n], take(experience.cond, [0] * n)
            noise = torch.randn(n, 1, *latents.shape[1:]).to(policy.device)
            states, _ = denoise(policy, latents, cond, noise, [0])
            self.loaded.family.decode(states[-1])

        found["sampling"], why_sampling = meter.largest(most, sample)
        policy, parameters = self.loaded.trainable(self.checkpoint)
        learner, config.train.batch_size = Learner(policy, build_optimizer(config.train, parameters)), most
        found["training"], why_training = meter.largest(
            most, lambda n: rates.gradients(learner, experience, n, config.train)
        )
        self.config.sample.batch_size = min(found["sampling"], self.config.sample.batch_size)
        self.config.train.batch_size = min(found["training"], self.config.train.batch_size)
        return [
            f"sampling: {found['sampling']} images ({why_sampling or 'more were not tried'})",
            f"training: {found['training']} transitions ({why_training or 'more were not tried'})",
        ], found

    def throughput(self):
        """Rates of sampling, training and scoring, and their share of the matmul rate."""
        budget = 10.0 if self.cuda else 0.1
        sampling, _, pictures = rates.measure_sampling(self.loaded, self.checkpoint, budget)
        phases = {"sampling": sampling, "training": rates.measure_training(self.loaded, self.checkpoint, budget)}
        phases["scoring"] = rates.measure_scoring(self.loaded, pictures, budget)
        if not self.cuda:
            return ["sampling, training and scoring ran; how fast says nothing about a GPU"], {}
        shares = rates.add_shares(self.config, phases, budget / 3)
        lines = [rates.HEAD, *(rates.phase_line(name, phase) for name, phase in phases.items())]
        return [f"matmul {shares['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s", *lines], {**shares, "phases": phases}

    def first_pass(self):
        """How far training's densities are off sampling's before any update, by step."""
        config = self.config
        images, steps, batch = config.sample.batch_size, config.sample.num_steps, config.train.batch_size
        figures = densities.first_pass(self.loaded, self.checkpoint, images, steps, batch)
        lines = densities.first_pass_lines(figures)
        if not max(row["prediction_error"] for row in figures["by_step"]) <= figures["allowed"]:
            raise ValueError("\n".join(["rounding does not explain that", *lines]))
        return lines, figures

    def updates(self):
        """50 updates by the run's own loop, of 2 trajectories and 4 steps, the first one's densities checked."""
        count, norms = (50 if self.cuda else 5), []
        config = self.config.copy_and_resolve_references()
        config.train.trajectories_per_update, config.train.num_epochs, config.train.accumulate_over = 2, count, "stage"
        sampler, experience = densities.sampled(self.loaded, self.checkpoint, 2, 4)
        policy, parameters = self.loaded.trainable(self.checkpoint)
        policy = dataclasses.replace(policy, kernel=sampler.kernel)
        learner, generator = (
            Learner(policy, build_optimizer(config.train, parameters)),
            torch.Generator().manual_seed(0),
        )
        asked = train_updates(learner, experience, config.train, generator, lambda _, norm: norms.append(norm))
        if len(norms) != count or not all(parameter.isfinite().all() for parameter in parameters.values()):
            raise ValueError(f"{len(norms)} updates of {count}, or a LoRA that is not finite")
        figures = {"updates": count, "evaluated": asked, "headroom": learner.headroom, "grad_norms": norms}
        line = f"{count} updates, {asked} states evaluated in all, all finite; gradient norms {min(norms):.3g} to "
        return [f"{line}{max(norms):.3g}; loss scale times {learner.headroom:g}"], figures


def gib(count):
    """Bytes as text."""
    return "an unknown amount" if count is None else f"{count / 2**30:.2f} GiB"
