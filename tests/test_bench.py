"""The measurements count what they say, and random weights of a published geometry load like real ones."""

import json
import pathlib
import subprocess
import sys

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_run import configure as small_run

from b2diffurl.bench import densities, meter, random_weights, rates
from b2diffurl.errors import UserError
from b2diffurl.guidance import take
from b2diffurl.models import Models
from b2diffurl.plan import stage_plan
from b2diffurl.rollout import denoise
from b2diffurl.run import metrics
from b2diffurl.run.command import parse
from b2diffurl.shapes import diffusion
from b2diffurl.stages import dry_run, loop, sample, select, train
from b2diffurl.update import Learner, build_optimizer

CPU = ["-m", "b2diffurl.bench", "--preset", "shapes", "--device", "cpu", "--quick"]


def configure(preset, *more):
    return parse(["test", "--config", f"config/stage_process.py:{preset}", *more])[0]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The shapes world's Models, and a LoRA that does something."""
    found, folder = Models(configure("shapes")), tmp_path_factory.mktemp("lora")
    random_weights.write_lora(found, folder)
    return found, folder


def operations(model, work):
    """What a call costs by the textbook: two a weight and position for linear and convolutional layers, and attention.

    Attention of n queries to m keys with c channels: 2nmc for the products and 2nmc for the sum of the values.
    """
    from diffusers.models.attention_processor import Attention

    total = 0

    def add(layer, given, named, output):
        nonlocal total
        if isinstance(layer, torch.nn.Linear):
            total += 2 * layer.in_features * output.numel()
        elif isinstance(layer, torch.nn.Conv2d):
            total += 2 * layer.weight[0].numel() * output.numel()
        else:
            queries, keys = given[0], named.get("encoder_hidden_states")
            width = layer.to_q.in_features
            n = queries.numel() // len(queries) // width
            total += 4 * len(queries) * n * (n if keys is None else keys.shape[1]) * layer.to_q.out_features

    kinds = torch.nn.Linear, torch.nn.Conv2d, Attention
    hooks = [m.register_forward_hook(add, with_kwargs=True) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        work()
    for hook in hooks:
        hook.remove()
    return total


def test_operations_and_kept_bytes_are_the_textbooks():
    layer = torch.nn.Linear(4, 5, bias=False)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert meter.count(lambda: layer(x), layer) == (2 * 3 * 4 * 5, 0)
    forward_and_backward = 2 * 3 * 4 * 5 + 2 * 3 * 4 * 5  # x needs no gradient, so only the weight's is computed
    assert meter.count(lambda: layer(x).sum().backward(), layer) == (forward_and_backward, x.nbytes)


def test_an_images_operations_are_an_images(loaded):
    """52.51 million a forward pass of the world's UNet, twice that a guided step, and the decoder once."""
    found, folder = loaded
    phase, latent, pictures = rates.measure_sampling(found, folder, 0.01)
    unet, vae = found.policy().denoiser, found.family.vae
    text = torch.randn(1, 16, 64)
    forward = operations(unet, lambda: unet(latent[None], torch.tensor(1), text))
    assert forward == 52_510_720
    assert phase["flops_per_step"] == 2 * forward
    decoding = operations(vae, lambda: found.family.decode(latent[None]))
    assert phase["flops_each"] == pytest.approx(16.6 * 2 * forward + decoding, rel=1e-12)
    assert phase["flops_per_s"] == pytest.approx(phase["flops_each"] * phase["per_s"])
    assert [picture.size for picture in pictures] == [(32, 32)] * min(4, phase["batch"])


def test_operations_go_with_the_batch(loaded):
    found, folder = loaded
    _, experience = densities.sampled(found, folder, 1, 1)
    policy, parameters = found.trainable(folder)
    unet, train = policy.denoiser, found.config.train
    learner = Learner(policy, build_optimizer(train, parameters))

    def work(n):
        rates.gradients(learner, experience, n, train)

    each, kept = meter.count_each(work, unet)
    (two, kept_by_two), (four, kept_by_four) = (meter.count(lambda n=n: work(n), unet) for n in (2, 4))
    assert (four - two, kept_by_four - kept_by_two) == (2 * each, 2 * kept)
    assert four < 4 * meter.count(lambda: work(1), unet)[0]  # adding the LoRA to the weights is once per call
    assert 2 < each / (2 * 52_510_720) < 3  # with the backward pass, in which frozen weights have no gradient
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_a_share_above_the_whole_is_an_error(monkeypatch):
    monkeypatch.setattr(meter, "matmul_rate", lambda dtype, budget: {torch.bfloat16: 100.0, torch.float32: 10.0}[dtype])
    config = configure("sdv1.4", "--config.mixed_precision=bf16")
    phases = {"sampling": {"flops_per_s": 90.0}, "scoring": {"flops_per_s": 5.0}}
    shares = rates.add_shares(config, phases, 1)
    assert shares == {"matmul_flops_per_s": 100.0, "float32_matmul_flops_per_s": 10.0}
    assert [phase["matmul_share"] for phase in phases.values()] == [0.9, 0.5]  # the reward computes in float32
    phases["scoring"]["flops_per_s"] = 11.0
    with pytest.raises(UserError, match="scoring came out at 110% of the rate of a matrix product"):
        rates.add_shares(config, phases, 1)


def test_a_call_fits_its_budget(monkeypatch):
    monkeypatch.setattr(meter, "_timed", lambda work: work())
    assert meter.fitting(100, lambda n: n / 10, 1000) == 100
    assert meter.fitting(100, lambda n: n / 10, 1.7) == 16
    assert meter.fitting(100, lambda n: n * 10, 1) == 1


def test_the_largest_batch_is_the_last_that_fits():
    def work(n):
        if n > 5:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity of 8 GiB of which\nmore"
            )

    assert meter.largest(64, work) == (4, "CUDA out of memory. Tried to allocate 2 GiB")
    assert meter.largest(4, work) == (4, "")
    with pytest.raises(RuntimeError, match="out of memory"):
        meter.largest(64, lambda n: work(6))


def test_the_first_pass_by_step(loaded, monkeypatch):
    """Rounding is far below what is allowed; a policy that is another one is far above it, at every step."""
    found, folder = loaded
    figures = densities.first_pass(found, folder, images=3, steps=4, batch=5)
    assert [row["t"] for row in figures["by_step"]] == [751, 501, 251, 1]
    assert all(row["prediction_error"] < figures["allowed"] for row in figures["by_step"])
    assert all(row["ratio_error_of_sum"] < 256 * 4 * row["ratio_error"] + 1e-9 for row in figures["by_step"])

    def changed(checkpoint):
        policy, parameters = type(found).trainable(found, checkpoint)
        for parameter in parameters.values():
            parameter.data.mul_(1.1)
        return policy, parameters

    monkeypatch.setattr(found, "trainable", changed)
    wrong = densities.first_pass(found, folder, images=3, steps=4, batch=5)
    assert all(row["prediction_error"] > wrong["allowed"] for row in wrong["by_step"])
    lines = densities.first_pass_lines(wrong)
    assert lines[0].startswith("first pass: 3 images sampled together in 4 steps (a run has 20), read again 5 per call")
    worst = max(wrong["by_step"], key=lambda row: row["prediction_error"])
    assert lines[1].startswith(f"  t={worst['t']}: the prediction is off by ")
    assert "with the preset's log_prob=sum" in lines[1]


def test_the_first_pass_has_the_time_that_it_is_given():
    config, sampling = configure("shapes"), {"batch": 32, "seconds_per_step": 0.5}
    assert densities.affordable(config, sampling, 8, 1e6) == (32, 20, 8)
    assert densities.affordable(config, sampling, 8, 60) == (3, 20, 8)
    assert densities.affordable(config, sampling, 2, 10) == (2, 5, 1)
    assert densities.affordable(config, sampling, 1, 0.1) == (2, 1, 1)


def test_the_papers_run_costs_less_than_17_steps_an_image():
    """100 stages of 14..20 trained steps: the shared beginning and the fork's prediction once for five branches."""
    config = configure("sdv1.4")
    lengths = [14 + i * 7 // 100 for i in range(100)]
    wanted = sum((20 - s + 1) / 5 + s - 1 for s in lengths) / 100
    assert rates.steps_per_image(config) == pytest.approx(wanted)
    assert wanted == pytest.approx(16.78, abs=0.005)
    config.method = "ddpo_bpt"
    assert rates.steps_per_image(config) == 20


def test_random_weights_load_like_real_ones(tmp_path):
    random_weights.write_pipeline(tmp_path, torch.float16, tiny.GEOMETRY)  # as the check of a GPU has them
    flags = ["--config.mixed_precision=bf16", "--config.train.log_prob=mean"]
    config = configure("shapes", f"--config.pretrained.model={tmp_path}", *flags)
    loaded = Models(config)
    cond = loaded.family.embed(["a cat riding a bike", "a dog", ""])
    embeds = cond["encoder_hidden_states"]
    assert embeds.shape == (3, 77, 32)
    assert (embeds[0] - embeds[1]).abs().max() > 0
    policy = loaded.policy()
    noise = torch.randn(2, 3, *loaded.family.latent_shape)
    states, log_probs = denoise(policy, policy.initial(noise[:, 0]), take(cond, [0, 1]), noise[:, 1:], [0, 1])
    assert torch.stack(log_probs).isfinite().all()
    pictures = loaded.family.decode(states[-1])
    assert pictures.shape == (2, 16, 16, 3)
    assert pictures.float().std() > 1


def test_the_tokenizer_of_random_weights_is_clips(tmp_path):
    import open_clip
    from transformers import CLIPTokenizer

    random_weights.write_pipeline(tmp_path, torch.bfloat16, tiny.GEOMETRY)
    prompt = "a hedgehog playing chess, isn't it?"
    ours = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")(prompt).input_ids
    assert ours == open_clip.tokenize([prompt])[0, : len(ours)].tolist()
    assert ours[-1] == 49407


def test_sd_geometry_is_the_published_one():
    sizes = [random_weights.parameter_count(model) for model in random_weights.build().values()]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]  # of CompVis/stable-diffusion-v1-4


def test_random_weights_without_room_or_architecture(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'ViT-Q-9' is no OpenCLIP architecture"):
        random_weights.write(tmp_path, "bf16", "ViT-Q-9", tiny.GEOMETRY)
    monkeypatch.setattr(random_weights.shutil, "disk_usage", lambda path: type("", (), {"free": 3e9}))
    with pytest.raises(UserError, match=r"8\.7 GB of disk are needed, 3\.0 GB are free"):
        random_weights.write(tmp_path, "no", "ViT-H-14")
    assert not list(tmp_path.iterdir())


def test_other_models_on_the_hub_are_refused(tmp_path):
    config = configure("sdv1.4", "--config.pretrained.model=stabilityai/stable-diffusion-2-1")
    with pytest.raises(UserError, match="give a local pipeline folder"):
        random_weights.provide(config, tmp_path, quick=True)


def check_report(result):
    assert set(result["phases"]) == {"sampling", "training", "scoring"}
    for phase in result["phases"].values():
        assert phase["per_s"] > 0
        assert 0 < phase["matmul_share"] <= 1
    assert result["unet_parameters"] == random_weights.parameter_count(diffusion.build_unet(64))
    assert all(seconds > 0 for seconds in result["startup_s"].values())
    assert set(result["startup_s"]) == {"sample", "select", "train"}
    assert all(row["prediction_error"] < 1e-4 for row in result["first_pass"]["by_step"])
    assert not pathlib.Path("log/bench_startup.log").exists()


def test_a_report_of_the_shapes_world(elsewhere, monkeypatch, capsys):
    """main as the command calls it, with little time, and the three scripts in this process."""

    def script(command, **_):
        step = {"run_sample.py": sample, "run_select.py": select, "run_train.py": train}[command[1]]
        step.main(parse(command[1:])[0])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(rates, "SECONDS", 0.2)
    monkeypatch.setattr(meter, "matmul_rate", lambda dtype, budget: 1e15)
    monkeypatch.setattr(rates.subprocess, "run", script)
    flags = ["--config", "config/stage_process.py:shapes"]
    rates.main(parse(["", *flags])[0], flags, str(elsewhere / "out"), quick=True)
    assert capsys.readouterr().out.endswith((elsewhere / "out/bench.txt").read_text())
    check_report(json.loads((elsewhere / "out/bench.json").read_text()))


@pytest.mark.slow
def test_bench_as_a_user_runs_it(tmp_path):
    done = subprocess.run([sys.executable, *CPU, "--out", str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "bench.txt").read_text()
    check_report(json.loads((tmp_path / "bench.json").read_text()))


@pytest.mark.parametrize("preset", ["shapes", "shapes_flow", "shapes_dfusion", "sdv1.4", "dfusion_sd2.1"])
def test_every_presets_start_up_can_be_timed(preset):
    assert configure(preset, *rates.MINIMAL).sample.groups == 1


def test_a_device_that_is_not_there_is_one_line():
    done = subprocess.run([sys.executable, "-m", "b2diffurl.bench", "--device", "cuda"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["bench: --device cuda: PyTorch sees no CUDA device here"]


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_dry_runs_disk_is_that_of_a_stage(tmp_path, decay):
    config = small_run(tmp_path, f"--config.train.ema_decay={decay}")
    loop.run_stage(config)
    stage = tmp_path / "t/stage0"
    parameters = load_file(stage / "checkpoints/checkpoint_1/pytorch_lora_weights.safetensors").values()
    latent = load_file(stage / "samples.safetensors")["states"][0]
    disk = dry_run.stored(config, 9, rates.sizes(config, latent, Image.open(stage / "images/00000.png")), parameters)
    found = {
        name: sum(path.stat().st_size for path in (stage / "checkpoints").glob(pattern))
        for name, pattern in (("", "checkpoint_1/**/pytorch_*"), ("optimiser", "**/optimizer.*"))
    }
    found["optimiser"] += sum(path.stat().st_size for path in (stage / "checkpoints").glob("checkpoint_0/**/pytorch_*"))
    found["images"] = sum(path.stat().st_size for path in (stage / "images").iterdir())
    found["trajectories"] = (stage / "samples.safetensors").stat().st_size
    for name in found:
        assert found[name] == pytest.approx(disk[name], rel=0.35)  # the files have heads, the interval grows


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(monkeypatch, capsys, tmp_path):
    """The counts are the settings'; the time is the images and transitions at the rates that were measured."""
    monkeypatch.setattr(dry_run, "BUDGET", 0.05)
    monkeypatch.setattr(rates, "measure_scoring", lambda *_: {"per_s": 10.0, "peak_bytes": None})
    flags = ("schedule.stage_count=3", "sample.groups=4", "sample.branches=3", "sample.num_steps=4", "schedule.left=2",
             "schedule.right=3", "evaluate.images_per_prompt=2", f"save_path={tmp_path}/out")  # fmt: skip
    config = parse(["x", "--config", "config/stage_process.py:shapes", *(f"--config.{flag}" for flag in flags)])[0]
    dry_run.main(config)
    said = capsys.readouterr().out
    assert "stages     3 of 12 images; 36 reward queries in all" in said
    assert "evaluation 120 images" in said
    assert "updates    at most 2 per stage, of 32 samples; that is few" in said  # 8 samples, two epochs
    assert "select 1 s" in said
    assert not list(tmp_path.iterdir())
    config.keep.images, config.keep.trajectories, config.keep.optimiser = 1, 0, 2
    disk = {"images": 1, "trajectories": 10, "optimiser": 100, "": 1000}
    assert dry_run.at_once(config, disk) == 2 + 30 + 300 + 3000
    for credit, count in (("contrast", 4), ("all", 6)):  # two of three branches, two steps each
        config.select.credit = credit
        assert dry_run.trained(config, stage_plan(config)) == pytest.approx(count)
    assert [metrics.duration(seconds) for seconds in (5, 150, 9000)] == ["5 s", "2 min", "2.5 h"]
    assert [dry_run.size(count) for count in (2**20, 3 * 2**30)] == ["1 MiB", "3.0 GiB"]
