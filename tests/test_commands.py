"""Every command of README and docs: run here at small size, as it is written there, or named with why it is not."""

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest
from test_docs import TEXT

SMALL = (
    "--config.sample.groups=3 --config.sample.branches=4 --config.schedule.stage_count=1 --config.schedule.left=3 "
    "--config.schedule.right=3 --config.schedule.untrained=1 --config.sample.num_steps=5 "
    "--config.train.trajectories_per_update=2 --config.evaluate.images_per_prompt=2"
)
SHORT = "--config.sample.num_steps=3 --config.schedule.left=2 --config.schedule.right=2 --config.schedule.untrained=1"
RUN, LAST = "bash run_process.sh", "model/lora/shapes_b2/stage0/checkpoints/checkpoint_1"
STARTS = re.compile(r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*(?:bash|python|b2diffurl|pip) ")

HERE = [  # in this order: (command, {what is put in for what}, what is added)
    (RUN, {}, SMALL),
    (f"{RUN} --dry-run", {}, SMALL),
    (f"PRESET=shapes {RUN}", {}, SMALL),  # complete already
    (f"PYTHON=/path/to/python {RUN}", {"/path/to/python": sys.executable}, SMALL),
    ("b2diffurl process", {"b2diffurl": "python -m b2diffurl"}, SMALL),
    (
        f"{RUN} --config.prompts.train=mine.json --config.prompts.test=mine_test.json --config.exp_name=mine",
        {}, SMALL,
    ),
    (f"{RUN} --config.sample.groups=24 --config.exp_name=mine", {"=24": "=2", "=mine": "=few"}, SMALL.replace(
        "--config.sample.groups=3 ", "")),
    (f"{RUN} --config.reward.name=mine:score --config.exp_name=red", {}, SMALL),
    (f"{RUN} --config.seed=S --config.exp_name=shapes_seedS", {"=S ": "=2 ", "shapes_seedS": "second"}, SMALL),
    ("python docs/reward_server.py 8000", {}, ""),
    (f"{RUN} --config.reward.name=http://localhost:8000/score --config.exp_name=bright", {}, SMALL),
    (
        'LAUNCH="torchrun --standalone --nproc_per_node 2" PRESET=shapes bash run_process.sh',
        {}, f"{SMALL} --config.exp_name=two",
    ),
    (f"PRESET=shapes_lean {RUN}", {}, SMALL),
    (f"PRESET=shapes_dfusion {RUN}", {}, f"{SMALL} --config.schedule.left=5 --config.schedule.right=5"),
    (f"PRESET=shapes_flow {RUN}", {}, SMALL),
    (f"PRESET=shapes_flow {RUN} --config.seed=S", {"=S": "=300"}, SMALL),
    ("python run_sample.py", {}, f"--config config/stage_process.py:shapes --config.exp_name=alone {SMALL}"),
    ("b2diffurl evaluate", {"b2diffurl": "python -m b2diffurl"},
     f"--config config/stage_process.py:shapes --checkpoint {LAST} --out out/evaluated --images_per_prompt 2"),
    (
        "python -m b2diffurl.evaluate --config config/stage_process.py:PRESET --checkpoint model/lora/NAME/stage99/"
        "checkpoints/checkpoint_1 --out DIR [--prompts FILE] [--images_per_prompt 24] [--batch_size N]",
        {"PRESET": "shapes", "NAME/stage99": "shapes_b2/stage0", "DIR": "out/other", "[": "", "]": "", "N": "8",
         "FILE": "mine.json", "24": "2"}, "",
    ),
    ("python -m b2diffurl.report model/lora/NAME", {"NAME": "shapes_b2"}, ""),
    ("python -m b2diffurl.report model/lora/ONE model/lora/OTHER --out compare.html",
     {"ONE": "shapes_b2", "OTHER": "mine"}, ""),
    ("python -m b2diffurl.report model/lora/shapes_b2 model/lora/second --out compare.html", {}, ""),
    ("python -m b2diffurl.report.fused model/lora/NAME/stage0 --out FILE",
     {"NAME": "shapes_dfusion", "FILE": "out/fused.png"}, ""),
    ("python -m b2diffurl.export model/lora/shapes_b2/stage11/checkpoints/checkpoint_1 --format kohya --card "
     "--out out/mine.safetensors", {"stage11": "stage0", "out/": "out/card/"}, ""),
    (
        "python -m b2diffurl.export model/lora/NAME/stage99/checkpoints/checkpoint_1 --format kohya --card "
        "--out out/mine.safetensors", {"NAME/stage99": "shapes_b2/stage0"}, "",
    ),
    ("python -m b2diffurl.when_decided --config config/stage_process.py:shapes --config.sample.groups=96 --out DIR",
     {"DIR": "out/when", "=96": "=2"}, SHORT),
    (
        "python -m b2diffurl.when_decided --config config/stage_process.py:shapes_flow --config.sample.groups=40 "
        "--out DIR", {"DIR": "out/when_flow", "=40": "=2"}, SHORT,
    ),
    (
        "python -m b2diffurl.gradient_signal --config config/stage_process.py:shapes --config.stage=0 "
        "--config.sample.groups=160 --config.seed=77 --out DIR",
        {"DIR": "out/signal", "=160": "=3", "=77": "=300"}, SMALL,
    ),
    ("python -m b2diffurl.bench.memory --config config/stage_process.py:PRESET", {"PRESET": "sdv1.4"}, ""),
    ("python -m b2diffurl.bench [--preset NAME] [--device cpu|cuda] [--out DIR] [--quick]",
     {"NAME": "shapes", "cpu|cuda": "cpu", "DIR": "out/bench", "[": "", "]": ""}, ""),
]  # fmt: skip

CONVERSION = re.compile(r'python -c "import torch, safetensors.* \'model/rewards/\w+\.safetensors\'\)"')  # DOWNLOAD
HOURS = "takes hours; small in test_study.py, test_benchmark.py and test_screen.py"
GPU, DOWNLOAD = "needs a GPU", "needs a download"
ELSEWHERE = {
    f"PRESET=sdv1.4 {RUN}": GPU,
    f"PRESET=sdv1.4 {RUN} --config.pretrained.model=/models/sd14": GPU,
    f"PRESET=sdv1.4 {RUN} --config.prompts.train=mine.json --config.prompts.test=mine_test.json "
    "--config.reward.name=mine:score --config.schedule.stage_count=20 --config.sample.groups=64 "
    "--config.train.trajectories_per_update=32 --config.exp_name=mine": GPU,
    f'LAUNCH="accelerate launch --config_file config/accelerate/one_machine.yaml" {RUN}': GPU,
    f'LAUNCH="accelerate launch --config_file config/accelerate/one_machine.yaml" PRESET=flux {RUN} '
    "--config.sharded=True": GPU,
    "python -m b2diffurl.bench --gpu-check --out DIR": f"{GPU}; on the CPU in test_gpu_check.py",
    "python -m b2diffurl.bench.rehearsal --out model/rehearsal": "in test_rehearsal.py, smaller",
    "python -m b2diffurl.shapes.build": "in test_shapes.py, smaller",
    "python -m b2diffurl.shapes.flow": "in test_shapes_flow.py, smaller",
    "python -m b2diffurl.gradient_signal": "without its settings; whole in another command",
    "bash tests/run.sh": "runs this file",
    "bash tests/run.sh --slow": "runs this file",
    "pip install -e .": DOWNLOAD,
    "pip install tensorboard": DOWNLOAD,
    "pip install trackio": DOWNLOAD,
    "mkdir -p model/rewards": DOWNLOAD,
    **dict.fromkeys((
        "python -m b2diffurl.study --out docs/study",
        "python -m b2diffurl.study --search --out docs/study",
        "python -m b2diffurl.study --out docs/study/why --seeds 101 102 103",
        "python -m b2diffurl.study --out docs/study/brakes --seeds 101 102 --set train.learning_rate=4e-3 ADDED "
        "--rows ROW",
        "python -m b2diffurl.study.benchmark",
        "python -m b2diffurl.study.benchmark --arms ddpo b2 b2_half ddpo_half",
        "python -m b2diffurl.study.benchmark --arms b2 b2_half --lists paired --seeds 1 2 3 --out DIR",
        "python -m b2diffurl.study.screen",
        "python -m b2diffurl.study.benchmark --search --tasks attribute --arms ddpo ddpo_contrast ddpo_bpt ddpo_bs b2 "
        "--seeds 201",
        "python -m b2diffurl.study.benchmark --search --tasks left --arms ddpo b2 --seeds 201",
        "python -m b2diffurl.study.benchmark --search --arms b2_lean ddpo_lean",
        "python -m b2diffurl.study.benchmark --design flow",
        "python -m b2diffurl.study.benchmark --design flow --search",
        "python -m b2diffurl.study.benchmark --design dfusion",
        "python -m b2diffurl.study.benchmark --design dfusion --search",
    ), HOURS),
}  # fmt: skip


def commands(text):
    """The commands of a page, each on one line: of its bash blocks, and between backticks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    found = [line.split("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found += [span for span in re.findall(r"`([^`]+)`", rest) if STARTS.match(" ".join(span.split()))]
    return {" ".join(command.split()) for command in found}


def python_blocks(page):
    """The Python code that a page shows."""
    return re.findall(r"```python\n(.*?)```", pathlib.Path(page).read_text(encoding="utf-8"), re.DOTALL)


def test_every_command_of_the_pages_is_here_and_no_other():
    there = set().union(*map(commands, TEXT.values()))
    conversions = {command for command in there if CONVERSION.fullmatch(command)}
    assert len(conversions) == 2  # of weights that are published as pickles: see docs/rewards.md
    there -= conversions
    known = [command for command, _, _ in HERE] + [*ELSEWHERE]
    assert len(known) == len(set(known))
    assert there - set(known) == set(), "not in this file"
    assert set(known) - there == set(), "of no page any more"


@pytest.fixture
def clone(tmp_path):
    """A folder with the repository's files, in which runs are made; the virtual environment is this one."""
    for name in ("b2diffurl", "config", "docs", "prompts", "run_process.sh", *pathlib.Path().glob("run_*.py")):
        (tmp_path / name).symlink_to(pathlib.Path(name).resolve())
    (tmp_path / "model").mkdir()
    for name in ("shapes", "shapes_flow"):
        (tmp_path / "model" / name).symlink_to(pathlib.Path("model", name).resolve())
    (tmp_path / "mine.py").write_text(next(code for code in python_blocks("docs/rewards.md") if "mine.py" in code))
    for name, prompts in (("mine", ["a red circle", "a blue ring"]), ("mine_test", ["a red ring"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(prompts))
    return tmp_path


def listening(port):
    """Whether something answers at the port of this machine."""
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 0.2):
        return True


@pytest.mark.slow
def test_every_command_runs(clone):
    """In the order of HERE, in one folder; the reward server in the background, at a port that is free."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    bin_ = str(pathlib.Path(sys.executable).parent)
    environment = {**os.environ, "PYTHON": sys.executable, "PATH": f"{bin_}:{os.environ['PATH']}"}
    server = None
    try:
        for command, filled, added in HERE:
            for old, new in {**filled, "8000": port}.items():
                command = command.replace(old, new)
            if "reward_server" in command:
                server = subprocess.Popen(command.split(), cwd=clone, env=environment, stderr=subprocess.DEVNULL)
                while not listening(int(port)):
                    assert server.poll() is None
                    time.sleep(0.1)
                continue
            done = subprocess.run(
                f"{command} {added}",
                shell=True,
                cwd=clone,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, f"{command} {added}\n{done.stdout}{done.stderr}"
    finally:
        if server:
            server.kill()
            server.wait()
    (snippet,) = python_blocks("README.md")
    code = snippet.replace("stage11", "stage0")
    subprocess.run([sys.executable, "-c", code], cwd=clone, env=environment, check=True, capture_output=True)
    for name in (
        "red_circle.png",
        "model/lora/mine/report.html",
        "compare.html",
        "out/mine.safetensors",
        "out/card/README.md",
    ):
        assert (clone / name).stat().st_size > 0
