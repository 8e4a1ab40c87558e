"""The measurements count what they say, and random weights of a published geometry load like real ones."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch

from b2diffurl import bench, meter, models, random_weights
from b2diffurl.configuration import UserError, parse
from b2diffurl.shapes import diffusion

TINY_UNET = {
    "sample_size": 8, "block_out_channels": (32, 64), "cross_attention_dim": 32, "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
TINY_VAE = {
    "sample_size": 16, "block_out_channels": (32, 32), "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
TINY_TEXT = {
    **random_weights.TEXT, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def configure(preset, *more):
    return parse(["test", "--config", f"config/stage_process.py:{preset}", *more])[0]


def test_operations_and_kept_bytes_are_the_textbooks():
    layer = torch.nn.Linear(4, 5, bias=False)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert meter.count(lambda: layer(x), layer) == (2 * 3 * 4 * 5, 0)
    forward_and_backward = 2 * 3 * 4 * 5 + 2 * 3 * 4 * 5  # x needs no gradient, so only the weight's is computed
    assert meter.count(lambda: layer(x).sum().backward(), layer) == (forward_and_backward, x.nbytes)


def test_a_call_fits_its_budget(monkeypatch):
    monkeypatch.setattr(meter, "_timed", lambda work: work())
    assert meter.fitting(100, lambda n: n / 10, 1000) == 100
    assert meter.fitting(100, lambda n: n / 10, 1.7) == 16
    assert meter.fitting(100, lambda n: n * 10, 1) == 1


def test_the_papers_run_costs_17_and_a_half_steps_an_image():
    """100 stages of 14..20 trained steps: a fifth of the prefix, and the interval."""
    config = configure("sdv1.4")
    start, length = bench.mean_interval(config)
    lengths = [14 + i * 7 // 100 for i in range(100)]
    wanted = sum((20 - s) / 5 + s for s in lengths) / 100
    assert start * bench.prefix_share(config) + length == pytest.approx(wanted)
    assert wanted == pytest.approx(17.58, abs=0.005)
    config.method = "ddpo_bpt"
    assert bench.prefix_share(config) == 1


def test_random_weights_load_like_real_ones(tmp_path):
    random_weights.write_pipeline(tmp_path, torch.bfloat16, TINY_UNET, TINY_VAE, TINY_TEXT)
    flags = ["--config.mixed_precision=bf16", "--config.train.log_prob=mean"]
    config = configure("shapes", f"--config.pretrained.model={tmp_path}", *flags)
    embeds = models.embed_prompts(config, ["a cat riding a bike", "a dog", ""])
    assert embeds.shape == (3, 77, 32)
    assert (embeds[0] - embeds[1]).abs().max() > 0
    sampler = models.load_sampler(config, embeds[-1:])
    noise = torch.randn(2, 3, *sampler.latent_shape)
    path, log_probs = sampler.denoise(sampler.initial(noise[:, 0]), embeds[:2], noise[:, 1:], [0, 1])
    assert log_probs.isfinite().all()
    pictures = models.decode(models.load_vae(config), path[:, -1])
    assert pictures.shape == (2, 16, 16, 3)
    assert pictures.float().std() > 1


def test_the_tokenizer_of_random_weights_is_clips(tmp_path):
    import open_clip
    from transformers import CLIPTokenizer

    random_weights.write_pipeline(tmp_path, torch.bfloat16, TINY_UNET, TINY_VAE, TINY_TEXT)
    prompt = "a hedgehog playing chess, isn't it?"
    ours = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")(prompt).input_ids
    assert ours == open_clip.tokenize([prompt])[0, : len(ours)].tolist()
    assert ours[-1] == 49407


def test_sd_geometry_is_the_published_one():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in model.parameters())
            for model in (
                UNet2DConditionModel(**random_weights.UNET),
                AutoencoderKL(**random_weights.VAE),
                CLIPTextModel(CLIPTextConfig(**random_weights.TEXT)),
            )
        ]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]  # of CompVis/stable-diffusion-v1-4


def test_other_models_on_the_hub_are_refused(tmp_path):
    config = configure("sdv1.4", "--config.pretrained.model=stabilityai/stable-diffusion-2-1")
    with pytest.raises(UserError, match="give a local pipeline folder"):
        bench.provide_weights(config, tmp_path, quick=True)


def test_bench_as_a_user_runs_it(tmp_path):
    command = [sys.executable, "-m", "b2diffurl.bench", "--preset", "shapes", "--device", "cpu", "--quick"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "bench.txt").read_text()
    result = json.loads((tmp_path / "bench.json").read_text())
    assert set(result["phases"]) == {"sampling", "training", "scoring"}
    for phase in result["phases"].values():
        assert phase["per_s"] > 0
        assert phase["matmul_share"] > 0
    assert result["unet_parameters"] == sum(p.numel() for p in diffusion.build_unet(64).parameters())
    assert all(seconds > 0 for seconds in result["startup_s"].values())
    assert set(result["startup_s"]) == {"sample", "select", "train"}
    assert result["phases"]["training"]["first_ratio_error"] < 1e-3
    assert not pathlib.Path("log/bench_startup.log").exists()


def test_a_device_that_is_not_there_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present, so asking for one is no error")
    done = subprocess.run([sys.executable, "-m", "b2diffurl.bench", "--device", "cuda"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["bench.py: --device cuda: PyTorch sees no CUDA device here"]
