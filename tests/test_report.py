"""report.html of finished and unfinished runs: whole, self-contained, and safe against what prompts contain."""

import html.parser
import json
import re
import shutil

import pytest

from b2diffurl.errors import UserError
from b2diffurl.evaluate import before_after
from b2diffurl.report import page
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
    for title in ("Reward", "Diversity", "Interval", "Kept samples", "Ratio", "KL", "Gradient norm", "Time"):
        assert title in titles
    assert "Oracle alignment" not in titles  # a prompt is not of the oracle's world
    assert "last finished: train of stage 0" in tags.text
    assert "1 of 2" in tags.text
    for name, value in versions().items():
        assert name in tags.text
        assert value in tags.text
    assert "train.clip_range" in tags.text


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
