"""Locks, full disks, foreign files, what is kept: nothing is lost, damaged or done twice."""

import errno
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from b2diffurl import rewards
from b2diffurl.errors import UserError
from b2diffurl.families import lora
from b2diffurl.models import Models
from b2diffurl.run import folder as run_folder
from b2diffurl.run import lock, storage
from b2diffurl.run.command import parse, run_main
from b2diffurl.run.folder import Run, checkpoint_of, flat, require_shared
from b2diffurl.stages import loop, preflight, sample, select, train

SMALL = (
    "sample.groups=3", "sample.branches=3", "schedule.stage_count=4", "schedule.left=2", "schedule.right=3",
    "sample.num_steps=3", "train.trajectories_per_update=2", "evaluate.images_per_prompt=2", "exp_name=t",
    "select.pos_threshold=-9", "select.neg_threshold=9",
)  # fmt: skip


def flags(folder, *more):
    settings = (*SMALL, f"save_path={folder}", *more)
    return ["--config", "config/stage_process.py:shapes", *(f"--config.{s}" for s in settings)]


def configure(folder, *more):
    return parse(["x", *flags(folder, *more)])[0]


def run_stage(folder, stage, *more):
    loop.run_stage(configure(folder, f"stage={stage}", *more))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    run_stage(folder, 0)
    return folder


def command(script, folder, *more):
    done = subprocess.run([sys.executable, script, *flags(folder, *more)], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr.strip().splitlines()


def test_a_second_step_or_driver_is_refused_while_one_works(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import pathlib, sys; from b2diffurl.run import lock\n"
         "lock.hold(pathlib.Path(sys.argv[1])); print(flush=True); sys.stdin.read()", str(tmp_path / "t")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    code, said = command("run_sample.py", tmp_path)
    assert code == 1
    assert said == [
        f"run_sample.py: {tmp_path}/t is in use by another run_process.sh or step; wait for it or give another "
        "config.exp_name"
    ]
    driver = subprocess.run(
        ["bash", "run_process.sh", *flags(tmp_path)[2:]], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHON": sys.executable, "PRESET": "shapes"},
    )  # fmt: skip
    assert driver.returncode == 1
    assert "is in use by another" in driver.stderr.splitlines()[-1]
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [".lock"]
    holder.kill()
    holder.wait()
    lock.hold(tmp_path / "t")  # kill -9 frees it


def test_a_drivers_steps_share_its_lock(tmp_path, monkeypatch):
    descriptor = os.open(tmp_path / ".lock", os.O_CREAT | os.O_RDWR)
    monkeypatch.setenv(lock.INHERITED, str(descriptor))
    for _ in range(2):
        lock.hold(tmp_path)  # the driver's own, so not refused ...
        with pytest.raises(BlockingIOError):  # ... and taken: through any other descriptor it is
            fcntl.flock(os.open(tmp_path / ".lock", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    monkeypatch.setenv(lock.INHERITED, "987")  # a launcher between driver and step closed it: the driver has the lock
    lock.hold(tmp_path)
    monkeypatch.delenv(lock.INHERITED)
    with pytest.raises(UserError, match="is in use"):
        lock.hold(tmp_path)
    monkeypatch.setenv("RANK", "1")  # the first of several processes locks for all
    lock.hold(tmp_path)


def test_a_place_where_no_run_can_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"config\.save_path: .*file/t cannot be made \(Not a directory\)"):
        lock.hold(tmp_path / "file/t")


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock.hold(tmp_path)
    assert "this file system has no locks" in capsys.readouterr().err


def test_what_a_reward_prints_does_not_hide_the_plan(tmp_path):
    (tmp_path / "loud.py").write_text("print('Loading a model')\n\n\ndef reward(images, prompts):\n    return [0]\n")
    done = subprocess.run(
        [sys.executable, "-m", "b2diffurl.stages.preflight", *flags(tmp_path, "reward.name=loud:reward")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{os.getcwd()}:{tmp_path}"},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["Loading a model", f"4 one 0 {tmp_path}/t"]  # the driver reads the last line


def test_the_evaluations_clip_is_asked_for_before_the_run(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(rewards, "load_clip", lambda config, device: asked.append(device))
    for settings, wanted in (
        (["reward.name=jpeg_compressibility"], ["cpu"]), (["reward.name=clip:1 + jpeg_compressibility:0"], []),
        (["reward.model=ViT-H-14"], ["cpu"]),  # to be downloaded; in the miniature world it is here
        (["reward.name=math:sqrt + clip:1"], []),
    ):  # fmt: skip
        asked.clear()
        preflight.main(configure(tmp_path, *settings))
        assert asked == wanted
    with pytest.raises(UserError, match="math has no 'nothing'"):
        preflight.main(configure(tmp_path, "reward.name=math:nothing"))
    loaded = []
    monkeypatch.setattr(rewards, "_load", lambda name, *_: loaded.append(name))
    preflight.main(configure(tmp_path, "reward.name=pickscore + jpeg_compressibility + http://localhost:1/a:1"))
    assert loaded == ["pickscore"]
    capsys.readouterr()


def test_a_gpu_that_pytorch_cannot_use_is_said_before_anything_runs_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script(tmp_path / "nvidia-smi", "echo GPU 0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"nvidia-smi lists a GPU, and PyTorch .* cannot use it: is the driver too old"):
        preflight.require_gpu()
    for visible in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        preflight.require_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    preflight.require_gpu()
    script(tmp_path / "nvidia-smi", "exit 9")  # a driver without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    preflight.require_gpu()


def test_other_words_in_the_prompt_file_are_another_run(begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "prompts.json"
    path.write_text('["a red circle"]')
    config = configure(tmp_path / "new", f"prompts.train={path}")
    Run(config).pin(config)
    Run(config).check(config)
    path.write_text('["a blue circle"]')
    with pytest.raises(UserError, match=r"config\.prompts\.train_sha256 was"):
        Run(config).check(config)


def test_a_picture_that_is_no_png_is_refused(begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    for name in ("scores.json", "selected.safetensors"):
        (tmp_path / "t/stage0" / name).unlink()
    with Image.open(tmp_path / "t/stage0/images/00003.png") as image:
        image.save(tmp_path / "t/stage0/images/00003.png", format="EPS")  # Pillow would start Ghostscript
    with pytest.raises(UserError, match=r"00003\.png cannot be read"):
        select.main(configure(tmp_path))


@pytest.mark.parametrize("step", [sample, select, train])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(begun, tmp_path, monkeypatch, step):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    steps = [sample, select, train]
    for earlier in steps[: steps.index(step)]:
        earlier.main(configure(tmp_path, "stage=1"))
    before = {p: p.read_bytes() for p in (tmp_path / "t").glob("stage*/**/*") if p.is_file()}
    save = save_file

    def full(tensors, path, metadata=None):
        if "stage1" in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr(sys, "argv", ["run_step.py", *flags(tmp_path, "stage=1")])
    with pytest.raises(SystemExit) as stopped:
        run_main(step.main)
    assert "No space left on device" in stopped.value.code
    assert "the same command goes on" in stopped.value.code
    assert "\n" not in stopped.value.code
    assert {p: p.read_bytes() for p in before} == before
    monkeypatch.setattr("safetensors.torch.save_file", save)
    for rest in steps:
        rest.main(configure(tmp_path, "stage=1"))
    assert checkpoint_of(tmp_path / "t/stage1").is_dir()


def test_other_errors_of_the_system_are_not_hidden(monkeypatch, tmp_path):
    def broken(config):
        raise OSError(errno.EIO, "Input/output error", "x")

    monkeypatch.setattr(sys, "argv", ["run_step.py", *flags(tmp_path)])
    with pytest.raises(OSError, match="Input/output error"):
        run_main(broken)


def test_files_of_another_run_are_refused(begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    stage = tmp_path / "t/stage0"
    sample.main(configure(tmp_path / "other", "sample.groups=2"))
    shutil.rmtree(stage / "checkpoints")
    shutil.copy(tmp_path / "other/t/stage0/samples.safetensors", stage)
    with pytest.raises(UserError, match="holds files of another run: delete it"):
        train.main(configure(tmp_path))
    (stage / "scores.json").unlink()
    shutil.copy(tmp_path / "other/t/stage0/samples.json", stage)
    with pytest.raises(UserError, match="holds the samples of another run: delete it"):
        select.main(configure(tmp_path))
    assert not (stage / "scores.json").exists()
    assert not (stage / "checkpoints").exists()


def test_files_of_another_form_are_one_line_before_any_work(begun, tmp_path, monkeypatch):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    sample.main(configure(tmp_path, "stage=1"))
    scores = tmp_path / "t/stage0/scores.json"
    whole = scores.read_text()
    scores.write_text('{"scores": []}')
    with pytest.raises(UserError, match=r"scores\.json is not what run_select\.py writes"):
        select.main(configure(tmp_path, "stage=1"))
    scores.write_text(whole)
    shutil.rmtree(tmp_path / "t/stage0/checkpoints")
    shutil.copy(tmp_path / "t/stage0/samples.safetensors", tmp_path / "t/stage0/selected.safetensors")
    with pytest.raises(UserError, match="holds files of another run"):
        train.main(configure(tmp_path))
    with (tmp_path / "t/metrics.jsonl").open("a") as stream:
        stream.write("{\n")
    monkeypatch.setattr("b2diffurl.stages.train.Models", lambda config: pytest.fail("began to work"))
    with pytest.raises(UserError, match=r"metrics\.jsonl has a line that is no JSON"):
        train.main(configure(tmp_path))


def test_a_foreign_lora_is_one_line(begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    path = checkpoint_of(tmp_path / "t/stage0") / "pytorch_lora_weights.safetensors"
    stored = load_file(path)
    for changed in ({k.replace("attn1", "attn9"): v for k, v in stored.items()}, {k: v[:1] for k, v in stored.items()}):
        save_file({k: v.contiguous() for k, v in changed.items()}, path)
        with pytest.raises(UserError, match="holds no LoRA of this model"):
            lora.load(Models(configure(tmp_path)).family.denoiser, path.parent)


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path):
    metadata = {name: f'{name} of "ünïcode"' for name in "qwertyuiop"}
    written = set()
    for i in range(5):
        storage.write_tensors(tmp_path / f"{i}.safetensors", {"b": torch.ones(3), "a": torch.zeros(2, 2)}, metadata)
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as stored:
        assert stored.metadata() == metadata
        assert stored.get_tensor("b").tolist() == [1, 1, 1]


def test_only_what_config_keep_names_stays_and_the_result_is_the_same(tmp_path):
    for stage in range(3):
        run_stage(tmp_path / "all", stage)
        run_stage(tmp_path / "few", stage, "keep.images=2", "keep.trajectories=1", "keep.optimiser=2")
    few = tmp_path / "few/t"
    assert [(few / f"stage{i}/images").exists() for i in range(3)] == [False, True, True]
    assert [(few / f"stage{i}/samples.safetensors").exists() for i in range(3)] == [False, False, True]
    last = [f"stage{i}/checkpoints/checkpoint_1" for i in range(3)]
    assert [(few / f / "optimizer.safetensors").exists() for f in last] == [False, True, True]
    for folder in last:  # every stage's LoRA, bit for bit
        ours, theirs = (load_file(tmp_path / run / "t" / folder / "pytorch_lora_weights.safetensors")
                        for run in ("few", "all"))  # fmt: skip
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for step in (sample, select, train):  # a stage whose files were given back is still complete
        step.main(configure(tmp_path / "few", "keep.images=2"))
    assert not (few / "stage0/images").exists()


def test_every_file_of_a_run_is_as_the_umask_has_it(tmp_path):
    """safetensors by itself makes files that colleagues on a shared server cannot read."""
    before = os.umask(0o027)
    try:
        run_stage(tmp_path, 0)
        lock.hold(tmp_path / "t")
    finally:
        os.umask(before)
    for path in (tmp_path / "t").rglob("*"):
        assert (oct(path.stat().st_mode & 0o777), path) == (oct(0o750 if path.is_dir() else 0o640), path)


def test_a_folder_that_machines_do_not_share_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SHARED_WITHIN", 0)
    monkeypatch.setattr(run_folder.processes, "size", lambda: 2)
    monkeypatch.setattr(run_folder.processes, "barrier", lambda: None)
    monkeypatch.setattr(run_folder.processes, "first", lambda value: value)
    monkeypatch.setattr(run_folder.processes, "gather", lambda value: [value, ("node2", True)])
    require_shared(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(run_folder.processes, "gather", lambda value: [value, ("node2", False)])
    with pytest.raises(UserError, match=r"is another folder on node2: give a config\.save_path"):
        require_shared(tmp_path)
    assert not list(tmp_path.iterdir())


def script(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def driven(folder, plan, **options):
    """What run_process.sh has a Python run that only says what it is asked, and answers the plan.

    Its run_train.py makes the stage's folder; stage 2 of a run with a plateau is not to be begun.
    """
    body = (
        'case "$*" in *stages.plateau*stage=2*) echo plateau;; *stages.plateau*) ;; *) echo "asked: $*";; esac',
        f'case "$*" in *b2diffurl.stages.preflight*) echo Loading; echo {plan};; esac',
        f'case "$*" in run_train.py*) mkdir -p "{folder}/run/stage${{*##*stage=}}/checkpoints";; esac',
    )
    script(folder / "python", "\n".join(body))
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")}
    del environment["CUDA_VISIBLE_DEVICES"]
    environment |= {"PRESET": "sdv1.4", **options}
    done = subprocess.run(["bash", "run_process.sh", "--x=1"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def complete(stage):
    """What a trained stage has left, as the driver sees it."""
    lora = stage / "checkpoints/checkpoint_1/pytorch_lora_weights.safetensors"
    lora.parent.mkdir(parents=True)
    lora.touch()


@pytest.mark.parametrize("named", ["sample,select,train", "sample,select,fuse,train"])
def test_the_driver_runs_every_step_of_every_stage_in_a_process_of_its_own_where_it_is_asked_to(tmp_path, named):
    complete(tmp_path / "run/stage1")
    (tmp_path / "run/stage2/checkpoints").mkdir(parents=True)  # one that lost its LoRA is run again
    said = driven(tmp_path, f"3 {named} 0 {tmp_path}/run", CUDA_VISIBLE_DEVICES="")
    config = "--config config/stage_process.py:sdv1.4 --x=1"
    steps = [f"asked: run_{step}.py {config} --config.stage=" for step in named.split(",")]
    ran = [line for line in said if "run_" in line]
    assert ran == [f"{step}{stage}" for stage in (0, 2) for step in steps]
    assert "stage 1: complete already" in said
    last = f"{tmp_path}/run/stage2/checkpoints/checkpoint_1"
    assert f"asked: -m b2diffurl.evaluate {config} --checkpoint {last} --out {tmp_path}/run" in said


def test_the_driver_ends_at_a_plateau(tmp_path):
    complete(tmp_path / "run/stage1")
    said = driven(tmp_path, f"9 sample,select,train 1 {tmp_path}/run", CUDA_VISIBLE_DEVICES="")
    assert {line[-1] for line in said if "run_" in line} == {"0"}
    assert "stage 2 is not begun: the reward has not risen over the last 2 stages" in said
    (asked,) = [line for line in said if "evaluate" in line]
    assert f"--checkpoint {tmp_path}/run/stage1/checkpoints/checkpoint_1 " in asked


def test_the_driver_says_how_it_is_used_and_that_it_counts_the_stages(tmp_path):
    for flag, code, said in (("--help", 0, "The main job: "), ("--config.stage=3", 1, "sets config.stage itself")):
        done = subprocess.run(["bash", "run_process.sh", flag], capture_output=True, text=True, timeout=60)
        assert done.returncode == code
        assert said in done.stdout + done.stderr


@pytest.mark.parametrize("spelling", ["machine_rank 1", "machine-rank=1", "node_rank=1", "node-rank 1"])
def test_the_first_of_several_machines_reports(tmp_path, spelling):
    for launch, reports in ((f"{tmp_path}/python --{spelling}", 0), (f"{tmp_path}/python", 1)):
        said = driven(tmp_path, f"1 sample,select,train 0 {tmp_path}/run", LAUNCH=launch, CUDA_VISIBLE_DEVICES="")
        assert len([line for line in said if "-m b2diffurl.run.lock" in line]) == reports


def test_a_slow_list_of_gpus_is_a_list_of_gpus(tmp_path):
    """A reader that left at the first line would end nvidia-smi, and pipefail the branch."""
    script(tmp_path / "nvidia-smi", "for i in 0 1 2; do echo GPU $i; sleep 0.05; done")
    said = driven(tmp_path, f"1 one 0 {tmp_path}/run", PRESET="")
    assert said[0].startswith("preset sdv1.4: CUDA is present")


@pytest.mark.parametrize(("visible", "processes"), [(None, 3), ("0,2", 2), ("1", None)])
def test_the_driver_uses_every_visible_gpu_and_a_free_port(tmp_path, visible, processes):
    """Three GPUs that are not there, and a Python that says what it is asked to run."""
    script(tmp_path / "nvidia-smi", "for i in 0 1 2; do echo GPU $i; done")
    options = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    (ran,) = [
        line for line in driven(tmp_path, f"1 one 0 {tmp_path}/run", **options) if "b2diffurl.stages.loop" in line
    ]
    if processes:
        assert f"launch --multi_gpu --num_machines 1 --main_process_port 0 --num_processes {processes} " in ran
    else:
        assert ran.startswith("asked: -m b2diffurl.stages.loop")


def test_the_settings_of_a_run_are_kept_whole(begun):
    stored = json.loads(pathlib.Path(begun, "t/config.json").read_text())
    assert stored == flat(configure(begun))
    assert set(json.loads(pathlib.Path(begun, "t/versions.json").read_text())) >= {"python", "torch", "diffusers"}


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    writes = {
        "a.json": storage.write_json,
        "b.safetensors": lambda path, n: storage.write_tensors(path, {"x": torch.tensor([n])}, {"n": "m"}),
    }
    for name, write in writes.items():
        write(tmp_path / name, 1)
    before = {name: (tmp_path / name).read_bytes() for name in writes}

    def killed(*_):
        raise OSError(errno.EIO, "killed before it had its name")

    monkeypatch.setattr(storage.os, "replace", killed)
    for name, write in writes.items():
        with pytest.raises(OSError, match="killed"):
            write(tmp_path / name, 2)
        assert (tmp_path / name).read_bytes() == before[name]


def test_shares_are_joined_by_number_and_an_older_trys_are_not(tmp_path, monkeypatch):
    for number in range(14):  # 3 has none now, 12 and 13 are not there any more
        storage.write_tensors(tmp_path / f"share{number}.safetensors", {"x": torch.tensor([number])})
    monkeypatch.setattr(storage.processes, "gather", lambda value: [number != 3 for number in range(12)])
    monkeypatch.setattr(storage.processes, "barrier", lambda: None)
    found = storage.join_shares(tmp_path, {"x": torch.tensor([0])})
    assert found["x"].tolist() == [0, 1, 2, *range(4, 12)]
    assert not list(tmp_path.iterdir())


def test_a_fresh_folder_is_waited_for_before_during_and_after(tmp_path, monkeypatch):
    seen, target, aside = [], tmp_path / "x", tmp_path / "x.tmp"
    monkeypatch.setattr(storage.processes, "barrier", lambda: seen.append((aside.exists(), target.exists())))
    with storage.fresh_folder(target):
        seen.append("work")
    assert seen == [(True, False), "work", (True, False), (False, True)]


@pytest.mark.parametrize(
    "changed",
    [
        "method=ddpo",
        "seed=7",
        "mixed_precision=bf16",
        "pretrained.revision=x",
        "schedule.left=1",
        "schedule.kind=constant",
        "sample.eta=0.5",
        "sample.groups=4",
        "sample.prefix=ode",
        "reward.name=jpeg_compressibility",
        "reward.weights=x",
        "select.history=3",
        "select.neg_threshold=-1",
        "train.algorithm=ddpo_sf",
        "train.num_epochs=3",
        "train.lora_rank=2",
    ],
)
def test_a_setting_that_decides_a_result_is_pinned(changed, tmp_path):
    config = configure(tmp_path, "train.log_prob=mean")
    Run(config).pin(config)
    other = configure(tmp_path, "train.log_prob=mean", changed)
    with pytest.raises(UserError, match=rf"config\.{changed.partition('=')[0]} was"):
        Run(other).check(other)


def test_fp16_decodes_in_bf16_and_checkpointing_is_switched_on(tmp_path):
    config = configure(tmp_path, "mixed_precision=fp16", "train.log_prob=mean", "train.gradient_checkpointing=True")
    loaded = Models(config)
    assert loaded.family.vae.dtype == torch.bfloat16
    assert loaded.trainable()[0].denoiser.is_gradient_checkpointing


def test_an_installation_is_made_once_and_one_that_fails_ends_the_command(tmp_path):
    for name in ("requirements.txt", "requirements.lock"):
        shutil.copy(name, tmp_path)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("PYTHON", None)
    source = pathlib.Path("config/environment.sh").resolve()

    def prepare(pip):
        made = f'mkdir -p .venv/bin; printf "#!/bin/sh\\nexit {pip}\\n" >.venv/bin/python; chmod +x .venv/bin/python'
        script(tmp_path / "python3.11", f'case "$*" in *venv*) {made};; esac')
        asked = ["bash", "-c", f"set -euo pipefail; . {source}; prepare_environment requirements.txt; echo made"]
        return subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    failed = prepare(pip=3)
    assert failed.returncode != 0
    assert "made" not in failed.stdout
    assert not (tmp_path / ".venv/requirements.txt").exists()
    assert prepare(pip=0).stdout.splitlines()[1:] == ["made"]
    assert prepare(pip=3).stdout == "made\n"  # nothing is left to install
