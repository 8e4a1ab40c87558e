"""The presets hold the paper's numbers, and every bad input is one clear line before any model loads."""

import json
import subprocess
import sys

import pytest

from b2diffurl.errors import UserError
from b2diffurl.plan import stage_interval
from b2diffurl.run.command import parse
from b2diffurl.run.folder import flat
from b2diffurl.run.prompts import read_metadata, read_prompts

PRESET = ["run", "--config", "config/stage_process.py:shapes"]


@pytest.fixture
def paper():
    return parse(["run", "--config", "config/stage_process.py:sdv1.4"])[0]


def test_paper_run_number_for_number(paper):
    assert (paper.exp_name, paper.seed, paper.mixed_precision) == ("exp_B2DiffuRL_b5_p3", 300, "fp16")
    assert dict(paper.schedule) == {
        "kind": "growing",
        "stage_count": 100,
        "plateau": 0,
        "left": 14,
        "right": 20,
        "forks": (),
        "untrained": 0,
    }
    sample = paper.sample
    assert (sample.num_steps, sample.guidance_scale, sample.eta) == (20, 5.0, 1.0)
    assert sample.groups * sample.branches * paper.schedule.stage_count == 128_000
    assert (sample.groups, sample.branches) == (256, 5)
    assert (paper.reward.model, paper.reward.weights) == ("ViT-H-14", "laion2b_s32b_b79k")
    assert dict(paper.select) == {"history": 8, "pos_threshold": 0.5, "neg_threshold": -0.5, "credit": ""}
    train = dict(paper.train)
    for name in (
        "batch_size",
        "gradient_checkpointing",
        "kl_weight",
        "dpo_beta",
        "dpo_clip_range",
        "dpo_reference",
        "value_learning_rate",
        "value_epochs",
    ):
        train.pop(name)  # of speed, and of other algorithms
    assert train == {
        "algorithm": "ddpo_is", "log_prob": "mean", "target_kl": 0.0, "learning_rate": 1e-4, "lr_schedule": "constant",
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-4, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "trajectories_per_update": 128, "accumulate_over": "stage", "num_epochs": 2, "clip_range": 0.1,
        "adv_clip": 5.0, "positive_weight": 1.0, "negative_weight": 1.0,
        "lora_rank": 4, "lora_targets": (), "step_weights": "one", "ema_decay": 0.0, "value_baseline": False,
    }  # fmt: skip


def test_method_sets_the_interval(paper):
    assert stage_interval(paper) == (6, 20)
    paper.method = "ddpo_bs"
    assert stage_interval(paper) == (0, 20)


def test_prompt_lists_of_the_paper():
    train, test = (read_prompts(f"prompts/template1_{part}.json") for part in ("train", "test"))
    assert (len(train), len(test)) == (45, 90)
    assert train[0] == "a cat washing dishes"
    assert train[15] == "a raccoon riding a bike"
    assert train[-1] == "a kangaroo playing chess"
    assert not set(train) & set(test)
    for template, sizes in (("template2", (40, 40)), ("template3", (40, 30))):
        lists = [read_prompts(f"prompts/{template}_{part}.json") for part in ("train", "test")]
        assert tuple(map(len, lists)) == sizes
        assert len({*lists[0], *lists[1]}) == sum(sizes)


BAD = {
    "--config.sample.branches=0": "config.sample.branches=0",
    "--config.sample.groups=-1": "config.sample.groups=-1",
    "--config.schedule.right=21": "config.schedule.right=21",
    "--config.schedule.left=0": "config.schedule.left=0",
    "--config.stage=5000": "config.stage=5000",
    "--config.method=ppo": "config.method='ppo'",
    "--config.mixed_precision=fp8": "config.mixed_precision='fp8'",
    "--config.train.algorithm=sft": "config.train.algorithm='sft'",
    "--config.train.accumulate_over=run": "config.train.accumulate_over='run'",
    "--config.train.log_prob=median": "config.train.log_prob='median'",
    "--config.train.lr_schedule=cosine": "config.train.lr_schedule='cosine'",
    "--config.train.dpo_beta=0": "config.train.dpo_beta=0",
    "--config.train.value_baseline=True": "goes with config.train.algorithm=dpok",
    "--config.train.target_kl=nan": "config.train.target_kl=nan",
    "--config.train.kl_weight=-0.1": "config.train.kl_weight=-0.1",
    "--config.reward.name=beauty": "config.reward.name='beauty'",
    "--config.log_with=comet": "config.log_with='comet'",
    "--config.train.learning_rate=0": "config.train.learning_rate=0",
    "--config.train.learning_rate=nan": "config.train.learning_rate=nan",
    "--config.sample.eta=0": "config.sample.eta=0",
    "--config.exp_name=../escape": "config.exp_name='../escape'",
    "--config.exp_name=mine ": "config.exp_name='mine '",
    "--config.exp_name=a\nb": r"config.exp_name='a\nb'",
    f"--config.exp_name={'a' * 201}": "must be a plain folder name",
    "--config.train.adam_beta1=1": "config.train.adam_beta1=1.0: must be in [0, 1)",
    "--config.train.adam_epsilon=-1": "config.train.adam_epsilon=-1",
    "--config.schedule.kind=zigzag": "config.schedule.kind='zigzag'",
    "--config.schedule.forks=(6, 2)": "must be (step, fan-out) pairs such as ((6, 2), (10, 2), (14, 2))",
    "--config.schedule.forks=((6, 2), (10, 2))": "it has 4 leaves: set config.sample.branches=4",
    "--config.schedule.forks=((6, 5), (6, 1))": "steps must rise within 0..19, and fan-outs be 2 or more",
    "--config.schedule.forks=((20, 5),)": "steps must rise within 0..19",
    "--config.sample.noise_level=1.5": "must be at most 1 with config.sample.sampler=cps",
    "--config.sample.noise_level=0": "config.sample.noise_level=0",
    "--config.schedule.untrained=14": "config.schedule.untrained=14: must be below config.schedule.left=14",
    "--config.select.credit=best": "config.select.credit='best': must be one of '', contrast, group, all",
    "--config.pretrained.model=./nowhere": "config.pretrained.model='./nowhere'",
    "--config.reward.model=local-dir:nowhere": "config.reward.model='nowhere'",
    "--config.prompts.train=nowhere.json": "nowhere.json does not exist",
    "--config.sample.colour=red": "colour",
    f"--config.seed={2**63}": "must fit into 64 bits",
    f"--config.prompts.train={'[' * 100_000}.json": "cannot be read as JSON",
    "--config.reward.name=http://[::1": "must be one of",
    "--config.reward.name=http://": "must be one of",
    "--config.sample.group=3": "no such setting: --config.sample.group=3 (config/stage_process.py",
    "--config.sample.groups=many": "groups",
    "stray": "'stray'",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_settings(argument):
    with pytest.raises(UserError) as caught:
        parse([*PRESET, argument])
    assert BAD[argument] in str(caught.value)
    assert "\n" not in str(caught.value)


PAIRS = {
    ("select.history=0", "sample.prompt_weights=variance"): "config.select.history=0: must be at least 1",
    ("schedule.plateau=2", "sample.prompt_weights=variance"): "config.schedule.plateau=2: must be 0",
    ("sample.branches=1", "select.credit=group"): "config.sample.branches=1: must be at least 2",
    ("sample.branches=1", "train.algorithm=dpo"): "config.sample.branches=1: must be at least 2",
    ("schedule.untrained=17", "method=ddpo_bs", "schedule.right=17"): "must be below config.schedule.right=17",
    ("save_path=~/runs",): "config.save_path='~/runs': must be a path; write $HOME for ~",
}


@pytest.mark.parametrize("settings", PAIRS)
def test_settings_that_do_not_go_together(settings):
    with pytest.raises(UserError) as caught:
        parse([*PRESET, *(f"--config.{setting}" for setting in settings)])
    assert PAIRS[settings] in str(caught.value)


def test_a_constant_interval_has_no_left():
    for settings in (("method=ddpo",), ("schedule.kind=constant",)):
        config = parse([*PRESET, "--config.schedule.right=10", *(f"--config.{setting}" for setting in settings)])[0]
        assert stage_interval(config) == (10, 20)


def test_summed_log_probabilities_need_full_precision():
    assert parse(PRESET)[0].train.log_prob == "sum"
    with pytest.raises(UserError, match=r"config\.train\.log_prob='sum'"):
        parse([*PRESET, "--config.mixed_precision=bf16"])
    with pytest.raises(UserError, match=r"config\.train\.log_prob='sum'.*config\.allow_tf32=False"):
        parse([*PRESET, "--config.allow_tf32=True"])
    parse([*PRESET, "--config.mixed_precision=bf16", "--config.train.log_prob=mean"])


def test_a_tree_needs_branches_and_a_preference_contrasts():
    with pytest.raises(UserError, match=r"config\.method=ddpo has no branches"):
        parse([*PRESET, "--config.schedule.forks=((6, 5),)", "--config.method=ddpo"])
    with pytest.raises(
        UserError, match=r"must be contrast or ranked: config\.train\.algorithm=dpo compares two images"
    ):
        parse([*PRESET, "--config.select.credit=group", "--config.train.algorithm=dpo"])
    parse([*PRESET, "--config.select.credit=contrast", "--config.train.algorithm=dpo"])


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "not json", '["a", 3]', '["a", " "]', '"a"', b"\xff\xfe\x00", "[" * 100_000, r'["half a \ud83d"]'],
    ids=lambda content: str(content)[:20],
)
def test_bad_prompt_files(tmp_path, content):
    path = tmp_path / "prompts.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"prompts\.json") as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


LINES = """{"prompt": "two cats", "count": {"cat": 2}, "from": "a\u2028list"}

{"prompt": "a dog"}
{"prompt": "a dog"}
"""


def test_prompts_in_lines_say_more_and_belong_to_the_run(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(LINES)
    assert read_prompts(path) == ["two cats", "a dog", "a dog"]
    assert read_metadata(path) == {"two cats": {"count": {"cat": 2}, "from": "a\u2028list"}}
    config = parse([*PRESET, f"--config.prompts.train={path}"])[0]
    before = flat(config)["prompts.train_sha256"]
    path.write_text(LINES.replace("2}", "3}"))
    assert flat(config)["prompts.train_sha256"] != before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "has no prompts"),
        ('{"prompt": "a"}\n["a"]', "line 2: must be an object"),
        ('{"text": "a"}', "line 1: must be an object"),
        ('{"prompt": " "}', "line 1: must be an object"),
        ('{"prompt": "a", "n": 1}\n{"prompt": "a", "n": 2}', "line 2: 'a' was there before"),
        ('{"prompt": "a"}\n\n{', "line 3: no JSON"),
        ("[" * 100_000, "line 1: no JSON"),
        (r'{"prompt": "\ud83d"}', ": .* is no text"),
    ],
)
def test_bad_lines(tmp_path, lines, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(lines)
    with pytest.raises(UserError, match=rf"mine\.jsonl.* ?{message}"):
        read_prompts(path)


def test_a_prompt_file_in_the_papers_format_works_as_it_is(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(["ein Hund über dem Mond", 'a <b> & "c"']), encoding="utf-8")
    assert read_prompts(path) == ["ein Hund über dem Mond", 'a <b> & "c"']


@pytest.mark.parametrize("script", ["run_sample.py", "run_select.py", "run_train.py"])
@pytest.mark.parametrize(
    "arguments", [["--config", "config/stage_process.py:nope"], ["--config.nonsense=1"], ["--config=missing.py"]]
)
def test_scripts_exit_with_one_line_and_load_nothing_heavy(script, arguments, tmp_path):
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith(f"{script}: ")
    assert "config/stage_process.py" in done.stderr


def test_configuration_needs_no_torch():
    code = (
        "import sys; from b2diffurl.run.command import parse; "
        f"parse({PRESET!r}); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
