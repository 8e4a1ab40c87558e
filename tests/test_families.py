"""Every family on tiny random models of its real classes: a stage end to end, and against the stock pipeline."""

import dataclasses
import gc
import json
import math
import shutil
import weakref

import numpy as np
import pytest
import tiny
import tiny_flux
import tiny_sd3
import tiny_sdxl
import torch
from safetensors.torch import load_file, save_file

from b2diffurl.bench import densities, random_weights, rates
from b2diffurl.errors import UserError
from b2diffurl.evaluate import before_after
from b2diffurl.families import lora
from b2diffurl.models import Models
from b2diffurl.noise import stream_noise
from b2diffurl.plan import stage_plan
from b2diffurl.rollout import assemble, denoise, sample
from b2diffurl.run import metrics
from b2diffurl.run.command import parse
from b2diffurl.run.folder import Run
from b2diffurl.stages import sample as sample_step
from b2diffurl.stages import train
from b2diffurl.stages.loop import run_stage
from b2diffurl.update import Learner, accumulate, build_optimizer

STAGE = (
    "exp_name=t", "sample.groups=3", "sample.branches=3", "sample.num_steps=4", "schedule.stage_count=2",
    "schedule.left=2", "schedule.right=3", "train.trajectories_per_update=4", "evaluate.images_per_prompt=1",
    "evaluate.oracle=False", "reward.name=jpeg_compressibility",
)  # fmt: skip


FLOW = ("schedule.untrained=1",)
KINDS = {  # -> how its folder is written, with which options, and settings
    "sdxl": (tiny_sdxl.write, {}, ()),
    "sdxl with v-prediction": (tiny_sdxl.write, {"prediction_type": "v_prediction"}, ()),
    "sd3": (tiny_sd3.write, {"with_t5": False}, FLOW),
    "sd3.5 with t5": (tiny_sd3.write, {"with_t5": True}, FLOW),
    "flux": (tiny_flux.write, {}, (*FLOW, "sample.resolution=16", "pretrained.max_sequence_length=8")),
}


SHORT = ("sdxl", "sd3", "flux")  # whole runs of these, of the others with --slow


class Kind:
    """A tiny pipeline's folder, and what its family needs."""

    def __init__(self, name, folder):
        write, options, self.settings = KINDS[name]
        self.flow, self.flux = self.settings != (), name == "flux"
        self.pipeline = write(folder, **options)
        self.family = Models(self.configure()).family

    def configure(self, *settings):
        return configure(self.pipeline, *self.settings, *settings)

    def stock(self):
        """The library's own pipeline of the folder."""
        from diffusers import DiffusionPipeline

        options = {} if self.flow else {"add_watermarker": False}
        if self.flow and not self.flux and not (self.pipeline / "text_encoder_3").exists():
            options = {"text_encoder_3": None, "tokenizer_3": None}
        found = DiffusionPipeline.from_pretrained(self.pipeline, local_files_only=True, **options)
        found.set_progress_bar_config(disable=True)
        return found

    def call(self, denoiser):
        """The denoiser's output for fixed random numbers."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *self.family.latent_shape, generator=generator)
        cond = {name: torch.randn(1, *shape, generator=generator) for name, shape in self.family.text_shapes().items()}
        with torch.no_grad():
            return self.family.call(denoiser, x, torch.tensor([500]), cond)


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    return Kind(request.param, tmp_path_factory.mktemp("pipeline"))


def configure(pipeline, *settings):
    flags = [f"--config.{setting}" for setting in (f"pretrained.model={pipeline}", *STAGE, *settings)]
    return parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0]


def test_embeddings_are_the_stock_pipelines(kind):
    family, prompts = Models(kind.configure()).family, ["a red circle", "a cat riding a bike"]
    ours, negative = family.embed(prompts), family.embed([""])
    if kind.flux:
        hidden, pooled, _ = kind.stock().encode_prompt(prompts, None, max_sequence_length=8)
    else:
        prompted = {"prompt_2": None, "prompt_3": None} if kind.flow else {}
        hidden, empty, pooled, empty_pooled = kind.stock().encode_prompt(
            prompts, num_images_per_prompt=1, do_classifier_free_guidance=True, **prompted
        )
        torch.testing.assert_close(negative["encoder_hidden_states"], empty[:1])
    (_, width), (name, _) = family.text_shapes()["encoder_hidden_states"], [*family.text_shapes().items()][1]
    torch.testing.assert_close(ours["encoder_hidden_states"], hidden)
    torch.testing.assert_close(ours[name], pooled)
    assert hidden.shape[-1] == width
    if not kind.flux:
        torch.testing.assert_close(negative[name], empty_pooled[:1])
    if not kind.flow:
        assert not negative[name].any()  # zeros, and not the embedding of ""
        assert ours["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_encoders_are_let_go_after_one_loading(kind, monkeypatch):
    """All of the run's prompts are embedded at once; later ones cost no loading."""
    family, loaded = Models(kind.configure()).family, []
    load = family._encoders
    monkeypatch.setattr(family, "_encoders", lambda: loaded.append(load()) or [*loaded[-1]])
    family.embed(["a red circle"])
    alive = [weakref.ref(own[1]) for own in loaded[0] if own]
    loaded[0] = None
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)
    family.embed(["", "a blue square", "a yellow square"])
    assert len(loaded) == 1


def test_a_folder_that_lacks_weights_is_refused(kind, tmp_path):
    """Made up, they would draw other pictures, and no line would say so."""
    for part in ("text_encoder", "unet" if (kind.pipeline / "unet").exists() else "transformer"):
        folder = tmp_path / part
        shutil.copytree(kind.pipeline, folder)
        (path,) = (folder / part).glob("*.safetensors")
        weights = load_file(path)
        del weights[next(name for name in weights if "layers.0" in name or "blocks.0" in name)]
        save_file(weights, path, {"format": "pt"})
        family = Models(kind.configure(f"pretrained.model={folder}")).family
        with pytest.raises(UserError, match=rf"its {part} (lacks 1 weights of a|does not load)"):
            family.embed(["a red circle"]) if part == "text_encoder" else family.denoiser


def test_a_stage_of_one_prompt_can_be_stored(kind, elsewhere):
    """Where the empty prompt's Conditioning is the prompt's own, they must not be one tensor."""
    config = kind.configure(f"save_path={elsewhere}", "sample.groups=1")
    sample_step.main(config)
    stored = load_file(elsewhere / "t/stage0/samples.safetensors")
    assert {name for name in stored if name.startswith("cond.")} == {f"cond.{name}" for name in kind.family.embed([""])}


def test_pictures_are_the_stock_pipelines(kind):
    """From the same x_T, and for DDIM the same noise of every step: as uint8, by a few of its 256 levels."""
    loaded, prompt = Models(kind.configure()), "a red circle"
    noise = torch.randn(1, 5, *loaded.family.latent_shape, generator=torch.Generator().manual_seed(0))
    policy, cond, pipe, options = loaded.policy(), loaded.family.embed([prompt]), kind.stock(), {}
    if kind.flow:  # the library has the ODE alone
        policy.kernel = dataclasses.replace(policy.kernel, noise_level=0.0)
    else:
        drawn, step = iter(noise[0, 1:]), pipe.scheduler.step
        pipe.scheduler.register_to_config(steps_offset=1, clip_sample=False)
        options = {"eta": 1.0}

        def with_noise(output, t, x, eta=0.0, generator=None, return_dict=True):
            return step(output, t, x, eta=eta, variance_noise=next(drawn)[None], return_dict=return_dict)

        pipe.scheduler.step = with_noise
    states, _ = denoise(policy, policy.initial(noise[:, 0]), cond, noise[:, 1:], range(4))
    ours = loaded.family.decode(states[-1])[0].numpy().astype(int)
    start = noise[:, 0]
    if kind.flux:
        start = pipe._pack_latents(start, 1, *kind.family.latent_shape)
        options = {"height": 16, "width": 16, "max_sequence_length": 8}
    theirs = pipe(prompt, num_inference_steps=4, guidance_scale=5.0, latents=start, **options).images[0]
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 3
    assert ours.std() > 1


@pytest.mark.parametrize(
    "kind", [*SHORT, *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name not in SHORT)],
    indirect=True,
)  # fmt: skip
def test_two_stages_an_evaluation_and_the_stock_pipeline_reads_the_lora(kind, elsewhere):
    settings = (f"save_path={elsewhere}", "select.pos_threshold=-9", "select.neg_threshold=9")
    for stage in (0, 1):
        run_stage(kind.configure(*settings, f"stage={stage}"))
    lines = [line for line in metrics.read(elsewhere / "t/metrics.jsonl") if line["step"] == "train"]
    assert all(line["policy/ratio_first"] == pytest.approx(1, abs=1e-3) and line["train/updates"] for line in lines)
    stored = load_file(elsewhere / "t/stage1/samples.safetensors")
    assert sorted({*stored["step"].tolist()}) == ([1, 2] if kind.flow else [1, 2, 3])
    run = Run(kind.configure(*settings, "stage=1"))
    wanted = load_file(run.checkpoint / "pytorch_lora_weights.safetensors")
    shutil.rmtree(run.stage / "checkpoints")
    train.main(kind.configure(*settings, "stage=1"))  # again, alone: the same bits
    again = load_file(run.checkpoint / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    before_after.main(kind.configure(*settings), run.checkpoint, run.folder)
    before, after = json.loads((run.folder / "eval.json").read_text())["results"][:2]
    assert before["images_sha256"] != after["images_sha256"]
    pipe, ours = kind.stock(), Models(kind.configure()).family.denoiser
    lora.load(ours, run.checkpoint)
    denoiser = pipe.transformer if kind.flow else pipe.unet
    base = kind.call(denoiser)
    pipe.load_lora_weights(run.checkpoint)
    theirs = kind.call(denoiser)
    torch.testing.assert_close(kind.call(ours), theirs)
    assert (theirs - base).abs().max() > 1e-4


def test_the_bench_measures_every_family(kind, tmp_path):
    loaded = Models(kind.configure("train.log_prob=mean"))
    random_weights.write_lora(loaded, tmp_path)
    sampling, _, pictures = rates.measure_sampling(loaded, tmp_path, 0.01)
    assert sampling["per_s"] > 0
    assert pictures[0].size == (16, 16)
    assert rates.measure_training(loaded, tmp_path, 0.01)["flops_each"] > sampling["flops_per_step"]
    figures = densities.first_pass(loaded, tmp_path, images=3, steps=2, batch=2)
    assert [row["prediction_error"] < figures["allowed"] for row in figures["by_step"]] == [True, True]


def test_a_flow_models_stored_densities_are_float64s(tmp_path):
    """Of every trained transition; the last step, which is the ODE's, is none of them."""
    own = Kind("sd3", tmp_path)
    loaded = Models(own.configure())
    policy, plan = loaded.policy(), stage_plan(own.configure())
    cond, seeds = loaded.family.embed(["a red circle"]), [[7], [1, 2, 3]]
    states, log_prob = sample(policy, plan, cond, seeds, 2, lambda first, latents: None)
    rollout, sigmas = assemble(plan, states, log_prob, torch.zeros(1, dtype=torch.long)), policy.kernel.scheduler.sigmas
    assert rollout.log_prob.isfinite().all()
    for row, step in enumerate(rollout.step.tolist()):
        x = rollout.states[rollout.before[row]][None]
        with torch.no_grad():
            halves = [
                policy.denoiser(x, timestep=sigmas[step : step + 1] * 1000, **given).sample.double()
                for given in (policy.negative, cond)
            ]
        velocity, sigma, following = halves[0] + 5 * (halves[1] - halves[0]), *sigmas[[step, step + 1]].double()
        std = following * math.sin(0.7 * math.pi / 2)
        x0, noise = x.double() - sigma * velocity, x.double() + (1 - sigma) * velocity
        mean = (1 - following) * x0 + (following**2 - std**2).sqrt() * noise
        density = torch.distributions.Normal(mean, std)
        wanted = density.log_prob(rollout.states[rollout.after[row]].double()).mean().item()
        assert rollout.log_prob[row].item() == pytest.approx(wanted, abs=1e-4)


def test_a_flow_model_whose_last_step_would_be_trained_is_refused(tmp_path):
    own = Kind("sd3", tmp_path)
    with pytest.raises(UserError, match=r"config\.schedule\.untrained=0: the last step of a flow model has no density"):
        Models(configure(own.pipeline)).family  # noqa: B018


def test_a_stable_diffusion_2_with_v_prediction_runs_a_stage(tmp_path, elsewhere):
    """Its UNet has heads by block and linear projections, its scheduler predicts velocities."""
    geometry = {**tiny.GEOMETRY, "unet": {
        **tiny.GEOMETRY["unet"], "attention_head_dim": (2, 4), "use_linear_projection": True,
    }}  # fmt: skip
    random_weights.write_pipeline(tmp_path, torch.float32, geometry)
    path = tmp_path / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    config = configure(tmp_path, f"save_path={elsewhere}", "select.pos_threshold=-9")
    run_stage(config)
    assert Models(config).kernel.scheduler.config.prediction_type == "v_prediction"
    (line,) = [line for line in metrics.read(elsewhere / "t/metrics.jsonl") if line["step"] == "train"]
    assert line["policy/ratio_first"] == pytest.approx(1, abs=1e-3)
    assert line["train/lora_change"] > 0


def test_a_familys_gradient_is_that_of_the_one_by_one_loop(kind, tmp_path):
    """Of ddpo_is before any clip, mean over transitions of -A ρ, each transition by itself."""
    loaded = Models(kind.configure("train.batch_size=5", "train.log_prob=mean", "train.clip_range=9"))
    random_weights.write_lora(loaded, tmp_path)
    _, experience = densities.sampled(loaded, tmp_path, images=3, steps=3)
    policy, parameters = loaded.trainable(tmp_path)
    policy.kernel = loaded.family.kernel(3 + loaded.family.untrained, loaded.config.sample)
    forest, total = experience.rollout, 0.0
    for row in range(len(forest.step)):
        x, following = forest.states[forest.before[row]][None], forest.states[forest.after[row]][None]
        mean, std = policy.transition(x, forest.step[row : row + 1], experience.cond)
        log_prob = torch.distributions.Normal(mean, std).log_prob(following).mean()
        total = total - experience.advantage[row] * (log_prob - forest.log_prob[row]).exp()
    wanted = torch.autograd.grad(total / len(forest.step), [*parameters.values()])
    learner, generator = Learner(policy, build_optimizer(loaded.config.train, parameters)), torch.Generator()
    accumulate(learner, experience, torch.arange(3), loaded.config.train, generator)
    largest = max(gradient.abs().max() for gradient in wanted)
    assert largest > 0
    for parameter, gradient in zip(parameters.values(), wanted, strict=True):
        assert (parameter.grad - gradient).abs().max() < 1e-3 * largest


def test_steps_before_the_interval_can_be_the_odes(kind):
    kernel = Models(kind.configure()).kernel
    ode = {"noise_level": 0.0} if kind.flow else {"eta": 0.0}
    x, v = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    step = torch.arange(4)
    mean, std = dataclasses.replace(kernel, random_from=2).transition(v, step, x)
    plain, plain_std = kernel.transition(v, step, x)
    without, _ = dataclasses.replace(kernel, **ode).transition(v, step, x)
    assert not std[:2].any()
    assert torch.equal(std[2:], plain_std[2:])
    assert torch.equal(torch.cat([without[:2], plain[2:]]), mean)
    assert not torch.equal(without[:2], plain[:2])


def test_the_prefix_of_a_stage_is_the_odes_where_it_is_set(kind, elsewhere):
    """Then what the branches start from is what the base model's ODE makes of x_T."""
    config = kind.configure(f"save_path={elsewhere}", "sample.groups=1", "sample.prefix=ode")
    loaded = Models(config)
    sample_step.main(config, loaded=loaded)
    stored = load_file(elsewhere / "t/stage0/samples.safetensors")
    policy, plan = loaded.policy(), stage_plan(config)
    (row,) = {row["prompt"] for row in json.loads((elsewhere / "t/stage0/samples.json").read_text())}
    noise = stream_noise(plan.seeds(config.seed, 0, [0])[0][0], 1 + plan.start, loaded.family.latent_shape)
    policy.kernel = dataclasses.replace(policy.kernel, random_from=9)
    states, _ = denoise(
        policy, policy.initial(noise[:1]), loaded.family.embed([row]), noise[None, 1:], range(plan.start)
    )
    torch.testing.assert_close(stored["states"][0], states[-1][0], rtol=1e-4, atol=1e-4)


def test_the_evaluation_has_steps_guidance_and_noise_of_its_own(kind, elsewhere):
    side = 16 if kind.flow and not kind.flux else 32  # SD3's positions end there
    config = kind.configure(
        f"save_path={elsewhere}", "sample.groups=1", "evaluate.num_steps=2", "evaluate.guidance_scale=3.5",
        f"evaluate.resolution={side}", "evaluate.ode=True",
    )  # fmt: skip
    loaded = Models(config)
    other = loaded.evaluating()
    assert other.family.denoiser is loaded.family.denoiser
    assert other.family.vae is loaded.family.vae
    images = before_after.generate(other, {"own": ["a red circle"]}, None, "before")["own"]
    assert images[0].size == (side, side)
    policy = other.policy()
    assert (policy.guidance, policy.kernel.random_from, len(policy.kernel.scheduler.timesteps)) == (3.5, 2, 2)
    assert loaded.policy().guidance == 5.0
    assert len(loaded.kernel.scheduler.timesteps) == 4
    cond = other.family.embed(["a red circle"])
    if not kind.flow:
        assert cond["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    noise = torch.randn(2, 3, *other.family.latent_shape, generator=torch.Generator().manual_seed(0))
    noise[1, 0] = noise[0, 0]  # one x_T, other noise after it
    cond = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in cond.items()}
    states, _ = denoise(policy, policy.initial(noise[:, 0]), cond, noise[:, 1:], range(2))
    torch.testing.assert_close(states[-1][0], states[-1][1])


def test_a_shift_by_the_pictures_size_is_the_stock_pipelines(tmp_path):
    own = Kind("sd3", tmp_path)
    path = own.pipeline / "scheduler/scheduler_config.json"
    settings = {name: value for name, value in json.loads(path.read_text()).items() if name != "max_shift"}
    path.write_text(json.dumps({**settings, "use_dynamic_shifting": True}))
    pipe, plain = own.stock(), own.family.kernel(4, own.configure().sample).scheduler.sigmas
    pipe("a red circle", num_inference_steps=4)
    torch.testing.assert_close(plain.cpu(), pipe.scheduler.sigmas)


@pytest.mark.parametrize(("name", "resolution", "said"), [
    ("sdxl", 30, "a multiple of 4 pixels; 0 is its own"), ("sd3", 32, "a multiple of 2 pixels, at most 16"),
    ("sd3", 15, "a multiple of 2 pixels"), ("flux", 18, "a multiple of 4 pixels"),
])  # fmt: skip
def test_a_resolution_that_the_model_does_not_allow_is_refused(name, resolution, said, tmp_path):
    own = Kind(name, tmp_path)
    for section in ("sample", "evaluate"):
        with pytest.raises(UserError, match=rf"config\.{section}\.resolution={resolution}: .*{said}"):
            Models(own.configure(f"{section}.resolution={resolution}")).family  # noqa: B018


def test_models_distilled_for_few_steps_are_refused(tmp_path):
    schnell = tiny_flux.write(tmp_path, guidance_embeds=False)
    with pytest.raises(UserError, match="was distilled for few steps"):
        Models(configure(schnell, *KINDS["flux"][2])).family  # noqa: B018
    named = schnell.rename(tmp_path / "sdxl-turbo")
    with pytest.raises(UserError, match="sdxl-turbo' was distilled for few steps"):
        Models(configure(named, *KINDS["flux"][2])).family  # noqa: B018
