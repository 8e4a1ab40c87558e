"""Every family on tiny random models of its real classes: a stage end to end, and against the stock pipeline."""

import json

import numpy as np
import pytest
import tiny
import tiny_sdxl
import torch
from safetensors.torch import load_file

from b2diffurl.bench import random_weights
from b2diffurl.evaluate import before_after
from b2diffurl.families import lora
from b2diffurl.models import Models
from b2diffurl.rollout import denoise
from b2diffurl.run import metrics
from b2diffurl.run.command import parse
from b2diffurl.run.folder import Run
from b2diffurl.stages import train
from b2diffurl.stages.loop import run_stage

STAGE = (
    "exp_name=t", "sample.groups=3", "sample.branches=3", "sample.num_steps=4", "schedule.stage_count=2",
    "schedule.left=2", "schedule.right=3", "train.trajectories_per_update=4", "evaluate.images_per_prompt=1",
    "evaluate.oracle=False", "reward.name=jpeg_compressibility",
)  # fmt: skip


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def pipeline(request, tmp_path_factory):
    """The folder of a tiny pipeline."""
    return tiny_sdxl.write(tmp_path_factory.mktemp(request.param), prediction_type=request.param)


def configure(pipeline, *settings):
    flags = [f"--config.{setting}" for setting in (f"pretrained.model={pipeline}", *STAGE, *settings)]
    return parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0]


def stock(pipeline):
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(pipeline, add_watermarker=False, local_files_only=True)


def test_embeddings_are_the_stock_pipelines(pipeline):
    family = Models(configure(pipeline)).family
    prompts = ["a red circle", "a cat riding a bike"]
    ours, negative = family.embed(prompts), family.embed([""])
    wanted = stock(pipeline).encode_prompt(prompts, num_images_per_prompt=1, do_classifier_free_guidance=True)
    hidden, empty, pooled, empty_pooled = wanted
    torch.testing.assert_close(ours["encoder_hidden_states"], hidden)
    torch.testing.assert_close(ours["text_embeds"], pooled)
    assert torch.equal(negative["encoder_hidden_states"], empty[:1])  # zeros, and not the embedding of ""
    assert torch.equal(negative["text_embeds"], empty_pooled[:1])
    assert ours["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_pictures_are_the_stock_pipelines(pipeline):
    """From the same x_T and the same noise of every step: as uint8, by a few of its 256 levels."""
    config = configure(pipeline)
    loaded, prompt = Models(config), "a red circle"
    noise = torch.randn(1, 5, *loaded.family.latent_shape, generator=torch.Generator().manual_seed(0))
    policy, cond = loaded.policy(), loaded.family.embed([prompt])
    states, _ = denoise(policy, policy.initial(noise[:, 0]), cond, noise[:, 1:], range(4))
    ours = loaded.family.decode(states[-1])[0].numpy().astype(int)
    pipe, drawn = stock(pipeline), iter(noise[0, 1:])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.register_to_config(steps_offset=1, clip_sample=False)
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, t, x, eta=0.0, generator=None, return_dict=True: step(
        output, t, x, eta=1.0, variance_noise=next(drawn)[None], return_dict=return_dict
    )
    theirs = pipe(prompt, num_inference_steps=4, guidance_scale=5.0, latents=noise[:, 0], eta=1.0).images[0]
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 3
    assert ours.std() > 1


def test_two_stages_an_evaluation_and_the_stock_pipeline_reads_the_lora(pipeline, elsewhere):
    settings = (f"save_path={elsewhere}", "select.pos_threshold=-9", "select.neg_threshold=9")
    for stage in (0, 1):
        run_stage(configure(pipeline, *settings, f"stage={stage}"))
    lines = [line for line in metrics.read(elsewhere / "t/metrics.jsonl") if line["step"] == "train"]
    assert all(line["policy/ratio_first"] == pytest.approx(1, abs=1e-3) and line["train/updates"] for line in lines)
    run = Run(configure(pipeline, *settings, "stage=1"))
    wanted = load_file(run.checkpoint / "pytorch_lora_weights.safetensors")
    for path in sorted((run.stage / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (run.stage / "checkpoints").rmdir()
    train.main(configure(pipeline, *settings, "stage=1"))  # again, alone: the same bits
    again = load_file(run.checkpoint / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    before_after.main(configure(pipeline, *settings), run.checkpoint, run.folder)
    before, after = json.loads((run.folder / "eval.json").read_text())["results"][:2]
    assert before["images_sha256"] != after["images_sha256"]
    pipe, ours = stock(pipeline), Models(configure(pipeline)).family.denoiser
    pipe.load_lora_weights(run.checkpoint)
    lora.load(ours, run.checkpoint)
    x, given = torch.randn(1, 4, 8, 8), {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)}
    hidden = torch.randn(1, 77, 64)
    with torch.no_grad():
        theirs = pipe.unet(x, 500, hidden, added_cond_kwargs=given).sample
        torch.testing.assert_close(ours(x, 500, hidden, added_cond_kwargs=given).sample, theirs)
        pipe.unload_lora_weights()
        assert (theirs - pipe.unet(x, 500, hidden, added_cond_kwargs=given).sample).abs().max() > 1e-4


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
