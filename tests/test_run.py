"""The whole loop on the shipped world at small size: files, metrics, kills, empty selections, stock loading."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from b2diffurl import gaussian, losses
from b2diffurl.errors import UserError
from b2diffurl.families import loading, lora, sd
from b2diffurl.models import Models
from b2diffurl.run.command import parse
from b2diffurl.run.folder import Run, prune
from b2diffurl.stages import loop, sample, select, train

SMALL = [
    "--config.sample.groups=3", "--config.sample.branches=3", "--config.schedule.stage_count=2",
    "--config.schedule.left=3", "--config.schedule.right=4", "--config.sample.num_steps=5",
    "--config.reward.batch_size=4", "--config.train.trajectories_per_update=2", "--config.evaluate.images_per_prompt=1",
]  # fmt: skip


def arguments(folder, *more):
    return [
        "--config",
        "config/stage_process.py:shapes",
        f"--config.save_path={folder}",
        "--config.exp_name=t",
        *SMALL,
        *more,
    ]


def configure(folder, *more):
    return parse(["test", *arguments(folder, *more)])[0]


def run_stage(folder, stage, *more):
    loop.run_stage(configure(folder, f"--config.stage={stage}", *more))


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "t" / "metrics.jsonl").read_text().splitlines()]


def final_lora(folder, stage=1):
    return load_file(
        folder / "t" / f"stage{stage}" / "checkpoints" / "checkpoint_1" / "pytorch_lora_weights.safetensors"
    )


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two stages through the driver, as a user runs it."""
    folder = tmp_path_factory.mktemp("runs")
    done = drive(folder, pathlib.Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def drive(folder, where, *more, **options):
    environment = {**os.environ, "PYTHON": sys.executable, "PRESET": "shapes"}
    command = ["bash", "run_process.sh", *arguments(folder, *more)[2:], "--config.exp_name=t"]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=600, **options)


def test_driver_output(finished):
    folder, printed = finished
    assert printed.splitlines()[0] == "preset shapes (PRESET is set)"
    for stage in (0, 1):
        for step in ("sample", "select", "train"):
            assert f"stage {stage} {step}: " in printed
    assert "before" in printed
    assert "after" in printed
    assert str(folder / "t") in printed.splitlines()[-2]
    for name in ("curves.png", "before_after.png", "eval.json", "metrics.jsonl"):
        assert (folder / "t" / name).stat().st_size > 0
    assert not list((folder / "t").rglob("*.tmp"))
    for row in json.loads((folder / "t/eval.json").read_text())["results"]:
        assert len(row["oracle_by_prompt"]) == 15
        assert sum(row["oracle_by_prompt"].values()) / 15 == pytest.approx(row["oracle"])


def test_files_of_a_stage(finished):
    stage = finished[0] / "t" / "stage1"
    rows = json.loads((stage / "samples.json").read_text())
    assert [(r["group"], r["branch"]) for r in rows] == [(g, b) for g in range(3) for b in range(3)]
    assert len({r["seed"] for r in rows}) == 9
    assert sorted(p.name for p in (stage / "images").iterdir()) == [f"{i:05d}.png" for i in range(9)]
    assert all(len({r["prompt"] for r in rows if r["group"] == g}) == 1 for g in range(3))
    stored = load_file(stage / "samples.safetensors")
    assert stored["states"].shape == (3 * (1 + 3 * 4), 4, 8, 8)  # the interval's steps alone, each latent once
    assert stored["step"].tolist() == [1, 2, 3, 4] * 9
    assert torch.equal(stored["before"].unique(), torch.tensor([i for i in range(39) if i % 13 == 0 or (i % 13) % 4]))
    assert stored["after"].tolist() == [i for i in range(39) if i % 13]
    prompts = list(dict.fromkeys(r["prompt"] for r in rows))
    assert stored["prompt"].tolist() == [prompts.index(r["prompt"]) for r in rows for _ in range(4)]
    assert len(stored["cond.encoder_hidden_states"]) == len(prompts)
    scores = json.loads((stage / "scores.json").read_text())
    kept = [i for i, s in enumerate(scores["scores"]) if s["kept"]]
    selected = load_file(stage / "selected.safetensors")
    assert sorted({row // 4 for row in selected["row"].tolist()}) == kept
    assert set(selected) == {"row", "advantage", "sample"}
    of_image = [scores["scores"][row // 4]["normalised"] for row in selected["row"].tolist()]
    assert selected["advantage"].tolist() == pytest.approx(of_image)
    assert len(scores["history"]) == 2


def test_metrics(finished):
    lines = metrics_of(finished[0])
    assert [(r["stage"], r["step"]) for r in lines] == [(s, n) for s in (0, 1) for n in ("sample", "select", "train")]
    for r in lines:
        assert r["time_s"] > 0
        if r["step"] == "sample":
            length = (3, 4)[r["stage"]]
            assert r["perf/unet_evals"] == 2 * 3 * ((5 - length) + 1 + 3 * (length - 1))
            assert r["perf/images_per_s"] > 0
        elif r["step"] == "select":
            assert {"reward/mean", "reward/std", "select/kept", "oracle/alignment"} <= set(r)
        else:
            assert r["policy/ratio_first"] == pytest.approx(1, abs=1e-3)
            assert {"policy/clipfrac", "policy/approx_kl", "train/loss", "train/grad_norm"} <= set(r)


def test_optimiser_continues_over_stages(finished):
    folder, _ = finished
    before = load_file(folder / "t/stage1/checkpoints/checkpoint_0/optimizer.safetensors")
    after = load_file(folder / "t/stage0/checkpoints/checkpoint_1/optimizer.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    updates = [r["train/updates"] for r in metrics_of(folder) if r["step"] == "train"]
    end = load_file(folder / "t/stage1/checkpoints/checkpoint_1/optimizer.safetensors")
    assert {int(v) for k, v in end.items() if k.endswith(".step")} == {sum(updates)}


def test_stock_diffusers_reads_the_lora(finished):
    from diffusers import StableDiffusionPipeline

    folder, _ = finished
    checkpoint = folder / "t/stage1/checkpoints/checkpoint_1"
    pipeline = StableDiffusionPipeline.from_pretrained("model/shapes/pipeline", local_files_only=True)
    x, t, e = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 64)
    with torch.no_grad():
        base = pipeline.unet(x, t, e).sample
        pipeline.load_lora_weights(checkpoint)
        stock = pipeline.unet(x, t, e).sample
        ours = Models(configure(folder)).family.denoiser
        lora.load(ours, checkpoint)
        torch.testing.assert_close(ours(x, t, e).sample, stock)
    assert (stock - base).abs().max() > 1e-5
    with safe_open(checkpoint / "pytorch_lora_weights.safetensors", framework="pt") as stored:
        said = stored.metadata()
    assert (said["base_model"], said["stage"], said["interval"]) == ("model/shapes/pipeline", "1", "1:5 of 5")
    assert len(said["config_sha256"]) == 64


def test_finished_work_is_recognised(finished):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in (folder / "t").glob("stage*/**/*") if p.is_file()}
    done = drive(folder, ".")
    assert done.returncode == 0
    assert done.stdout.count("complete already") == 2
    assert {p: p.stat().st_mtime_ns for p in (folder / "t").glob("stage*/**/*") if p.is_file()} == before
    assert len(metrics_of(folder)) == 6
    for step in (sample, select, train):
        step.main(configure(folder, "--config.stage=1"))
    assert len(metrics_of(folder)) == 6


def test_the_driver_refuses_other_settings_even_for_a_finished_run(finished):
    evaluated = (finished[0] / "t/eval.json").read_bytes()
    done = drive(finished[0], ".", "--config.train.learning_rate=5e-4", "--config.sample.guidance_scale=2.0")
    assert done.returncode == 1
    assert "was started with other settings: config.sample.guidance_scale was 5.0, now 2.0" in done.stderr
    assert "config.train.learning_rate was 0.004, now 0.0005; give a new config.exp_name" in done.stderr
    assert (finished[0] / "t/eval.json").read_bytes() == evaluated


def test_interrupted_anywhere_it_ends_the_same(finished, tmp_path):
    """Cut a finished run back to each point between two steps, with half-written leftovers, and go on."""
    folder, _ = finished
    wanted = final_lora(folder)
    cuts = [["checkpoints"], ["checkpoints", "scores.json"], ["checkpoints", "scores.json", "samples.json", "images"]]
    cuts += [["checkpoints", name] for name in ("samples.safetensors", "selected.safetensors", "images")]  # lost later
    cuts += [["checkpoints/checkpoint_1/pytorch_lora_weights.safetensors"]]
    for number, missing in enumerate(cuts):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(folder, copy)
        for name in missing:
            path = copy / "t/stage1" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (copy / "t/stage1" / "checkpoints.tmp").mkdir()
        (copy / "t/stage1" / "images.tmp").mkdir()
        (copy / "t/stage1" / "images.tmp" / "99999.png").write_bytes(b"half")
        run_stage(copy, 1)
        again = final_lora(copy)
        assert all(torch.equal(again[k], wanted[k]) for k in wanted)
        assert len(metrics_of(copy)) == 6
        assert len(list((copy / "t/stage1/images").iterdir())) == 9


def test_a_stage_that_was_selected_before_forests_is_trained_on_to_the_same_lora(finished, tmp_path):
    """Its files have one latent for what branches share, and the selection as images; its settings have other names."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    wanted, stage = final_lora(tmp_path), tmp_path / "t/stage1"
    shutil.rmtree(stage / "checkpoints")
    stored, rows = load_file(stage / "samples.safetensors"), json.loads((stage / "scores.json").read_text())["scores"]
    states = stored["states"].unflatten(0, (3, 13))
    save_file(
        {
            "start_latents": states[:, 0].clone(), "latents": states[:, 1:].reshape(9, 4, 4, 8, 8),
            "log_probs": stored["log_prob"].view(9, 4), "timesteps": torch.tensor([601, 401, 201, 1]),
            "prompt_embeds": stored["cond.encoder_hidden_states"], "prompt_index": stored["prompt"][::4].clone(),
            "negative_embeds": stored["negative.encoder_hidden_states"],
        },
        stage / "samples.safetensors",
    )  # fmt: skip
    kept = [i for i, row in enumerate(rows) if row["kept"]]
    normalised = torch.tensor([rows[i]["normalised"] for i in kept], dtype=torch.float64)
    save_file({"index": torch.tensor(kept), "normalised": normalised}, stage / "selected.safetensors")
    settings = json.loads((tmp_path / "t/config.json").read_text())
    del settings["schedule.forks"], settings["select.credit"]
    for name, new in (("beta1", "positive_weight"), ("beta2", "negative_weight")):
        settings[f"train.{name}"] = settings.pop(f"train.{new}")
    (tmp_path / "t/config.json").write_text(json.dumps(settings))
    train.main(configure(tmp_path, "--config.stage=1"))
    again = final_lora(tmp_path)
    assert all(torch.equal(again[k], wanted[k]) for k in wanted)


@pytest.mark.slow
def test_killed_and_started_again_it_goes_on(finished, tmp_path):
    wanted = final_lora(finished[0])
    folder = tmp_path / "killed"
    environment = {**os.environ, "PYTHON": sys.executable, "PRESET": "shapes"}
    command = ["bash", "run_process.sh", *arguments(folder)[2:]]
    running = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (folder / "t/stage0/scores.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (folder / "t/stage1").exists()
    done = drive(folder, ".")
    assert done.returncode == 0, done.stderr
    again = final_lora(folder)
    assert all(torch.equal(again[k], wanted[k]) for k in wanted)


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_it_ends_the_same(finished, tmp_path):
    """kill -9 of the whole process group after 1, 2, 3, ... seconds, until the run gets to its end before."""
    environment = {**os.environ, "PYTHON": sys.executable, "PRESET": "shapes"}
    command, kills = ["bash", "run_process.sh", *arguments(tmp_path / "killed")[2:]], 0
    for seconds in itertools.count(1):
        running = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            assert running.wait(seconds) == 0
            break
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            kills += 1
    assert kills > 3
    for path in sorted((finished[0] / "t").rglob("*")):
        if path.suffix in (".safetensors", ".png") and path.parent.name != "t":
            assert (tmp_path / "killed/t" / path.relative_to(finished[0] / "t")).read_bytes() == path.read_bytes()


def test_one_process_loads_every_part_once(finished, tmp_path, monkeypatch):
    loads, original = [], loading.load

    def load(loader, config, part, **options):
        loads.append(part)
        return original(loader, config, part, **options)

    for module in (loading, sd):
        monkeypatch.setattr(module, "load", load)
    states, write = [], loop.page.main
    monkeypatch.setattr(loop.page, "main", lambda folder: states.append(metrics_of(tmp_path)[-1]) or write(folder))
    loop.main(configure(tmp_path))
    assert [(line["stage"], line["step"]) for line in states] == [(0, "train"), (1, "train"), (1, "train")]
    assert sorted(loads) == ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    wanted, again = final_lora(finished[0]), final_lora(tmp_path)
    assert all(torch.equal(again[k], wanted[k]) for k in wanted)


def test_nothing_selected_is_a_valid_outcome(tmp_path, capsys):
    nothing = ["--config.select.pos_threshold=99", "--config.select.neg_threshold=-99"]
    run_stage(tmp_path, 0, *nothing)
    assert "nothing was selected" in capsys.readouterr().out
    (tmp_path / "t" / "config.json").unlink()  # or the other thresholds would be refused
    run_stage(tmp_path, 1)
    first = final_lora(tmp_path, 0)
    assert all(not value.any() for name, value in first.items() if "lora_B" in name or "lora.up" in name)
    assert any(value.any() for name, value in final_lora(tmp_path, 1).items() if "lora_B" in name or "lora.up" in name)


def test_pictures_belong_to_their_own_prompts(finished):
    """Scores follow the file named in each row, whatever order a folder listing has."""
    from PIL import Image

    from b2diffurl.rewards import load_reward

    folder, _ = finished
    stage = folder / "t/stage0"
    rows = json.loads((stage / "scores.json").read_text())["scores"]
    reward = load_reward(configure(folder), torch.device("cpu"))
    for row in rows[::4]:
        alone = reward([Image.open(stage / "images" / row["image"]).convert("RGB")], [row["prompt"]])
        assert alone.item() == pytest.approx(row["reward"], abs=1e-4)


@pytest.mark.parametrize("method", ["ddpo", "ddpo_bpt", "ddpo_bs"])
def test_other_methods_run(tmp_path, method):
    run_stage(tmp_path, 0, f"--config.method={method}")
    stored = load_file(tmp_path / "t/stage0/samples.safetensors")
    branching = method == "ddpo_bs"
    length = 3 if method == "ddpo_bpt" else 4
    assert len(stored["step"]) == 9 * length
    assert len(stored["states"]) == (3 if branching else 9) + 9 * length
    if not branching:
        assert load_file(tmp_path / "t/stage0/selected.safetensors")["row"].tolist() == list(range(9 * length))


@pytest.mark.parametrize("algorithm", ["ddpo_sf", "dpok", "dpo"])
@pytest.mark.parametrize("method", ["b2", "ddpo"])
def test_other_algorithms_run(tmp_path, algorithm, method):
    """Each with branches and a growing interval and without either, two stages, by configuration alone."""
    more = [f"--config.train.algorithm={algorithm}", f"--config.method={method}", "--config.train.lr_schedule=linear"]
    if algorithm == "dpo":  # a pair from every group of this small stage
        more += ["--config.select.pos_threshold=-9", "--config.select.neg_threshold=9"]
    for stage in (0, 1):
        run_stage(tmp_path, stage, *more)
    assert any(value.any() for name, value in final_lora(tmp_path).items() if "lora_B" in name or "lora.up" in name)
    kept = {r["stage"]: r["select/kept"] for r in metrics_of(tmp_path) if r["step"] == "select"}
    for record in [r for r in metrics_of(tmp_path) if r["step"] == "train"]:
        assert record["policy/ratio_first"] == pytest.approx(1, abs=1e-3)
        updates = {"ddpo_sf": 1, "dpok": 2 * -(-kept[record["stage"]] // 2), "dpo": 2 * 3}
        assert record["train/updates"] == updates[algorithm]
        assert ("policy/kl_pretrained" in record) == (algorithm == "dpok")
        assert ("policy/preferred" in record) == (algorithm == "dpo")


def test_a_value_baseline_goes_through_the_stages(tmp_path, monkeypatch):
    more = ["--config.train.algorithm=dpok", "--config.train.value_baseline=True", "--config.method=ddpo"]
    trained, original = [], losses.dpok

    def dpok(log_prob, old_log_prob, advantage, *others):
        trained[-1].update(advantage.tolist())
        return original(log_prob, old_log_prob, advantage, *others)

    monkeypatch.setattr(losses, "dpok", dpok)
    for stage in (0, 1):
        trained.append(set())
        run_stage(tmp_path, stage, *more)
    assert len(trained[0]) <= 9 < len(trained[1])  # of 9 images; what is subtracted from stage 1 on differs by step
    stored = [load_file(tmp_path / f"t/stage{i}/checkpoints/checkpoint_1/value.safetensors") for i in (0, 1)]
    assert stored[1]["layers.0.weight.step"] > stored[0]["layers.0.weight.step"] > 0
    for record in [r for r in metrics_of(tmp_path) if r["step"] == "train"]:
        assert record["train/value_loss"] > 0
        epochs = configure(tmp_path).train.num_epochs
        assert record["perf/unet_evals_base"] * (1 + epochs) == record["perf/unet_evals"]  # once, and trained in each
    config = configure(tmp_path, *more, "--config.keep.optimiser=2")
    config.stage = 2
    prune(Run(config), config)
    there = [(tmp_path / f"t/stage{i}/checkpoints/checkpoint_1/value.safetensors").exists() for i in (0, 1)]
    assert there == [False, True]


@pytest.mark.parametrize("algorithm", ["ddpo_is", "dpo"])
def test_a_tree_goes_through_the_stages(tmp_path, algorithm):
    """In the first stage the interval starts after the first fork, in the second it starts before it."""
    forks = ("--config.schedule.forks=((1, 2), (3, 2))", "--config.sample.branches=4", "--config.schedule.left=2",
             "--config.schedule.right=5", f"--config.train.algorithm={algorithm}")  # fmt: skip
    if algorithm == "dpo":
        forks += ("--config.select.pos_threshold=-9", "--config.select.neg_threshold=9")
    for stage, (first, evaluations) in enumerate(((3, 2 + 2 * 2 + 4), (1, 2 + 2 * 2 + 4))):
        run_stage(tmp_path, stage, *forks)
        stored = load_file(tmp_path / f"t/stage{stage}/samples.safetensors")
        assert stored["step"].min() == first
        lines = {r["step"]: r for r in metrics_of(tmp_path) if r["stage"] == stage}
        assert lines["sample"]["perf/unet_evals"] == 2 * 3 * evaluations
        # a sum magnifies rounding by the latent's 256 dimensions, and a preference shows the worse of two
        assert lines["train"]["policy/ratio_first"] == pytest.approx(1, abs=1e-2)
        assert lines["train"]["train/updates"] > 0
    path = tmp_path / "t/stage1/checkpoints/checkpoint_1/pytorch_lora_weights.safetensors"
    with safe_open(path, framework="pt") as lora_file:
        assert lora_file.metadata()["interval"] == "1:5 of 5"


def test_a_value_baseline_without_a_selection_goes_on(tmp_path):
    run_stage(tmp_path, 0, "--config.train.algorithm=dpok", "--config.train.value_baseline=True",
              "--config.select.pos_threshold=99", "--config.select.neg_threshold=-99")  # fmt: skip
    assert (tmp_path / "t/stage0/checkpoints/checkpoint_1/value.safetensors").is_file()
    assert not load_file(tmp_path / "t/stage0/selected.safetensors")["row"].numel()


@torch.no_grad()
def log_probs_of(stored, loaded):
    """The log-densities (M,) of a stage's stored transitions under the base model."""
    policy = loaded.policy()
    cond = {"encoder_hidden_states": stored["cond.encoder_hidden_states"][stored["prompt"]]}
    before, after = (stored["states"][stored[name]] for name in ("before", "after"))
    return gaussian.log_prob(after, *policy.transition(before, stored["step"], cond))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_runs_on_the_cpu(tmp_path, precision):
    flags = [f"--config.mixed_precision={precision}", "--config.train.log_prob=mean"]
    for stage in (0, 1):
        run_stage(tmp_path, stage, *flags)
    stored = load_file(tmp_path / "t/stage0/samples.safetensors")
    latents = torch.float16 if precision == "fp16" else torch.float32
    assert stored["states"].dtype == latents
    again = log_probs_of(stored, Models(configure(tmp_path, *flags)))
    # of the latents as they are stored; in another batch, but for which they would be closer
    torch.testing.assert_close(stored["log_prob"], again, rtol=0, atol=2e-3 if precision == "bf16" else 1e-4)
    trained = final_lora(tmp_path, 0)
    assert {v.dtype for v in trained.values()} == {torch.float32}
    carried = load_file(tmp_path / "t/stage1/checkpoints/checkpoint_0/pytorch_lora_weights.safetensors")
    assert all(torch.equal(carried[k], trained[k]) for k in trained)  # no rounding on the way through a stage
    for record in [r for r in metrics_of(tmp_path) if r["step"] == "train"]:
        assert record["policy/ratio_first"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[float('nan')] * len(images)", r"config\.reward\.name: 'mine:reward' returned 9 non-finite"),
        ("['good'] * len(images)", r"'mine:reward' returned no numbers"),
        ("[0.1] * len(images)", r"'mine:reward' gave all images of a prompt the same reward"),
        ("[len(p) / 7 for p in prompts]", r"'mine:reward' gave all images of a prompt the same reward"),
        ("[1.0]", r"returned shape \(1,\)"),
    ],
)
def test_bad_reward_is_reported_and_nothing_is_written(tmp_path, monkeypatch, body, message):
    (tmp_path / "mine.py").write_text(f"def reward(images, prompts):\n    return {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    config = configure(tmp_path, "--config.reward.name=mine:reward")
    sample.main(config)
    with pytest.raises(UserError, match=message):
        select.main(config)
    assert not (tmp_path / "t/stage0/scores.json").exists()
    assert not (tmp_path / "t/stage0/selected.safetensors").exists()


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "def reward(images, prompts):\n    return [sum(i.getpixel((0, 0))) for i in images]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run_stage(tmp_path, 0, "--config.reward.name=own:reward")
    scores = json.loads((tmp_path / "t/stage0/scores.json").read_text())["scores"]
    assert all(s["reward"] == int(s["reward"]) for s in scores)


def test_a_later_stage_whose_rewards_are_all_the_same_trains_on_nothing(tmp_path, monkeypatch):
    (tmp_path / "flat.py").write_text(
        "calls = []\n\n\ndef reward(images, prompts):\n    calls.append(1)\n"
        "    return [i.getpixel((0, 0))[0] if len(calls) == 1 else 1.0 for i in images]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for stage in range(2):
        run_stage(tmp_path, stage, "--config.reward.name=flat:reward", "--config.method=ddpo")
    kept = [r["select/kept"] for r in metrics_of(tmp_path) if r["step"] == "select"]
    assert kept == [9, 0]


def test_diversity_compares_images_of_one_prompt_and_different_groups():
    vectors = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)

    own = ["a", "b", "a", "a", "b", "c"]
    pairs = [1 - vectors[i] @ vectors[j] for i in range(6) for j in range(i) if own[i] == own[j]]
    found = select.between_groups(vectors.numpy(), own)
    assert found == pytest.approx(torch.stack(pairs).mean().item())
    assert select.between_groups(vectors[:2].numpy(), ["c", "d"]) is None


def test_parts_of_a_mix_are_logged_by_themselves(tmp_path):
    run_stage(tmp_path, 0, "--config.reward.name=clip + jpeg_compressibility:0.1")
    line = next(r for r in metrics_of(tmp_path) if r["step"] == "select")
    mixed = line["reward/clip"] + 0.1 * line["reward/jpeg_compressibility"]
    assert line["reward/mean"] == pytest.approx(mixed, abs=1e-5)
    assert line["reward/jpeg_compressibility"] < 0 < line["reward/clip"]


def test_steps_out_of_order_say_what_to_run_first(tmp_path):
    with pytest.raises(UserError, match=r"samples\.json is missing: run run_sample\.py"):
        select.main(configure(tmp_path))
    with pytest.raises(UserError, match=r"scores\.json is missing: run run_select\.py"):
        train.main(configure(tmp_path))
    with pytest.raises(UserError, match="stage 0 must be trained first"):
        sample.main(configure(tmp_path, "--config.stage=1"))


def test_another_configuration_in_the_same_run_is_refused(finished):
    folder, _ = finished
    before = sorted(p for p in (folder / "t").rglob("*"))
    with pytest.raises(UserError, match=r"config\.seed was 300, now 7; give a new config\.exp_name"):
        sample.main(configure(folder, "--config.seed=7"))
    sample.main(configure(folder, "--config.sample.batch_size=2"))
    assert sorted(p for p in (folder / "t").rglob("*")) == before


def test_prompts_of_another_world_need_no_other_setting(tmp_path, capsys):
    (tmp_path / "mine.json").write_text('["a cat washing dishes"]')
    sample.main(configure(tmp_path, "--config.prompts.train=mine.json"))
    select.main(configure(tmp_path, "--config.prompts.train=mine.json"))
    assert "oracle" not in capsys.readouterr().out


def test_a_truncated_file_is_one_line(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    shutil.rmtree(copy / "t/stage1/checkpoints")
    for name in ("selected", "samples"):
        path = copy / f"t/stage1/{name}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=rf"{name}\.safetensors is broken"):
            train.main(configure(copy, "--config.stage=1"))
        path.write_bytes(whole)
    assert not (copy / "t/stage1/checkpoints").exists()


def test_the_evaluation_is_repeated_only_for_other_weights(finished, monkeypatch, capsys):
    from b2diffurl.evaluate import before_after

    folder, _ = finished
    monkeypatch.setattr(before_after, "generate", lambda *a: pytest.fail("generated again"))
    last = folder / "t/stage1/checkpoints/checkpoint_1"
    before_after.main(configure(folder), str(last), str(folder / "t"))
    assert "held-out" in capsys.readouterr().out
    with pytest.raises(UserError, match="nowhere"):
        before_after.main(configure(folder), "nowhere", str(folder / "t"))


def test_a_missing_function_is_found_before_the_first_image(tmp_path):
    (tmp_path / "mine.py").write_text("")
    done = drive(tmp_path / "out", tmp_path, "--config.reward.name=mine:typo")
    assert done.returncode != 0
    assert "config.reward.name='mine:typo' does not load" in done.stderr
    assert not (tmp_path / "out").exists()


LOADED = """
import sys
from b2diffurl.families import loading
from b2diffurl.run.command import run_main
import run_{step}

sys.argv[1:] = {arguments!r}
loads, original = [], loading.load

def load(loader, config, part, **options):
    loads.append(part)
    return original(loader, config, part, **options)

loading.load = load
run_main(run_{step}.main)
found = [module for module in {modules!r} if module in sys.modules]
assert not found, found
print(*loads)
"""
USES = {  # step -> (parts that it loads, modules that it must not import)
    "sample": (["scheduler", "text_encoder", "tokenizer", "unet", "vae"], ["open_clip", "matplotlib", "wandb"]),
    "select": ([], ["diffusers", "peft", "matplotlib"]),  # OpenCLIP itself imports timm, and timm wandb
    "train": (["scheduler", "unet"], ["open_clip", "wandb", "b2diffurl.rewards.clip"]),
}


def test_three_processes_a_stage_do_what_one_does_and_each_loads_only_what_it_uses(finished, tmp_path):
    for step, (parts, modules) in USES.items():
        code = LOADED.format(arguments=arguments(tmp_path), modules=modules, step=step)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.splitlines()[-1].split()) == parts
    wanted, again = final_lora(finished[0], 0), final_lora(tmp_path, 0)
    assert all(torch.equal(again[k], wanted[k]) for k in wanted)
    for record in metrics_of(tmp_path):  # a script's time counts from the start of its process
        assert 0 < record["perf/startup_s"] < record["time_s"]


@pytest.mark.parametrize("script", ["run_process.sh", "tests/run.sh"])
def test_a_relative_python_is_one_of_the_callers_folder(script, tmp_path):
    own = tmp_path / "own/python"
    own.parent.mkdir()
    own.write_text('#!/bin/sh\necho "ran $0" >&2\nexit 3\n')
    own.chmod(0o755)
    environment = {**os.environ, "PYTHON": "own/python", "PRESET": "shapes"}
    command = ["bash", str(pathlib.Path(__file__).parent.parent / script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, f"ran {own}\n")
