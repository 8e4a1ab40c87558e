"""The study's matrix, its measures of variety, its report, and that it goes on where it was stopped."""

import argparse
import collections
import concurrent.futures
import csv
import itertools
import json
import math
import pathlib
import shutil
import string

import numpy as np
import pytest
import torch
from PIL import Image

from b2diffurl import models
from b2diffurl.errors import UserError
from b2diffurl.run.prompts import read_prompts
from b2diffurl.seeds import further, holm, interval, p_value
from b2diffurl.shapes.scene import render, sample_scenes
from b2diffurl.shapes.variety import open_entropy
from b2diffurl.study import curves, matrix, report, results, runs
from b2diffurl.study.__main__ import assignment

JOB = matrix.Job("ddpo_is", "b2", 101, (("train.learning_rate", 1e-3),))


def drawn(count, seed=0):
    pictures = render(sample_scenes("attribute", count, np.random.default_rng(seed)))
    return [Image.fromarray(p) for p in (pictures.permute(0, 2, 3, 1) * 255).round().byte().numpy()]


def test_matrix_has_the_seeds_that_the_evidence_needs():
    jobs = matrix.matrix("full")
    assert len(jobs) == len(set(jobs)) == 2 * 4 * 5 + 3 * 2 * 3
    for cell in itertools.product(("ddpo_is", "ddpo_is_sum"), matrix.ARMS):
        assert len({job.seed for job in jobs if job[:2] == cell}) == 5
    for algorithm in ("ddpo_sf", "dpok", "dpo"):
        for method in ("ddpo", "b2"):
            assert len({job.seed for job in jobs if job[:2] == (algorithm, method)}) == 3


def test_rows_and_seeds_can_be_chosen(tmp_path):
    chosen = tuple(matrix.CHOSEN["ddpo_is", "b2"].items())
    assert matrix.matrix("full", ["ddpo_is:b2"], [7, 8]) == [matrix.Job("ddpo_is", "b2", s, chosen) for s in (7, 8)]
    assert {job[:3] for job in matrix.matrix("full", ["dpo:b2"])} == {("dpo", "b2", seed) for seed in (101, 102, 103)}
    assert matrix.matrix("full", ["b2"]) == []
    (flow,) = matrix.matrix("full", ["ddpo_is:b2"], [7], world="shapes_flow")
    assert flow == matrix.Job("ddpo_is", "b2", 7, chosen, "shapes_flow")
    assert matrix.configure(flow, tmp_path, "full").pretrained.model == "model/shapes_flow/pipeline"
    assert len(matrix.matrix("quick")) == 4 * 2 + 3


def test_trees_and_credit_are_settings_like_others(tmp_path):
    """Told apart in results.csv by a text that can be split at its commas with a blank."""
    changes = [("schedule.forks", "((6, 2), (10, 2))"), ("sample.branches", "4"), ("select.credit", "group")]
    job = matrix.matrix("quick", ("ddpo_is:b2",), (), changes)[0]
    config = matrix.configure(job, tmp_path, "quick")
    assert (config.schedule.forks, config.select.credit) == (((6, 2), (10, 2)), "group")
    told = dict(own.split(" ", 1) for own in job.key()[2].split(", "))
    assert told["forks"] == "((6,2),(10,2))"
    assert told["credit"] == "group"


def test_all_runs_can_be_given_other_settings_and_are_told_apart_by_them(tmp_path):
    (plain,) = matrix.matrix("full", ["dpok:b2"], [7])
    (job,) = matrix.matrix("full", ["dpok:b2"], [7], [("schedule.left", "18"), ("train.learning_rate", "3e-3")])
    assert job.key() != plain.key()
    assert job.key()[2].startswith("learning_rate 3e-3, ")
    assert job.key()[2].endswith(", left 18")
    config, other = (matrix.configure(j, tmp_path, "full") for j in (job, plain))
    assert (config.schedule.left, config.train.learning_rate, config.method) == (18, 3e-3, "b2")
    assert config.exp_name != other.exp_name
    assert set(config.exp_name) < set(string.ascii_letters + string.digits + "._-")
    assert assignment("schedule.left=18") == ("schedule.left", "18")
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=VALUE"):
        assignment("schedule.left")
    with pytest.raises(argparse.ArgumentTypeError, match="--rows and --seeds"):
        assignment("seed=7")


def test_search_has_the_same_effort_for_every_method_and_nothing_of_the_evidence(tmp_path):
    search, full = matrix.matrix("search"), matrix.matrix("full")
    effort = collections.Counter(job[:2] for job in search)
    for algorithm in matrix.LOSSES:
        assert len({count for cell, count in effort.items() if cell[0] == algorithm}) == 1
    assert {job[:2] for job in search} == {job[:2] for job in full}
    assert not {job.seed for job in search} & {job.seed for job in full}
    searched, evidence = matrix.configure(search[0], tmp_path, "search"), matrix.configure(full[0], tmp_path, "full")
    prompts = [set(read_prompts(c.prompts.train) + read_prompts(c.prompts.test)) for c in (searched, evidence)]
    assert not prompts[0] & prompts[1]


def test_finalists_and_choices_are_what_the_committed_search_says():
    ends = results.final_rows(results.read(pathlib.Path("docs/study/search/results.csv")))
    for cell, settings in matrix.CHOSEN.items():

        def key(settings, cell=cell):
            return matrix.Job(*cell, 201, tuple(settings.items())).key()[:3]

        rewards = {
            key(tried): {seed: results.over_lists(row, "reward") for seed, row in ends[key(tried)].items()}
            for tried in matrix.GRID[cell[0]]
        }
        order = sorted(rewards, key=lambda tried, rewards=rewards: rewards[tried][201], reverse=True)
        finalists = [key(tried) for tried in matrix.FINALISTS[cell]] if cell in matrix.FINALISTS else order[:1]
        assert len(set(finalists)) == len(finalists)
        assert set(finalists) == set(order[: len(finalists)])
        assert all(len(rewards[tried]) > 1 for tried in finalists if cell in matrix.FINALISTS)
        means = {tried: np.mean([*rewards[tried].values()]) for tried in finalists}
        assert key(settings) == max(means, key=means.get)


def test_runs_of_an_algorithm_differ_in_method_seed_and_searched_settings_alone(tmp_path):
    one = matrix.configure(matrix.Job("ddpo_is", "b2", 101, (("train.learning_rate", 5e-4),)), tmp_path, "full")
    other = matrix.configure(matrix.Job("ddpo_is", "ddpo", 102, (("train.learning_rate", 2e-3),)), tmp_path, "full")
    assert (one.train.learning_rate, other.train.learning_rate) == (5e-4, 2e-3)
    other.train.learning_rate = one.train.learning_rate
    flat = [{**c.to_dict(), "exp_name": "", "method": "", "seed": 0} for c in (one, other)]
    assert flat[0] == flat[1]
    assert one.sample.groups * one.sample.branches == 240  # the budget of a stage, whatever the method


def test_the_two_clips_of_ddpo_differ_in_nothing_else(tmp_path):
    mean, summed = (
        matrix.configure(matrix.Job(loss, "b2", 101, JOB.settings), tmp_path, "full").to_dict()
        for loss in ("ddpo_is", "ddpo_is_sum")
    )
    differs = {name for name in mean["train"] if mean["train"][name] != summed["train"][name]}
    assert differs == {"log_prob", "clip_range"}
    assert {**mean, "train": None, "exp_name": ""} == {**summed, "train": None, "exp_name": ""}


def test_every_run_has_the_same_queries_and_is_evaluated_at_the_same_ones(tmp_path):
    for kind, queries, evaluations in (("full", 2880, 3), ("search", 1920, 2), ("quick", 240, 1)):
        for job in matrix.matrix(kind):
            config = matrix.configure(job, tmp_path, kind)
            assert config.schedule.stage_count * config.sample.groups * config.sample.branches == queries
            passed = []
            for stage in range(config.schedule.stage_count):
                config.stage = stage
                if matrix.evaluated(config):
                    passed.append((stage + 1) * config.sample.groups * config.sample.branches)
            assert passed == [queries * (i + 1) // evaluations for i in range(evaluations)]


def test_entropy_is_nought_for_one_picture_and_nearly_all_of_it_for_random_scenes():
    scenes = drawn(600)
    assert open_entropy([scenes[0]] * 50, 50) == 0
    assert 0.85 * 4 * math.log2(3) < open_entropy(scenes, 600) <= 4 * math.log2(3)
    assert open_entropy([Image.new("RGB", (32, 32), "grey")] * 4, 4) == 0
    two_prompts = open_entropy([scenes[0]] * 20 + scenes[:20], 20)
    assert two_prompts == pytest.approx(open_entropy(scenes[:20], 20) / 2)


def test_interval_over_seeds():
    mean, low, high = interval([0.1, 0.2, 0.3, 0.4, 0.5])
    assert mean == pytest.approx(0.3)
    assert (low, high) == (pytest.approx(0.1037, abs=1e-3), pytest.approx(0.4963, abs=1e-3))  # from a table of t
    mean, low, high = interval([0.7])
    assert mean == 0.7
    assert math.isnan(low)
    assert math.isnan(high)


def test_the_mean_is_within_its_interval_19_times_of_20():
    draws = np.random.default_rng(2).normal(5, 2, size=(4000, 5))
    for seeds in (3, 5):
        spans = [interval(values[:seeds]) for values in draws]
        assert np.mean([low <= 5 <= high for _, low, high in spans]) == pytest.approx(0.95, abs=0.012)


def test_a_paired_test_rejects_what_its_interval_leaves_out():
    assert p_value([1.0, 2.0, 4.0]) == pytest.approx(0.1181, abs=1e-4)  # t = 2.646 with 2 degrees
    assert p_value([0.0, 0.0]) == 1
    for values in np.random.default_rng(3).normal(1, 1, size=(200, 5)):
        _, low, high = interval(values)
        assert (p_value(values) < 0.05) == (not low <= 0 <= high)


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_a_further_seed_lands_within_its_interval_19_times_of_20():
    draws = np.random.default_rng(1).normal(5, 2, size=(4000, 6))
    for seeds in (3, 5):
        spans = [further(values[:seeds]) for values in draws]
        inside = np.mean([low <= value <= high for (low, high), value in zip(spans, draws[:, -1], strict=True)])
        assert inside == pytest.approx(0.95, abs=0.012)


def test_differences_on_the_way_are_of_the_same_number_of_queries_and_seed():
    alignment = {("ddpo", 1): (0.5, 0.9), ("ddpo", 2): (0.6, 0.8), ("b2", 1): (0.7, 0.9), ("b2", 2): (0.7, 0.9)}
    rows = [
        {"algorithm": "dpok", "method": method, "settings": "", "seed": seed, "stage": stage,
         "queries": 100 * (stage + 1), "unet_evals": 1000 * (stage + 1),
         **dict.fromkeys(results.FIGURES, 0.1), "oracle_train": both[stage],
         "diversity_train": {"ddpo": 0.1, "b2": 0.4}[method] * both[stage]}
        for (method, seed), both in alignment.items() for stage in (0, 1)
    ]  # fmt: skip
    base = dict.fromkeys(results.FIGURES, 0.0)
    lines = [line for line in report.table(rows, base).splitlines() if "b2 - ddpo | " in line]
    assert lines[0].startswith("| dpok | b2 - ddpo | after 100 queries | 2 | | | +0.150 [-0.485, +0.785] | +0.000")
    assert lines[1].startswith("| dpok | b2 - ddpo | at equal queries | 2 | | | +0.050 [-0.585, +0.685] | +0.000")
    assert lines[3].startswith("| dpok | b2 - ddpo | at equal oracle, train | 2 | | | +0.000 [+0.000, +0.000] |")
    assert "| +0.255 [+0.064, +0.446] |" in lines[3]  # diversity where both first had 0.9 and 0.8
    assert len(lines) == 4
    assert "Of these 6 differences in the oracle's figures" in report.table(rows, base)  # two lists, three comparisons
    for row in rows:  # b2 with another budget: no number of queries is shared
        row["queries"] += 50 * (row["method"] == "b2")
    assert len(report.comparisons(rows, results.final_rows(rows), base, "dpok")) == 3


def test_figures_where_a_run_first_came_as_far():
    """Of a run that rises and falls; where it never came, or where it began, there are none."""
    run = [
        {"algorithm": "dpo", "method": "ddpo", "settings": "", "seed": 1, "stage": i, "queries": i, "unet_evals": i,
         **dict.fromkeys(results.FIGURES, diversity), "oracle_train": oracle}
        for i, (oracle, diversity) in enumerate([(0.7, 0.3), (0.9, 0.2), (0.5, 0.0), (0.8, 0.1)], 1)
    ]  # fmt: skip
    base = {**dict.fromkeys(results.FIGURES, 0.5), "oracle_train": 0.6}
    for where, diversity in ((0.6, 0.5), (0.65, 0.4), (0.8, 0.25), (0.9, 0.2)):
        found = report.figures_at(run, base, run[-1], "oracle_train", where)
        assert found["diversity_train"] == pytest.approx(diversity)
    assert report.figures_at(run, base, run[-1], "oracle_train", 0.55) is None
    assert report.figures_at(run, base, run[-1], "oracle_train", 0.95) is None
    assert report.figures_at(run, base, run[-1], "unet_evals", 2.5)["oracle_train"] == pytest.approx(0.7)


def test_settings_are_ordered_by_their_numbers():
    settings = ["learning_rate 0.016, kl_weight 1", "learning_rate 3e-3, kl_weight 0.1", "learning_rate 3e-3, left 14"]
    assert sorted(settings, key=curves.numbers) == settings[1:] + settings[:1]
    assert curves.numbers("kind constant") == []


@pytest.fixture
def small(monkeypatch, tmp_path):
    for name in ("config", "model", "prompts"):  # runs write log/ below the working directory
        (tmp_path / name).symlink_to(pathlib.Path(name).resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        matrix, "BUDGETS",
        {"quick": {
            "schedule.stage_count": 4, "schedule.left": 2, "schedule.right": 3, "sample.num_steps": 4,
            "sample.groups": 4, "train.trajectories_per_update": 4, "evaluate.images_per_prompt": 4,
        }},
    )  # fmt: skip
    return tmp_path


def test_a_run_goes_on_where_it_was_stopped_and_the_report_holds_it(small, monkeypatch):
    rows = runs.run(JOB, small, "quick")
    assert [row["stage"] for row in rows] == [0, 1, 2, 3]
    assert [row["queries"] for row in rows] == [20, 40, 60, 80]
    assert ["oracle_train" in row for row in rows] == [False, False, False, True]
    assert all(a["unet_evals"] < b["unet_evals"] for a, b in itertools.pairwise(rows))
    folder = small / "runs/ddpo_is_b2_learning_rate_0.001_101"
    assert [path.parent.name for path in folder.glob("stage*/images")] == ["stage3"]  # gigabytes over a whole study
    shutil.rmtree(folder / "stage3")
    again = runs.run(JOB, small, "quick")
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    config = matrix.configure(JOB, small, "quick")
    base = runs.measure(config, None, models.Models(config))
    other = [{**row, "method": "ddpo", "unet_evals": 2 * row["unet_evals"]} for row in rows]
    other[-1]["oracle_train"] = 0.25
    report.write(small, rows + other, base)
    stored = list(csv.DictReader((small / "results.csv").open(encoding="utf-8")))
    assert [(r["method"], r["stage"]) for r in stored] == [(m, str(s)) for m in ("b2", "ddpo") for s in range(4)]
    assert float(stored[3]["oracle_train"]) == pytest.approx(rows[-1]["oracle_train"], abs=1e-6)
    text = (small / "table.md").read_text()
    assert f"| ddpo_is | b2 | learning_rate 0.001 | 1 | 80 | 0.00 M | {rows[-1]['oracle_train']:.3f} |" in text
    ours, halfway = rows[-1]["oracle_train"], (base["oracle_train"] + 0.25) / 2
    assert f"| ddpo_is | b2 - ddpo | at equal queries | 1 | | | {ours - 0.25:+.3f} |" in text
    assert f"| ddpo_is | b2 - ddpo | at equal UNet evaluations | 1 | | | {ours - halfway:+.3f} |" in text
    expected = [{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows + other]
    assert results.read(small / "results.csv") == expected
    assert results.read(small / "nothing.csv") == []
    (small / "curves.png").unlink()
    monkeypatch.setattr(curves, "draw_methods", lambda *_: pytest.fail("for several settings of a method"))
    several = [{**row, "settings": f"learning_rate {rate}"} for row in rows for rate in ("0.016", "3e-3", "0.001")]
    report.write(small, several, base)
    assert "b2 - ddpo" not in (small / "table.md").read_text()
    assert (small / "curves.png").stat().st_size > 10_000


def test_a_run_that_fails_is_told_in_the_table_and_stops_no_other(tmp_path, monkeypatch):
    figures = {**dict.fromkeys(results.COLUMNS[8:], 0.5), "queries": 9, "unet_evals": 9, "seconds": 1.0}

    def run(job, out, kind):
        if job.method == "b2":
            raise UserError("the gradient is not finite")
        named = dict(zip(("algorithm", "method", "settings", "seed"), job.key(), strict=True))
        return [{**named, "stage": stage, **figures} for stage in range(4)]

    for name in ("OMP_NUM_THREADS", "TQDM_DISABLE"):  # main sets them for its workers
        monkeypatch.setenv(name, "1")
    pool = concurrent.futures.ThreadPoolExecutor
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda *_: pool(1))
    monkeypatch.setattr(runs, "run", run)
    (tmp_path / "base.json").write_text(json.dumps(figures))
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        runs.main(tmp_path, "quick", ["dpo:b2", "ddpo_is:ddpo"], [7])
    text = (tmp_path / "table.md").read_text()
    assert "| ddpo_is | ddpo | learning_rate 0.008 | 1 | 9 |" in text
    assert "Failed, and in no mean above: dpo b2 learning_rate 0.008, dpo_beta 1000 7: the gradient is" in text


@pytest.mark.parametrize(("gib", "count"), [(None, 16), (79, 16), (11, 5), (1, 1)])
def test_a_worker_for_every_core_that_the_gpus_memory_has_room_for(gib, count, monkeypatch):
    monkeypatch.setattr(runs.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gib is not None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((gib or 0) * 2**30, 80 * 2**30))
    assert runs.worker_count() == count


def test_rows_and_seeds_that_a_study_has_not_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--rows typo:b2: must be of ddpo_is:ddpo ddpo_is:ddpo_bpt .* dpo:b2"):
        runs.main(tmp_path, "full", ["typo:b2", "dpok:b2"])
    with pytest.raises(UserError, match="--seeds: the search has its own"):
        runs.main(tmp_path, "search", ["dpok:b2"], [999])
    assert not list(tmp_path.iterdir())


def test_labels_of_an_axis_tell_what_differs():
    rates = ["learning_rate 0.004, kl_weight 1", "learning_rate 1.6e-2, kl_weight 0.1"]
    assert curves.axis_labels(rates) == (["0.004, 1", "1.6e-2, 0.1"], "learning_rate, kl_weight")
    assert curves.axis_labels(["kind constant", "kind growing"]) == (["constant", "growing"], "kind")
    brakes = ["learning_rate 4e-3", "learning_rate 4e-3, lr_schedule linear", "learning_rate 4e-3, target_kl 10"]
    assert curves.axis_labels(brakes) == (["learning_rate 4e-3", "lr_schedule linear", "target_kl 10"], "")


@pytest.mark.parametrize("part", ["full", "search", "why/full", "again/full", "brakes/full"])
def test_the_published_table_is_that_of_the_published_rows(part):
    folder = pathlib.Path("docs/study") / part
    made = report.table(results.read(folder / "results.csv"), json.loads((folder / "base.json").read_text()))
    assert made == (folder / "table.md").read_text(encoding="utf-8")
