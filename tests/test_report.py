"""report.html of finished and unfinished runs: whole, self-contained, and safe against what prompts contain."""

import html.parser
import json
import re
import shutil

import pytest

from b2diffurl.errors import UserError
from b2diffurl.evaluate import before_after
from b2diffurl.report import __main__ as command
from b2diffurl.report import compare, page
from b2diffurl.run.command import parse
from b2diffurl.run.folder import checkpoint_of, versions
from b2diffurl.run.metrics import read
from b2diffurl.stages import sample, select, train

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run of one stage, evaluation included, on prompts one of which is HTML."""
    folder = tmp_path_factory.mktemp("report")
    for part in ("train", "test"):
        (folder / f"{part}.json").write_text(json.dumps([EVIL, "a red circle"]))
    settings = (
        "sample.groups=5", "sample.branches=3", "sample.num_steps=4", "schedule.left=3", "schedule.right=3",
        "schedule.stage_count=2", "evaluate.images_per_prompt=2", f"prompts.train={folder}/train.json",
        f"prompts.test={folder}/test.json", "exp_name=t", f"save_path={folder}", "select.pos_threshold=-9",
        "select.neg_threshold=9",
    )  # fmt: skip
    config = parse(["x", "--config", "config/stage_process.py:shapes", *(f"--config.{s}" for s in settings)])[0]
    for step in (sample, select, train):
        step.main(config)
    before_after.main(config, str(checkpoint_of(folder / "t/stage0")), folder / "t")
    return folder / "t"


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def written(folder):
    page.main(folder)
    tags = Tags()
    tags.feed((folder / "report.html").read_text())
    return tags


def test_a_prompt_is_text_and_nothing_leaves_the_page(run):
    tags = written(run)
    assert EVIL in tags.text
    for tag, attributes in tags.seen:
        assert tag not in ("script", "iframe", "object", "embed")
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "data:").startswith("data:")
    assert not re.search(r"url\(|@import", (run / "report.html").read_text())


def test_what_the_page_shows_is_what_the_run_holds(run):
    tags = written(run)
    scores = json.loads((run / "stage0/scores.json").read_text())["scores"]
    shown = [row for row in scores if row["group"] < page.GROUPS]
    tiles = [
        attributes["class"].split() for tag, attributes in tags.seen if attributes.get("class", "").startswith("tile")
    ]
    assert len(tiles) == len(shown) == 15
    assert [len(tile) > 1 for tile in tiles] == [row["kept"] for row in shown]
    for first in range(0, 15, 3):
        rewards = [row["reward"] for row in shown[first : first + 3]]
        assert tiles[first + rewards.index(max(rewards))] == ["tile", "best"]
        assert tiles[first + rewards.index(min(rewards))] == ["tile", "worst"]
    for row in shown:
        assert f"{row['reward']:.3f} ({row['normalised']:+.2f})" in tags.text
    titles = [attributes["alt"] for tag, attributes in tags.seen if tag == "img" and "alt" in attributes]
    for title in (
        "Reward",
        "Diversity",
        "Interval",
        "Kept samples",
        "Ratio",
        "Squared log ratio",
        "Gradient norm",
        "Time",
    ):
        assert title in titles
    assert "Oracle alignment" not in titles  # a prompt is not of the oracle's world
    assert "last finished: train of stage 0" in tags.text
    assert "1 of 2" in tags.text
    for name, value in versions().items():
        assert name in tags.text
        assert value in tags.text
    assert "train.clip_range" in tags.text


def test_a_run_that_ended_at_its_plateau_is_complete(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "ended")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"schedule.plateau": 3}))
    records = read(folder / "metrics.jsonl")
    assert page.status(folder, records)[0] == ("state", "complete")
    evaluated = json.loads((folder / "eval.json").read_text())
    evaluated["settings"]["checkpoint"] = "runs/stage9/checkpoints/checkpoint_1"
    (folder / "eval.json").write_text(json.dumps(evaluated))
    assert page.status(folder, records)[0] == ("state", "last finished: train of stage 0")


def test_without_branches_only_best_and_worst_are_marked(run, tmp_path):
    folder = tmp_path / "t"
    shutil.copytree(run, folder)
    stored = json.loads((folder / "stage0/scores.json").read_text())
    for row in stored["scores"]:
        row["kept"] = True
        row["image"] = f"../../../{row['image']}"  # a foreign file cannot reach out of its folder
    (folder / "stage0/scores.json").write_text(json.dumps(stored))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "method": "ddpo"}))
    tags = written(folder)
    tiles = [attributes["class"].split()[1:] for _, attributes in tags.seen if "tile" in attributes.get("class", "")]
    assert tiles.count(["best"]) == tiles.count(["worst"]) == tiles.count([]) == 5
    assert "share the prompt alone" in tags.text


def test_a_run_that_has_just_begun(run, tmp_path):
    folder = tmp_path / "begun"
    (folder / "stage0").mkdir(parents=True)
    with pytest.raises(UserError, match="no run there"):
        page.main(folder)
    first = next(line for line in read(run / "metrics.jsonl") if line["step"] == "sample")
    (folder / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    tags = written(folder)
    assert "last finished: sample of stage 0" in tags.text
    assert "Before and after" not in tags.text
    assert [a["alt"] for tag, a in tags.seen if tag == "img"] == ["Interval", "Time"]


def test_pictures_that_were_deleted_leave_the_rest(run, tmp_path):
    folder = tmp_path / "t"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "stage0/images")
    tags = written(folder)
    assert "Branch groups" not in tags.text
    assert "Before and after" in tags.text


@pytest.fixture(scope="module")
def several(run, tmp_path_factory):
    """The run; another seed of it, with other results; and one of another learning rate, which is not over."""
    folder = tmp_path_factory.mktemp("several")
    made = [folder / name for name in ("first", "<b2>second", "third")]
    for number, path in enumerate(made):
        shutil.copytree(run, path)
        settings = json.loads((path / "config.json").read_text()) | {"exp_name": path.name}
        settings |= [{}, {"seed": 7}, {"train.learning_rate": 0.5}][number]
        (path / "config.json").write_text(json.dumps(settings))
        found = json.loads((path / "eval.json").read_text())
        for row in found["results"]:
            row["reward"] = {"before": 0.1, "after": 0.5 + 0.1 * number}[row["model"]]
        (path / "eval.json").write_text(json.dumps(found))
    (made[2] / "eval.json").unlink()
    (made[2] / "before_after.png").unlink()
    return made


def test_several_runs_on_one_page(several, tmp_path):
    """Nothing is requested, names are text, settings that differ are there and no others, seeds are one row."""
    out = command.main(several, tmp_path / "compare.html")
    tags = Tags()
    tags.feed(out.read_text())
    for tag, attributes in tags.seen:
        assert tag not in ("script", "iframe", "object", "embed", "b2")
        assert attributes.get("src", "data:").startswith("data:")
        assert tag != "img" or attributes["alt"]
    assert "<b2>second" in tags.text
    assert "train.learning_rate" in tags.text
    assert "select.history" not in tags.text
    assert "first, <b2>second (seeds 300, 7)" in tags.text
    assert "0.100 → 0.550 [-0.085, 1.185]" in tags.text  # t with one degree of freedom: 12.706 times 0.05
    images = [attributes["alt"] for tag, attributes in tags.seen if tag == "img"]
    assert len([name for name in images if name.startswith("Reward by")]) == 3
    assert len([name for name in images if name.startswith("pictures of")]) == 2


def test_seeds_without_an_evaluation_are_not_counted(several, tmp_path):
    shutil.copytree(several[0], tmp_path / "fourth")
    settings = json.loads((tmp_path / "fourth/config.json").read_text())
    (tmp_path / "fourth/config.json").write_text(json.dumps(settings | {"seed": 8}))
    (tmp_path / "fourth/eval.json").unlink()
    (row,) = compare.ends([compare._run(path) for path in (*several[:2], tmp_path / "fourth")])["rows"]
    assert row[0].endswith("(seeds 300, 7, 8); 2 of 3 evaluated")
    assert dict(page.status(tmp_path / "fourth", read(tmp_path / "fourth/metrics.jsonl")))["state"].startswith("last")
    settings |= {"schedule.stage_count": 1}
    (tmp_path / "fourth/config.json").write_text(json.dumps(settings))
    state = dict(page.status(tmp_path / "fourth", read(tmp_path / "fourth/metrics.jsonl")))["state"]
    assert state == "trained, and not evaluated"


def test_settings_that_differ_are_named_once():
    assert compare.differences([{"a": 1, "b": [1], "exp_name": "x"}, {"a": 1, "b": [2], "exp_name": "y", "c": 0}]) == [
        ("b", [[1], [2]]), ("c", ["-", 0])
    ]  # fmt: skip


def test_what_a_figure_cost_is_what_was_spent_until_its_images_were_scored():
    records = [
        {"stage": 0, "step": "sample", "time_s": 30, "perf/unet_evals": 10},
        {"stage": 0, "step": "select", "time_s": 6, "reward/mean": 0.2, "reward/queries": 4},
        {"stage": 0, "step": "train", "time_s": 24, "perf/unet_evals": 5},
        {"stage": 1, "step": "sample", "time_s": 30, "perf/unet_evals": 12},
        {"stage": 1, "step": "select", "time_s": 6, "reward/mean": 0.3, "reward/queries": 8},
    ]
    assert compare.path_of(records, "reward/mean") == {
        "reward queries": [(4, 0.2), (8, 0.3)], "UNet evaluations": [(10, 0.2), (27, 0.3)],
        "minutes": [(pytest.approx(0.6), 0.2), (pytest.approx(1.6), 0.3)],
    }  # fmt: skip


def test_a_single_runs_page_goes_where_it_is_asked_to(several, tmp_path):
    before = (several[0] / "report.html").read_bytes() if (several[0] / "report.html").exists() else None
    assert command.main(several[:1], tmp_path / "one.html") == tmp_path / "one.html"
    assert "<html" in (tmp_path / "one.html").read_text()
    assert before == ((several[0] / "report.html").read_bytes() if before else None)


def test_several_runs_need_a_page_and_a_run_must_be_there(several, tmp_path):
    with pytest.raises(UserError, match="give --out"):
        command.main(several, None)
    with pytest.raises(UserError, match="no run there"):
        command.main([several[0], tmp_path], tmp_path / "x.html")
