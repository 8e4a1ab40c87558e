"""Two processes do what one does but for rounding: the same pictures, the same selection, the same LoRA."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_flux
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from b2diffurl.errors import UserError
from b2diffurl.run import processes
from b2diffurl.run.command import parse
from b2diffurl.run.metrics import read
from b2diffurl.stages import loop

SMALL = (
    "sample.groups=3", "sample.branches=3", "schedule.stage_count=2", "schedule.left=3", "schedule.right=4",
    "sample.num_steps=5", "train.trajectories_per_update=2", "evaluate.images_per_prompt=1", "exp_name=t",
    "select.pos_threshold=-9", "select.neg_threshold=9", "train.batch_size=5",
)  # fmt: skip


def drive(folder, *settings, launch="torchrun --standalone --nproc_per_node 2", paths=()):
    flags = [f"--config.{s}" for s in (*SMALL, f"save_path={folder}", *settings)]
    environment = {
        **os.environ, "PYTHON": sys.executable, "PRESET": "shapes", "LAUNCH": launch, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *map(str, paths)]),
    }  # fmt: skip
    return subprocess.run(
        ["bash", "run_process.sh", *flags], capture_output=True, text=True, timeout=600, env=environment
    )


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_are_everything_once_and_even(monkeypatch, count, size):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    parts = []
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(list(range(count))[processes.share(count)])
    assert [*itertools.chain(*parts)] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_agrees_with_itself():
    tensor = torch.ones(2)
    processes.sum_([tensor])
    assert tensor.tolist() == [1, 1]
    assert processes.agree(lambda: 3) == processes.gather(3) == [3]
    with pytest.raises(UserError, match="mine"):
        processes.agree(lambda: (_ for _ in ()).throw(UserError("mine")))


def test_two_processes_are_one(tmp_path):
    """Five groups on two processes, two and three."""
    few = tmp_path / "few.json"  # of both lists: the evaluation is not what is compared
    few.write_text('["a red circle", "a blue ring", "a green cross", "a yellow square"]')
    settings = (
        f"prompts.train={few}", f"prompts.test={few}",
        "train.algorithm=dpok", "sample.groups=5", "sample.batch_size=4", "train.trajectories_per_update=5",
        "train.log_prob=mean", "train.clip_range=1e-3",  # a sum magnifies rounding
        "train.adam_epsilon=0.01", "train.learning_rate=0.1",  # AdamW's step follows the gradient, not its sign alone
    )  # fmt: skip
    done = drive(tmp_path / "two", *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage 1 train:") == 1  # one process speaks for both
    flags = [f"--config.{setting}" for setting in (*SMALL, f"save_path={tmp_path / 'one'}", *settings)]
    loop.main(parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0])
    one, two = tmp_path / "one/t", tmp_path / "two/t"
    assert not list(two.glob("**/share*.safetensors"))
    for stage, tolerance in (("stage0", 0.02), ("stage1", 0.1)):  # stage 1 starts from LoRAs that rounding set apart
        pictures = sorted(path.name for path in (one / stage / "images").iterdir())
        assert pictures == sorted(path.name for path in (two / stage / "images").iterdir())
        ours, theirs = (
            np.stack([np.asarray(Image.open(run / stage / "images" / name)) for name in pictures]).astype(int)
            for run in (one, two)
        )
        if stage == "stage0":
            assert np.abs(ours - theirs).max() <= 2  # rounding moves some pixels to the next of 256 values
        assert np.abs(ours - theirs).mean() < 0.5  # and so the rewards, the LoRA and the next stage's pictures
        ours, theirs = (load_file(run / stage / "selected.safetensors") for run in (one, two))
        shared = len({*ours["row"].tolist()} & {*theirs["row"].tolist()})
        assert shared >= (1 if stage == "stage0" else 0.7) * len(ours["row"])
        if shared < len(ours["row"]):  # two branches within rounding of each other may change places in stage 1
            continue
        assert torch.equal(ours["row"], theirs["row"])
        assert torch.allclose(ours["advantage"], theirs["advantage"], atol=tolerance)  # by such pixels
        last = "checkpoints/checkpoint_1/pytorch_lora_weights.safetensors"
        ours, theirs = (load_file(run / stage / last) for run in (one, two))
        ups = [name for name in ours if "lora.up" in name or "lora_B" in name]
        moved = torch.cat([theirs[name].flatten() for name in ups])
        off = torch.cat([(ours[name] - theirs[name]).flatten() for name in ups])
        assert off.norm() < tolerance * moved.norm()  # as the advantages
        assert moved.abs().max() > 1e-3
    same = ("policy/clipfrac", "select/kept", "reward/mean", "perf/unet_evals", "train/updates", "train/loss")
    for mine, other in zip(read(one / "metrics.jsonl"), read(two / "metrics.jsonl"), strict=True):
        for key in set(same) & set(mine):
            assert mine[key] == pytest.approx(other[key], rel=0.02, abs=1e-3), key
    mine, other = (json.loads((run / "eval.json").read_text())["results"][0] for run in (one, two))
    for key in ("reward", "reward_interval", "oracle", "diversity"):  # of the base model, scored by both processes
        assert mine.get(key) == pytest.approx(other.get(key), abs=2e-3), key


PARTS = """
import pathlib, sys
import torch
from b2diffurl.errors import UserError
from b2diffurl.models import Models
from b2diffurl.run import processes
from b2diffurl.run.command import parse

sys.stdout = pathlib.Path(__file__).with_suffix(f".{processes.rank()}").open("w")  # lines on one stream mix
config = parse(sys.argv)[0]
cond, gradients, mine = None, {}, 3 - 2 * processes.rank()
for sharded in (False, True):
    config.sharded = sharded
    loaded = Models(config)
    cond = cond or loaded.family.embed(["a red circle"])
    policy, lora = loaded.trainable()
    for name, own in sorted(lora.items()):  # not of the kind that starts at 0, so that all gradients are there
        torch.nn.init.normal_(own, 0, 0.1, generator=torch.Generator().manual_seed(own.numel()))
    with policy.together(backward=True):
        for k in range(mine):
            x = torch.randn(1, *loaded.family.latent_shape, generator=torch.Generator().manual_seed(k))
            mean, _ = policy.transition(x, torch.tensor([k]), cond)
            mean.square().sum().backward()
    gradients[sharded] = [own.grad for own in lora.values()]
    with torch.no_grad(), policy.pretrained(), policy.together():
        for k in range(mine):
            policy.transition(x, torch.tensor([k]), cond)
    try:
        with policy.together(), torch.no_grad():
            if processes.rank():
                raise UserError("mine")
            policy.transition(x, torch.tensor([1]), cond)
    except UserError:
        print("refused")
    frozen = [own for own in policy.denoiser.parameters() if not own.requires_grad]
    held = sum(own.to_local().numel() if sharded else own.numel() for own in frozen)
    print("sharded" if sharded else "whole", processes.rank(), held, sum(own.numel() for own in frozen))
same = all(torch.equal(a, b) for a, b in zip(gradients[False], gradients[True]))
print("gradients", processes.rank(), same, all(bool(own.abs().max() > 0) for own in gradients[True]))
"""
TINY_FLUX = (
    "sample.num_steps=4", "sample.resolution=16", "pretrained.max_sequence_length=8", "schedule.left=2",
    "schedule.right=3", "sample.groups=3", "sample.branches=3", "schedule.stage_count=1", "train.clip_range=9",
    "train.trajectories_per_update=4", "train.batch_size=2", "sample.batch_size=2", "exp_name=t",
    "select.pos_threshold=-9", "select.neg_threshold=9", "evaluate.images_per_prompt=1", "evaluate.num_steps=2",
    "evaluate.lpips=False", "evaluate.inception_score=False", "reward.model=local-dir:model/shapes/clip",
    "reward.weights=", "prompts.train=prompts/shapes_attribute_train.json", "mixed_precision=no",
    "prompts.test=prompts/shapes_attribute_test.json", "train.adam_epsilon=0.01", "train.learning_rate=0.1",
)  # fmt: skip


def script(folder, text, *arguments):
    """Run a Python script on two processes -> the finished process."""
    (folder / "script.py").write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", folder / "script.py",
         *arguments],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def flux_flags(tmp_path_factory):
    pipeline = tiny_flux.write(tmp_path_factory.mktemp("flux"))
    return [f"--config.{setting}" for setting in (*TINY_FLUX, f"pretrained.model={pipeline}")]


@pytest.mark.slow
def test_a_sharded_denoiser_computes_as_the_whole_one(flux_flags, tmp_path):
    """With three calls in one process and one in the other, of which each holds half of the weights."""
    done = script(tmp_path, PARTS, "--config", "config/stage_process.py:flux", *flux_flags)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for rank in "01" for line in (tmp_path / f"script.{rank}").read_text().splitlines()]
    held = {(line[0], line[1]): (int(line[2]), int(line[3])) for line in lines if line[0] in ("whole", "sharded")}
    for rank in "01":
        assert held["whole", rank][0] == held["whole", rank][1] == held["sharded", rank][1]
        assert ["gradients", rank, "True", "True"] in lines
    own = [held["sharded", rank][0] for rank in "01"]
    assert sum(own) == held["whole", "0"][1]
    assert max(own) < 0.6 * sum(own)
    assert lines.count(["refused"]) == 2


@pytest.mark.slow
def test_a_sharded_run_is_the_whole_one(flux_flags, tmp_path):
    """The preset for FLUX under the configuration that is shipped, on two processes of the CPU; one without shards."""
    config = parse(["x", "--config", "config/stage_process.py:flux", *flux_flags, f"--config.save_path={tmp_path}"])[0]
    loop.main(config)
    launch = "accelerate launch --config_file config/accelerate/one_machine.yaml --num_processes 2 --cpu"
    environment = {
        **os.environ, "PYTHON": sys.executable, "PRESET": "flux", "LAUNCH": launch, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    flags = [*flux_flags, f"--config.save_path={tmp_path / 'two'}", "--config.sharded=True"]
    done = subprocess.run(
        ["bash", "run_process.sh", *flags], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "FSDP" not in done.stderr
    last = "t/stage0/checkpoints/checkpoint_1/pytorch_lora_weights.safetensors"
    ours, theirs = load_file(tmp_path / last), load_file(tmp_path / "two" / last)
    moved = torch.cat([ours[name].flatten() for name in ours if "lora_B" in name])
    off = torch.cat([(theirs[name] - ours[name]).flatten() for name in ours if "lora_B" in name])
    assert moved.abs().max() > 1e-3
    assert off.norm() < 0.02 * moved.norm()  # rounding, and pixels that it moves
    assert (tmp_path / "two/t/eval.json").exists()
    with safe_open(tmp_path / "two" / last, "pt") as stored:  # not by the class that FSDP2 makes of it
        assert stored.metadata()["denoiser"] == "FluxTransformer2DModel"


MEASURING = """
import sys, numpy, torch, torchmetrics.image.inception, torchvision
from PIL import Image
from b2diffurl.evaluate.measures import Quality
from b2diffurl.run import processes
from b2diffurl.run.command import parse

class Logits(torch.nn.Module):  # for a network whose weights have to be downloaded
    def __init__(self, **given):
        super().__init__()
    def forward(self, pictures):
        return pictures.float().mean((2, 3))

processes.barrier()  # the group is there
torchmetrics.image.inception.NoTrainInceptionV3, alexnet = Logits, torchvision.models.alexnet
torchvision.models.alexnet = lambda weights: alexnet()
if processes.rank() == 0:
    pixels = numpy.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype="uint8")
    found = Quality(parse(sys.argv)[0], "cpu")([Image.fromarray(own) for own in pixels], 2)
    print(sorted(name for name, value in found.items() if value > 0))
assert processes.gather(processes.rank()) == [0, 1]
"""


@pytest.mark.slow
def test_one_process_measures_pictures_while_the_other_is_elsewhere(tmp_path):
    done = script(tmp_path, MEASURING, "--config", "config/stage_process.py:shapes", "--config.evaluate.lpips=True",
                  "--config.evaluate.inception_score=True")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['inception_score', 'inception_score_std', 'lpips']"


FAILING = """
import atexit
from b2diffurl.run import command, processes

atexit.register(print, "an orderly end")

def main(config):
    processes.barrier()
    if processes.rank():
        {error}
    processes.barrier()

command.run_main(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("error", "said"), [
    ("raise ValueError('a bug of one process')", "ValueError: a bug of one process"),
    ("raise OSError(28, 'No space left on device')", "No space left on device: model/lora"),
])  # fmt: skip
def test_an_error_of_one_process_is_said_and_ends_all(error, said, tmp_path):
    """At once: an orderly end of NCCL's group, whose others wait elsewhere, would take an hour."""
    done = script(tmp_path, FAILING.format(error=error), "--config", "config/stage_process.py:shapes")
    assert done.returncode != 0
    assert said in done.stderr
    assert "an orderly end" not in done.stdout


def alive(process):
    """Whether a process, a folder of /proc, is there and more than an entry that waits for its parent."""
    try:
        return process.joinpath("stat").read_text().split(") ")[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


ORPHAN = """
import subprocess, sys, time
child = "import os, time; from b2diffurl.run import processes; processes.follow_parent();"
child += "print(os.getpid(), flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
time.sleep(60)
"""


def test_a_process_ends_with_its_launcher():
    """A kill of the driver's group does not reach what a launcher put into sessions of its own."""
    launcher = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    child = pathlib.Path("/proc", launcher.stdout.readline().strip())
    if not child.exists():
        pytest.skip("no /proc here")
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


FEW = ("sample.groups=1", "method=ddpo", "schedule.stage_count=1")


@pytest.mark.slow
def test_with_fewer_groups_than_processes_a_reward_that_fails_on_one_ends_all(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n\n\ndef reward(images, prompts):\n"
        "    return [float('nan') if os.environ['RANK'] == '1' else 0.5 + i for i in range(len(images))]\n"
    )
    done = drive(tmp_path / "out", *FEW, "reward.name=mine:reward", paths=[tmp_path])
    assert done.returncode != 0
    assert done.stderr.count("'mine:reward' returned 2 non-finite scores of 2") == 1  # images 1 and 2 are the second's
    assert (tmp_path / "out/t/stage0/samples.json").exists()
    assert not (tmp_path / "out/t/stage0/scores.json").exists()


@pytest.mark.slow
def test_fewer_groups_than_processes_make_a_whole_run(tmp_path):
    done = drive(tmp_path, *FEW, "one_process=False")
    assert done.returncode == 0, done.stderr
    assert [r["select/kept"] for r in read(tmp_path / "t/metrics.jsonl") if r["step"] == "select"] == [3]
    assert (tmp_path / "t/eval.json").exists()
