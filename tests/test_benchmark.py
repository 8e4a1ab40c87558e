"""The benchmark: its jobs and configurations, a small run of it that goes on, and its report's arithmetic."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from b2diffurl.errors import UserError
from b2diffurl.evaluate import before_after
from b2diffurl.models import Models
from b2diffurl.plan import stage_plan
from b2diffurl.run import metrics
from b2diffurl.run.command import parse
from b2diffurl.run.folder import Run, flat
from b2diffurl.run.prompts import read_prompts
from b2diffurl.seeds import interval, iqm, lower_bound, p_value, stratified
from b2diffurl.shapes import ladder
from b2diffurl.study import benchmark, benchmark_measures, benchmark_ratios, benchmark_report, paths, results
from b2diffurl.study.designs import DESIGNS, SPARSE


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_every_job_can_be_configured(tmp_path, design):
    jobs = benchmark.benchmark_jobs(design.tasks, design.arms, design.seeds)
    searched = [task for task in design.tasks if design.tasks[task].search]
    jobs += benchmark.search_jobs(searched, design.grid, design.search_seeds)
    assert len(jobs) == len(set(jobs))
    first = jobs[: len(design.tasks) * len(design.arms)]
    assert not any(job.search for job in first)
    assert {job.seed for job in first} == {design.seeds[0]}
    names, seen = set(), [*first, *(job for job in jobs if job.search and job.seed == design.search_seeds[0])]
    for job in seen:
        config = benchmark.configure(job, tmp_path, design)
        names.add(config.exp_name)
        per_stage = benchmark.queries(config)
        assert config.schedule.stage_count * per_stage == design.less.get(job.arm, design.budget)
        assert design.every % per_stage == 0
        assert getattr(ladder, design.tasks[job.task].success)
        assert ("search" in config.prompts.test) == job.search
    assert len(names) == len(seen)
    assert {arm for pair in (*design.comparisons, *design.second_look) for arm in pair} <= design.arms.keys()
    assert {*dict(design.primary), *design.rivals} <= design.arms.keys()
    assert design.grid.keys() <= design.arms.keys()
    same = benchmark.Job(*first[0][:2], design.search_seeds[0])
    assert "search" not in benchmark.configure(same, tmp_path, design).prompts.test


def test_the_protocols_numbers():
    """They were written down before the runs: what changes here changes the protocol."""
    assert (SPARSE.seeds, SPARSE.budget, SPARSE.every) == (tuple(range(501, 511)), 1440, 240)
    assert SPARSE.less == dict.fromkeys(("b2_lean", "ddpo_lean", "b2_half", "ddpo_half"), 720)
    assert SPARSE.shared == {"train.log_prob": "sum", "train.clip_range": 0.2}
    chosen = {
        "ddpo": (8e-3, 64), "ddpo_contrast": (4e-3, 32), "ddpo_bpt": (4e-3, 32), "ddpo_bs": (8e-3, 16), "b2": (4e-3, 16)
    }  # fmt: skip
    for arm, own in chosen.items():
        names = ("train.learning_rate", "train.trajectories_per_update")
        assert tuple(SPARSE.arms[arm][name] for name in names) == own
    assert SPARSE.arms["ddpo_bs"]["schedule.right"] == 17
    assert {name: task.success for name, task in SPARSE.tasks.items()} == {
        "attribute": "right", "dark": "right_dark", "plain": "right_plain", "left": "right_left"
    }  # fmt: skip
    assert (ladder.DARK, ladder.PLAIN, ladder.LEFT) == (0.4, 0.022, 13.5)
    assert (DESIGNS["dfusion"].seeds, DESIGNS["dfusion"].budget) == (tuple(range(401, 411)), 720)
    lean = {
        "select.credit": "all", "sample.groups": 24, "train.num_epochs": 1, "schedule.untrained": 10,
        "train.algorithm": "dpok", "train.kl_weight": 0.1, "train.learning_rate": 4e-3,
        "train.trajectories_per_update": 16,
    }  # fmt: skip
    assert SPARSE.arms["b2_lean"] == {"method": "b2", "schedule.right": 17, **lean}
    assert SPARSE.arms["ddpo_lean"] == {"method": "ddpo", **lean, "train.learning_rate": 8e-3}
    assert SPARSE.rivals == ("b2", "ddpo")
    others = ("ddpo", "ddpo_contrast", "ddpo_bpt", "ddpo_bs")
    assert SPARSE.comparisons == (*(("b2", other) for other in others), ("b2_lean", "ddpo_lean"))
    half = {**lean, "schedule.untrained": 6, "train.negative_weight": 0.5, "evaluate.guidance_scale": 5.0}
    drawn = {"sample.guidance_scale": 3.5}
    assert SPARSE.arms["b2_half"] == {"method": "b2", "schedule.right": 17, **half, **drawn}
    assert SPARSE.arms["ddpo_half"] == {"method": "ddpo", **half, "train.learning_rate": 8e-3, **drawn}
    for arm in ("b2", "ddpo"):
        assert SPARSE.arms[f"{arm}_guided"] == {**SPARSE.arms[arm], **drawn, "evaluate.guidance_scale": 5.0}
    assert SPARSE.second_look == (("b2_half", "ddpo_half"),)
    assert SPARSE.primary == (("b2_lean", 0.95), ("b2_half", 0.975))
    assert SPARSE.search_seeds == (202, 203)
    assert [name for name, task in SPARSE.tasks.items() if task.search == "search"] == ["attribute", "left"]
    changed = [own for own in SPARSE.grid["b2_lean"] if "train.learning_rate" not in own]
    assert changed == [
        {"schedule.untrained": 0}, {"select.credit": "contrast"}, {"select.credit": "group"}, {"sample.groups": 48},
        {"train.num_epochs": 2}, {"schedule.right": 20}, {"train.step_weights": "inverse_gain"},
        {"train.algorithm": "ddpo_is"}, {"train.kl_weight": 0.03},
        {"schedule.untrained": 0, "train.algorithm": "ddpo_is"},
    ]  # fmt: skip
    flow = DESIGNS["flow"]
    assert (flow.preset, flow.seeds, flow.budget) == ("shapes_flow", tuple(range(601, 611)), 1440)
    assert {name: task.success for name, task in flow.tasks.items()} == {
        "attribute": "right", "dark": "right_dark", "plain": "right_plain"
    }  # fmt: skip
    lists = [(task.lists, task.search) for task in flow.tasks.values()]
    assert lists == [("paired_study", "paired_search"), ("paired_study", ""), ("paired_study", "")]
    searched = {"train.learning_rate": 1e-2, "train.trajectories_per_update": 30}
    assert (flow.shared, flow.search_seeds, flow.less) == (searched, (201, 202), {})
    assert flow.comparisons == tuple(("b2", other) for other in ("ddpo", "ddpo_bpt", "ddpo_bs"))
    four = [(rate, count) for rate in (5e-3, 1e-2) for count in (30, 60)]
    assert [*flow.arms] == ["ddpo", "ddpo_bpt", "ddpo_bs", "b2"]
    for arm in flow.arms:
        assert [tuple(own.values()) for own in flow.grid[arm]] == four
    for arm in SPARSE.grid:  # as many settings of rates and updates
        tried = [
            own for own in SPARSE.grid[arm] if own.keys() == {"train.learning_rate", "train.trajectories_per_update"}
        ]
        assert len(tried) == 4


def test_the_preset_is_the_arm(tmp_path):
    preset = parse(["x", "--config", "config/stage_process.py:shapes_lean"])[0]
    assert preset.schedule.stage_count * benchmark.queries(preset) == 1440
    arm = flat(benchmark.configure(benchmark.Job("attribute", "b2_half", 501), tmp_path, SPARSE))
    others = ("exp_name", "save_path", "seed", "schedule.stage_count", "evaluate.images_per_prompt")
    for name, value in flat(preset).items():
        assert name in others or name.startswith(("keep.", "prompts.")) or arm[name] == value, name


def test_other_prompts_for_all_tasks_in_a_folder_of_ones_own(tmp_path):
    design = benchmark.on_lists(SPARSE, "paired")
    for task in SPARSE.tasks:
        job = benchmark.Job(task, "b2", 1)
        ours, theirs = (flat(benchmark.configure(job, tmp_path, own)) for own in (design, SPARSE))
        different = {name for name, value in ours.items() if value != theirs[name] and "sha256" not in name}
        assert different == {"prompts.train", "prompts.test"}
        assert ours["prompts.test"] == "prompts/shapes_paired_test.json"
    with pytest.raises(UserError, match=r"shapes_none_train\.json does not exist"):
        benchmark.configure(job, tmp_path, benchmark.on_lists(SPARSE, "none"))
    for given in (["--lists", "paired"], ["--lists", "paired", "--search", "--out", str(tmp_path)]):
        command = [sys.executable, "-m", "b2diffurl.study.benchmark", *given]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, "--lists: with an --out of your own" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arm", "firsts"),
    [("ddpo", [0] * 6), ("ddpo_bpt", [6, 5, 4, 3, 2, 1]), ("ddpo_bs", [3] * 6), ("b2", [6, 5, 4, 3, 2, 1])],
)
def test_the_flows_intervals_are_the_protocols(arm, firsts, tmp_path):
    config = benchmark.configure(benchmark.Job("dark", arm, 601), tmp_path, DESIGNS["flow"])
    assert config.schedule.stage_count == 6
    assert (config.select.credit, config.train.step_weights) == ("group", "inverse_gain")
    for config.stage, first in enumerate(firsts):
        step = stage_plan(config).transitions.step
        assert (int(min(step)), int(max(step))) == (first, 11)


def test_an_arm_without_its_searched_rate_is_not_run():
    unrated = DESIGNS["flow"]._replace(shared={})
    assert benchmark.unsearched(unrated, ["ddpo", "b2"]) == ["ddpo", "b2"]
    rated = unrated._replace(arms={"b2": {"train.learning_rate": 1e-2}, "ddpo": {}})
    assert benchmark.unsearched(rated, ["ddpo", "b2"]) == ["ddpo"]
    for name in DESIGNS:
        assert benchmark.unsearched(DESIGNS[name], DESIGNS[name].arms) == []


PUBLISHED = [
    (design, path) for design in DESIGNS.values() for path in sorted(pathlib.Path(design.folder).glob("*/results.csv"))
]


@pytest.mark.parametrize(("design", "path"), PUBLISHED, ids=[str(path.parent) for _, path in PUBLISHED])
def test_the_published_table_is_that_of_the_published_rows(design, path):
    base = json.loads(path.with_name("base.json").read_text())
    said = benchmark_report.text(benchmark.stored(path), base, design)
    assert said == path.with_name("table.md").read_text(encoding="utf-8")


def configure(*settings):
    flags = [f"--config.{setting}" for setting in settings]
    return parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0]


def run_here(jobs, run):
    return [(job, run(job)) for job in jobs]


def test_a_small_run_and_its_report(tmp_path, monkeypatch, capsys):
    small = {
        "sample.groups": 2, "sample.branches": 3, "sample.num_steps": 4, "schedule.left": 2, "schedule.right": 3,
        "evaluate.images_per_prompt": 2, "train.trajectories_per_update": 2,
    }  # fmt: skip
    design = SPARSE._replace(arms={"b2": {**SPARSE.arms["b2"], **small}}, budget=12, every=6)
    monkeypatch.setattr(benchmark, "each", run_here)
    monkeypatch.setattr(benchmark.lock, "hold", lambda folder: None)
    jobs = benchmark.benchmark_jobs(["attribute"], ["b2"], [7])
    benchmark.main(tmp_path, jobs, design)
    rows = results.read(tmp_path / "results.csv", benchmark.TEXTS, benchmark.COUNTS)
    assert [(row["stage"], row["queries"]) for row in rows] == [(0, 6), (1, 12)]
    trained = rows[1]["unet_evals"] - rows[0]["unet_evals"]
    assert rows[1]["forwards"] > rows[1]["unet_evals"] > trained > 0
    for part, count in (("train", 9), ("test", 9)):
        by_prompt = [float(text) for text in rows[1][f"by_prompt_{part}"].split()]
        assert len(by_prompt) == count
        assert np.mean(by_prompt) == pytest.approx(rows[1][f"success_{part}"], abs=1e-4)
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert "| attribute | b2 |  | 1 |" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(benchmark, "run", lambda job, out, design: pytest.fail("run again"))
    benchmark.main(tmp_path, jobs, design)
    capsys.readouterr()


def test_a_run_that_fails_counts_with_the_base_model_and_is_named(tmp_path, monkeypatch, capsys):
    figures = {f"{name}_{part}": 0.25 for name in benchmark.FIGURES for part in ("train", "test")}
    figures |= {"by_prompt_train": "0.25", "by_prompt_test": "0.25"}
    jobs = [benchmark.Job(task, arm, seed) for task in ("dark", "left") for arm in ("b2", "b2_lean") for seed in (1, 2)]

    def run(job, out, design):
        if job == jobs[0]:
            raise UserError("the gradient is not finite")
        row = {**dict.fromkeys(benchmark.COUNTS[1:], 100), **job.key(), **figures, "approx_kl": 0.1, "seconds": 1.0}
        return [{**row, "stage": 0, "queries": 240, "success_test": 0.75}]

    def all_of(jobs, run):
        for job in jobs:
            try:
                yield job, run(job)
            except UserError as error:
                yield job, error

    for name, value in (
        ("base_figures", lambda out, jobs, design: {"dark": figures, "left": figures}), ("run", run), ("each", all_of),
    ):  # fmt: skip
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark.lock, "hold", lambda folder: None)
    design = SPARSE._replace(tasks={task: SPARSE.tasks[task] for task in ("dark", "left")})
    with pytest.raises(UserError, match="1 of 8 runs failed: dark b2 1: the gradient"):
        benchmark.main(tmp_path, jobs, design)
    table = (tmp_path / "table.md").read_text()
    assert "Failed: dark b2  1 the gradient is not finite" in table
    assert "| b2_lean at its end - b2 at its | 2 | +0.125 " in table  # (0.75 - 0.25) / 2 at seed 1, 0 at seed 2
    benchmark.main(tmp_path, jobs, design)  # nothing is left
    capsys.readouterr()


def path(*points):
    return tuple(np.array(points, dtype=float).T)


def test_queries_to_a_mark_and_the_area():
    rising = path((0, 0.5), (240, 0.7), (480, 0.9), (720, 0.85))
    assert paths.spent_to(rising, 0.8) == pytest.approx(360)
    assert paths.spent_to(rising, 0.5) == 0
    assert paths.spent_to(rising, 0.95) == math.inf
    assert paths.area(rising) == pytest.approx((0.6 + 0.8 + 0.875) / 3)
    assert np.array(paths.until(rising, 360)).T.tolist() == [[0, 0.5], [240, 0.7], [360, pytest.approx(0.8)]]
    for last in (720, 900):
        assert np.array_equal(paths.until(rising, last), rising)


def rows_of(arm, seed, values):
    return [
        {"task": "dark", "arm": arm, "settings": "", "seed": seed, "stage": i, "queries": 240 * (i + 1),
         "success_test": value, "success_train": value, "diversity_train": 0.1, "forwards": 1e6}
        for i, value in enumerate(values)
    ]  # fmt: skip


def test_arms_are_compared_by_seed_and_corrected(monkeypatch):
    base = {"dark": {"success_test": 0.2, "success_train": 0.2, "diversity_train": 0.1}}
    ends = {"b2": (0.5, 0.6, 0.75), "ddpo": (0.4, 0.55, 0.6)}
    rows = [row for arm, own in ends.items() for seed, end in enumerate(own) for row in rows_of(arm, seed, (0.3, end))]
    (line,) = benchmark_report.differences(benchmark_report.runs_of(rows[::-1]), base, SPARSE)[2:]
    gaps = [(b - d) / 4 for b, d in zip(*ends.values(), strict=True)]  # the last stretch is half of the path
    mean, low, high = interval(gaps)
    said = f"| dark | b2 | ddpo | 3 | {mean:+.3f} [{low:+.3f}, {high:+.3f}] |"
    assert line == f"{said} {min(1, 20 * p_value(gaps)):.2g} | 20 |"  # of 5 x 4
    shorter = [row for row in rows if row["arm"] == "ddpo" or row["stage"] == 0]  # b2 went half as far, and no further
    (line,) = benchmark_report.differences(benchmark_report.runs_of(shorter), base, SPARSE)[2:]
    assert "| +0.000 [+0.000, +0.000] | 1 | 20 |" in line
    monkeypatch.setattr(benchmark_report, "MARKS", (0.55, 0.9))
    table = benchmark_report.table(benchmark_report.runs_of(rows), base)
    to_mark = 240 + 240 * (0.55 - 0.3) / (0.6 - 0.3)  # the middle one of b2's three, of whom one never comes there
    assert f"| {to_mark:.0f} (2 of 3) | - (0 of 3) |" in table[-2]


def test_a_second_look_is_corrected_for_itself():
    base = {"dark": {"success_test": 0.2}}
    ends = {"b2": (0.5, 0.6, 0.75), "ddpo": (0.4, 0.55, 0.6), "b2_half": (0.9, 0.8, 0.9), "ddpo_half": (0.6, 0.6, 0.6)}
    rows = [row for arm, own in ends.items() for seed, end in enumerate(own) for row in rows_of(arm, seed, (end,))]
    runs = benchmark_report.runs_of(rows)
    design = SPARSE._replace(tasks=base)
    first, second = benchmark_report.differences(runs, base, design)[2:]
    gaps = [(a - b) / 2 for a, b in zip(ends["b2_half"], ends["ddpo_half"], strict=True)]
    assert (first[:22], first[-5:]) == ("| dark | b2 | ddpo | 3", "| 5 |")
    assert second.startswith("| dark | b2_half | ddpo_half | 3 |")
    assert second.endswith(f"| {p_value(gaps):.2g} | 1 |")
    assert [line.split(" | ")[0] for line in benchmark_report.pooled(runs, base, design)[2:]] == ["| b2", "| b2_half"]


def test_every_arm_of_the_primary_outcome_has_its_own_confidence():
    base = {"dark": {"success_test": 0.2, "success_train": 0.2, "diversity_train": 0.1}}
    ends = {"b2": (0.5, 0.6), "b2_lean": (0.5, 0.7), "b2_half": (0.5, 0.7)}
    rows = [
        stage_of(arm, seed, (end, 0.7, 0.1), 1e6) for arm, own in ends.items() for seed, end in enumerate(own)
    ]  # fmt: skip
    found = benchmark_report.primary(benchmark_report.runs_of(rows), base, SPARSE._replace(tasks=base))[2:]
    for line, arm, confidence, said in zip(found, ("b2_lean", "b2_half"), (0.95, 0.975), ("95", "97.5"), strict=True):
        assert line.startswith(f"| {arm} at its end - b2 at its |")
        assert f"| {lower_bound([0, 0.1], confidence):+.3f} ({said} %) |" in line
    assert lower_bound([0, 0.1], 0.975) < lower_bound([0, 0.1]) - 0.1


def test_the_second_looks_guidance_is_what_its_rule_chooses():
    folder = pathlib.Path("docs/benchmark")
    rows = [row for part in ("search", "tried") for row in benchmark.stored(folder / part / "results.csv")]
    runs, base = benchmark_report.runs_of(rows), json.loads((folder / "tried/base.json").read_text())
    names = ("learning_rate", "trajectories_per_update")
    tuned = {arm: ", ".join(f"{name} {SPARSE.arms[arm][f'train.{name}']}" for name in names) for arm in SPARSE.rivals}
    gaps, ends = {}, {}
    for guidance in (5.0, 4.0, 3.5):
        mine = {task: runs[task, "b2_half", f"guidance_scale {guidance}"] for task in SPARSE.tasks}
        assert {tuple(own) for own in mine.values()} == {(221, 222, 223, 224)}
        ends[guidance] = np.mean([run[-1]["success_test"] for own in mine.values() for run in own.values()])
        for arm, settings in tuned.items():
            by_task = []
            for task, own in mine.items():
                seeds = (202, 203) if task in ("attribute", "left") else (204, 205, 206)
                pairs = [(run, runs[task, arm, settings][seed]) for run in own.values() for seed in seeds]
                by_task.append(np.mean([paths.diversity_gap(*pair, base[task]) for pair in pairs]))
            gaps.setdefault(guidance, []).append(np.mean(by_task))
    allowed = [guidance for guidance, own in gaps.items() if min(own) >= -0.006]
    assert max(allowed, key=ends.get) == SPARSE.arms["b2_half"]["sample.guidance_scale"]


def test_the_mean_of_the_tasks_is_over_the_seeds_that_have_them_all():
    base = {task: {"success_test": 0.2} for task in ("dark", "left")}
    ends = {"b2": ((0.6, 0.8, 0.9), (0.5, 0.5)), "ddpo": ((0.4, 0.4, 0.4), (0.5, 0.3, 0.3))}  # by task and seed
    rows = [
        {**row, "task": task}
        for arm, of_task in ends.items() for task, own in zip(base, of_task, strict=True)
        for seed, end in enumerate(own) for row in rows_of(arm, seed, (end,))
    ]  # fmt: skip
    flow = DESIGNS["flow"]._replace(tasks=base)
    (line,) = benchmark_report.pooled(benchmark_report.runs_of(rows), base, flow)[2:]
    gaps = [(0.1 + 0.0) / 2, (0.2 + 0.1) / 2]  # of areas: half of the ends'
    mean, low, high = interval(gaps)
    assert line == f"| b2 | ddpo | 2 | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | {p_value(gaps):.2g} |"
    one_task = [row for row in rows if row["task"] == "dark"]
    assert benchmark_report.pooled(benchmark_report.runs_of(one_task), base, flow) == []


def test_the_primary_outcome_is_over_the_seeds_that_have_all_tasks():
    base = {task: {"success_test": 0.2, "success_train": 0.2, "diversity_train": 0.1} for task in ("dark", "left")}
    ends = {"b2_lean": ((0.5, 0.7, 0.9), (0.4, 0.5)), "b2": ((0.6, 0.6, 0.1), (0.3, 0.3))}  # by task and seed
    rows = [
        {**row, "task": task}
        for arm, of_task in ends.items() for task, own in zip(base, of_task, strict=True)
        for seed, end in enumerate(own) for row in rows_of(arm, seed, (0.3, end))
    ]  # fmt: skip
    two = SPARSE._replace(tasks=base)
    (line,) = benchmark_report.primary(benchmark_report.runs_of(rows), base, two)[2:]
    gaps = [((0.5 - 0.6) + (0.4 - 0.3)) / 2, ((0.7 - 0.6) + (0.5 - 0.3)) / 2]
    mean, low, high = interval(gaps)
    wanted = (
        f"| b2_lean at its end - b2 at its | 2 | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | "
        f"{lower_bound(gaps):+.3f} (95 %) |"
    )
    assert line.startswith(wanted)
    assert line.endswith("| 1.00 | not decided: 2 of 10 seeds |")
    assert benchmark_report.primary(benchmark_report.runs_of(rows[:1]), base, two) == []
    more = SPARSE._replace(tasks=(*base, "a task without runs"))
    assert benchmark_report.primary(benchmark_report.runs_of(rows), base, more) == []


def test_diversity_is_compared_where_both_first_have_a_success():
    def run(*points):
        return [{"success_test": 0.5, "success_train": own, "diversity_train": diversity} for own, diversity in points]

    base = {"success_train": 0.2, "diversity_train": 0.5}
    slow, fast = run((0.3, 0.4), (0.5, 0.2), (0.4, 0.1)), run((0.8, 0.2), (0.9, 0.0))
    at = 0.5 + (0.5 - 0.2) / (0.8 - 0.2) * (0.2 - 0.5)  # the fast one's at 0.5, the slow one's best
    assert paths.diversity_gap(slow, fast, base) == pytest.approx(0.2 - at)
    assert paths.diversity_gap(fast, slow, base) == pytest.approx(at - 0.2)
    assert paths.diversity_gap(run((0.1, 0.0)), fast, base) == 0  # where one never leaves the base model's
    twice = run((0.6, 0.3), (0.2, 0.1), (0.6, 0.0))
    at = 0.5 + (0.5 - 0.2) / (0.6 - 0.2) * (0.3 - 0.5)  # on the way up for the first time
    assert paths.diversity_gap(twice, slow, base) == pytest.approx(at - 0.2)
    at = 0.5 + (0.5 - 0.2) / (0.8 - 0.2) * (0.2 - 0.5)
    unevaluated = {"stage": 0, "queries": 120}
    assert paths.diversity_gap([unevaluated, *slow], fast, base) == pytest.approx(0.2 - at)


def test_the_primary_outcomes_diversity_is_of_every_task_with_its_own_base_model():
    base = {
        task: {"success_test": 0.2, "success_train": 0.3, "diversity_train": own}
        for task, own in (("dark", 0.4), ("left", 0.8))
    }
    rows = [
        {**stage_of(arm, seed, (0.5, train, 0.1), 1e6), "task": task}
        for arm, train in (("b2_lean", 0.5), ("b2", 0.7)) for task in base for seed in (0, 1)
    ]  # fmt: skip
    (line,) = benchmark_report.primary(benchmark_report.runs_of(rows), base, SPARSE._replace(tasks=base))[2:]
    gap = np.mean([0.1 - (own + 0.1) / 2 for own in (0.4, 0.8)])  # b2 is half way where it passes 0.5
    assert f"| {gap:+.3f} [" in line


def test_what_a_searchs_choice_goes_by():
    base = {task: {"success_test": 0.2, "success_train": 0.4} for task in ("dark", "left")}
    runs = {
        (task, "b2", settings): {
            seed: [{"queries": 240, "success_test": end + seed / 10, "success_train": 0.83}] for seed in (0, 1)
        }
        for task, settings, end in (("dark", "", 0.9), ("dark", "x 1", 0.4), ("left", "x 1", 0.6), ("left", "y 1", 0.8))
    }
    del runs["left", "b2", "x 1"][1]  # tasks count alike, whatever seeds they have
    runs["dark", "ddpo", "x 1"] = runs["dark", "b2", ""]
    lines = benchmark_report.searched(runs, base)[2:]
    of_x = ((0.2 + 0.45) / 2 + (0.2 + 0.6) / 2) / 2
    assert lines.pop() == f"| ddpo | x 1 | dark | 2 | {((0.2 + 0.95) / 2 + 0.615) / 2:.3f} | 0.950 |"
    assert lines[0] == f"| b2 | x 1 | dark, left | 3 | {(of_x + 0.615) / 2:.3f} | 0.525 |"
    assert [line.split(" | ")[1:4] for line in lines] == [["x 1", "dark, left", "3"], ["y 1", "left", "2"]]
    assert benchmark_report.searched({cell: own for cell, own in runs.items() if not cell[2]}, base) == []


def test_a_search_has_a_table_and_no_figures(tmp_path):
    base = {"dark": {"success_test": 0.2, "success_train": 0.3, "diversity_train": 0.4}}
    rows = [{**stage_of("b2", 1, (0.5, 0.7, 0.1), 1e6), "settings": "x 1"}]
    benchmark_report.write(tmp_path, rows, base, SPARSE)
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert "| searched arm |" in (tmp_path / "table.md").read_text(encoding="utf-8")
    benchmark_report.write(tmp_path, [{**rows[0], "settings": ""}], base, SPARSE)
    assert (tmp_path / "curves.png").is_file()


def test_the_interquartile_mean_is_over_all_tasks_and_drawn_within_each():
    rng = np.random.default_rng(1)
    assert iqm([9, 1, 2, 3, -50]) == 2
    assert iqm([1, 2, 3, 4, 5, 6, 7, 100]) == pytest.approx(4.5)
    strata = [[0.1, 0.2, 0.3], [0.8, 0.9, 0.85, 0.7]]
    middle, low, high = stratified(strata)
    assert middle == iqm(strata[0] + strata[1]) == pytest.approx((0.3 + 0.2 + 0.7 + 0.8 + 0.85) / 5)
    drawn = []  # by hand: as many of each task, whatever the tasks' levels
    for _ in range(20_000):
        ordered = sorted(value for own in strata for value in rng.choice(own, len(own)))
        drawn.append(np.mean(ordered[1:-1]))
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.008)
    together = np.quantile([iqm(rng.choice(strata[0] + strata[1], 7)) for _ in range(3000)], (0.025, 0.975))
    assert high - low < 0.6 * (together[1] - together[0])
    assert np.isnan(stratified([[0.5], [0.1, 0.2]])[1:]).all()
    base = {task: {"success_test": 0.2} for task in ("dark", "left")}
    rows = [
        {**row, "task": task}
        for task in base
        for seed, end in enumerate((0.5, 0.7))
        for row in rows_of("b2", seed, (end,))
    ]
    (line,) = benchmark_report.middles(benchmark_report.runs_of(rows), base)[2:]
    assert line.startswith("| b2 | dark, left | 4 | 0.400 [")
    assert "| 0.600 [" in line
    one_more = [*rows, {**rows_of("b2", 2, (1.0,))[0], "task": "dark"}]  # a seed that has not every task yet
    assert benchmark_report.middles(benchmark_report.runs_of(one_more), base)[2:] == [line]
    assert benchmark_report.middles(benchmark_report.runs_of(rows[:2]), base) == []


def test_ratios_are_geometric_means_of_paired_seeds():
    base = {"dark": {"success_test": 0.2}, "left": {"success_test": 0.1}}
    ends = {  # success after 240 and 480 queries, by seed; half of what misses is 0.6 in dark, 0.55 in left
        ("dark", "ddpo"): [(0.4, 0.8), (0.6, 0.8)], ("dark", "b2"): [(0.6, 0.7), (0.3, 0.4)],
        ("left", "ddpo"): [(0.1, 1.0), (0.55, 0.6)], ("left", "b2"): [(0.55, 0.9), (0.55, 0.9)],
    }  # fmt: skip
    rows = [
        {**row, "task": task} for (task, arm), own in ends.items() for seed, end in enumerate(own)
        for row in rows_of(arm, seed, end)
    ]  # fmt: skip
    runs = benchmark_report.runs_of(rows)
    found = benchmark_ratios.ratios(runs, base, "ddpo", "queries")
    assert list(found) == ["b2"]
    logs = np.log([240 / 360, 240 / 240])
    assert found["b2"]["left"] == pytest.approx(np.exp(interval(logs)))
    logs = np.log([240 / 360, 480 / 240])  # b2's second run never comes there
    assert found["b2"]["dark"] == pytest.approx(np.exp(interval(logs)))
    assert benchmark_ratios.ratios(runs, base, "another", "queries") == {}
    dearer = [{**row, "forwards": 2e6 if row["arm"] == "b2" else 1e6} for row in rows]
    dearer = [{**row, "forwards": row["forwards"] * (row["stage"] + 1)} for row in dearer]
    passes = benchmark_ratios.ratios(benchmark_report.runs_of(dearer), base, "ddpo", "forwards")["b2"]["left"]
    assert passes == pytest.approx(2 * np.array(found["b2"]["left"]))
    shorter = [row for seed in (1, 2) for row in rows_of("ddpo", seed, (0.2,) * 4) + rows_of("b2", seed, (0.2, 0.9))]
    even = benchmark_ratios.ratios(benchmark_report.runs_of(shorter), base, "ddpo", "queries")["b2"]["dark"]
    assert even == pytest.approx([(240 + 240 * 4 / 7) / 480] * 3)  # ddpo, looked at as far as b2, counts with 480
    fewer = [{**row, "seed": row["seed"] + 2, "success_test": 0.2} for row in shorter]
    more = [{**row, "seed": row["seed"] + 4, "success_test": 0.2} for row in shorter if row["seed"] == 1]
    assert benchmark_ratios.ratios(benchmark_report.runs_of(shorter + fewer), base, "ddpo", "queries")
    of_five = benchmark_report.runs_of(shorter + fewer + more)  # in two of them one comes there
    assert benchmark_ratios.ratios(of_five, base, "ddpo", "queries") == {}


def test_the_ratios_figure_has_the_tasks_by_sparsity_and_the_arms_with_enough_seeds(tmp_path, monkeypatch):
    base = {"plain": {"success_test": 0.2}, "dark": {"success_test": 0.2}, "left": {"success_test": 0.1}}
    rows = [
        {**row, "task": task} for task in base for arm, count in (("ddpo", 5), ("b2", 5), ("ddpo_bs", 4))
        for seed in range(count) for row in rows_of(arm, seed, (0.4, 0.9))
    ]  # fmt: skip
    runs = benchmark_report.runs_of(rows)
    colours = benchmark_ratios.colours(["ddpo_bs", "ddpo"], runs)
    assert colours == {"ddpo_bs": "C0", "ddpo": "C1", "b2": "C2"}
    benchmark_ratios.draw(tmp_path / "another.png", runs, base, "another", colours)
    few = {cell: {seed: own[seed] for seed in range(4)} for cell, own in runs.items()}
    benchmark_ratios.draw(tmp_path / "few.png", few, base, "ddpo", colours)
    benchmark_ratios.draw(tmp_path / "ratios.png", runs, base, "ddpo", colours)
    assert [path.name for path in tmp_path.iterdir()] == ["ratios.png"]
    drawn, named, legends, errorbar = [], [], [], Axes.errorbar

    def recorded(self, x, y, err, label, color, **others):
        drawn.append((label, color, x, [*y]))
        return errorbar(self, x, y, err, label=label, color=color, **others)

    monkeypatch.setattr(Axes, "errorbar", recorded)
    monkeypatch.setattr(Axes, "set_xticks", lambda self, places, labels: named.append(labels))
    monkeypatch.setattr(Figure, "legend", lambda self, handles, labels, **_: legends.append(labels))
    benchmark_ratios.draw(tmp_path / "ratios.png", runs, base, "ddpo", colours)
    assert named[0] == ["left\n0.10", "dark\n0.20", "plain\n0.20"]
    assert drawn[0] == ("b2", "C2", [1, 0, 2], [1, 1, 1])  # the cells are by name: dark, left, plain
    assert len(drawn) == 2
    assert legends == [["b2"]]


def test_no_two_arms_of_a_design_have_a_colour():
    for design in DESIGNS.values():
        assert len({*benchmark_ratios.colours(design.arms, {}).values()}) == len(design.arms)


def test_the_curves_are_of_the_arms_with_enough_seeds(tmp_path, monkeypatch):
    base = {task: {"success_test": 0.2} for task in ("dark", "left")}
    rows = [
        {**row, "task": task}
        for task in base for arm, count in (("ddpo", 5), ("b2", 6 if task == "dark" else 5), ("x", 4))
        for seed in range(count) for row in rows_of(arm, seed, (0.4 + 0.1 * seed, 0.9))
    ]  # fmt: skip
    lines, bands, legends, plot = [], [], [], Axes.plot

    def recorded(self, x, y, color, **others):
        lines.append((self.get_subplotspec().rowspan.start, color, [*y]))
        return plot(self, x, y, color=color, **others)

    def band(self, x, low, high, color, **others):
        bands.append((color, low[0], high[0]))

    monkeypatch.setattr(Axes, "plot", recorded)
    monkeypatch.setattr(Axes, "fill_between", band)
    monkeypatch.setattr(Figure, "legend", lambda self, handles, labels, **_: legends.append(labels))
    runs = benchmark_report.runs_of(rows)
    colours = benchmark_ratios.colours(["ddpo", "x", "b2"], runs)
    benchmark_report.draw(tmp_path / "curves.png", runs, base, colours)
    assert [(task, color) for task, color, _ in lines] == [(row, color) for row in (0, 1) for color in ("C2", "C0") * 2]
    assert lines[1][2] == pytest.approx([0.2, 0.6, 0.9])
    _, low, high = interval([0.4 + 0.1 * seed for seed in range(5)])
    assert bands[1] == ("C0", pytest.approx(low), pytest.approx(high))
    assert legends == [["b2 (5 to 6 seeds)", "ddpo (5 seeds)"]]
    lines.clear()
    bands.clear()
    few = {cell: own for cell, own in runs.items() if cell[1] == "x"}
    benchmark_report.draw(tmp_path / "curves.png", few, base, colours)
    assert {color for _, color, _ in lines} == {"C1"}
    assert (len(lines), bands, legends[1]) == (4, [], ["x (4 seeds)"])


@pytest.mark.parametrize("count", range(2, 11))
def test_the_quantiles_are_those_of_the_p_value(count):
    values = np.linspace(-1, 1, count)
    for end in interval(values)[1:]:
        assert p_value(values - end) == pytest.approx(0.05, abs=1e-4)
    assert p_value(values - lower_bound(values)) == pytest.approx(0.1, abs=1e-4)
    assert lower_bound(values, 0.975) == pytest.approx(interval(values)[1])
    assert p_value([1, 1]) == 0
    assert p_value([0, 0]) == 1
    many = np.linspace(-1, 1, 14)
    assert -0.33 < lower_bound(many) < -0.26


def test_the_lower_bound_is_students():
    rng = np.random.default_rng(0)
    for count in (2, 5, 10):
        bounds = [lower_bound(values) for values in rng.normal(size=(20_000, count))]
        assert np.mean(np.array(bounds) > 0) == pytest.approx(0.05, abs=0.006)


def stage_of(arm, seed, ends, forwards):
    held_out, train, diversity = ends
    return {
        "task": "dark", "arm": arm, "settings": "", "seed": seed, "stage": 0, "queries": 240, "forwards": forwards,
        "success_test": held_out, "success_train": train, "diversity_train": diversity,
    }  # fmt: skip


def test_the_reports_other_columns():
    base = {"dark": {"success_test": 0.2, "success_train": 0.3, "diversity_train": 0.4}}
    rows = [stage_of("b2_lean", seed, (0.5, 0.7, 0.1), 1e6) for seed in (0, 1)]
    rows += [stage_of("b2", seed, (0.6, 0.9, 0.3), 4e6) for seed in (0, 1)]
    runs = benchmark_report.runs_of(rows)
    (line,) = benchmark_report.primary(runs, base, SPARSE._replace(tasks=base, rivals=("b2",)))[2:]
    assert line.endswith("| -0.233 [-0.233, -0.233] | 0.25 | not decided: 2 of 10 seeds |")  # 0.1 - b2's at 0.7
    lines = benchmark_report.table(runs, base)
    assert lines[2] == "| dark | base model | | | | 0.200 | | | 0.300 | 0.400 | |"
    area, end, train, diversity = (f"{value:.3f} [{value:.3f}, {value:.3f}]" for value in (0.35, 0.5, 0.7, 0.1))
    never = "- (0 of 2)"
    assert lines[4] == f"| dark | b2_lean |  | 2 | {area} | {end} | {never} | {never} | {train} | {diversity} | 1.00 |"
    failed = [{**row, "failed": "x", "forwards": 0, "diversity_train": 0.4} for row in rows if row["arm"] == "b2_lean"]
    again = benchmark_report.runs_of([*rows[2:], failed[0], rows[1]])
    (line,) = benchmark_report.primary(again, base, SPARSE._replace(tasks=base, rivals=("b2",)))[2:]
    assert line.endswith("| -0.233 | 0.25 | not decided: 2 of 10 seeds |")  # of the other seed
    assert benchmark_report.table(again, base)[4].endswith("| 0.100 | 1.00 |")  # diversity too
    none = benchmark_report.runs_of([*rows[2:], *failed])
    (line,) = benchmark_report.primary(none, base, SPARSE._replace(tasks=base, rivals=("b2",), seeds=(0, 1)))[2:]
    assert line.endswith("| - | - | False |")
    assert benchmark_report.table(none, base)[4].endswith("|  |  |")


@pytest.mark.parametrize(
    ("end", "diversity", "passes", "holds"),
    [(0.59, 0.33, 4e6, True), (0.57, 0.33, 1e6, False), (0.9, 0.32, 1e6, False), (0.9, 0.325, 4.1e6, False)],
)
def test_what_the_primary_outcome_asks_for(end, diversity, passes, holds):
    design = SPARSE._replace(tasks=("dark",), rivals=("b2",), seeds=(0, 1))
    assert (design.margin, design.diversity_margin) == (0.02, 0.01)
    base = {"dark": {"success_train": 0.3, "diversity_train": 0.4}}  # b2 is at 0.333 where it passes 0.7
    rows = [stage_of("b2_lean", seed, (end, 0.7, diversity), passes) for seed in (0, 1)]
    rows += [stage_of("b2", seed, (0.6, 0.9, 0.3), 4e6) for seed in (0, 1)]
    (line,) = benchmark_report.primary(benchmark_report.runs_of(rows), base, design)[2:]
    assert line.endswith(f"| {holds} |")


def test_what_a_run_has_spent(tmp_path):
    config = configure(f"save_path={tmp_path}", "exp_name=t")
    run = Run(config)
    run.folder.mkdir()
    for config.stage in (0, 1):
        steps = {
            "sample": {"perf/unet_evals": 10},
            "select": {"reward/queries": 6 * config.stage + 4, "select/kept": 3},
            "fuse": {"perf/unet_evals": 5, "reward/queries": 6 * (config.stage + 1), "fuse/kept": 1, "fuse/targets": 2},
            "train": {
                "perf/unet_evals": 6,
                "perf/unet_evals_base": 2,
                "train/updates": 2,
                "policy/approx_kl": 0.1 * config.stage,
            },
        }
        for step, values in steps.items():
            metrics.record(run.metrics, config, step, {**values, "time_s": 1.0})
    assert benchmark_measures.spent(run, config) == {
        "queries": 12, "updates": 4, "kept": 2, "unet_evals": 42, "forwards": 20 + 10 + 4 + 3 * 8, "approx_kl": 0.1,
        "seconds": 8.0,
    }  # fmt: skip
    config.stage = 0
    assert benchmark_measures.spent(run, config)["forwards"] == 10 + 5 + 2 + 3 * 4


def test_a_failed_runs_row_is_at_its_own_budget():
    design = SPARSE
    arm = next(iter(design.less))
    for name, queries in ((arm, design.less[arm]), ("b2", design.budget)):
        row = benchmark.failure(benchmark.Job("dark", name, 1), "x", {"success_test": 0.2}, design)
        assert (row["queries"], row["forwards"], row["success_test"]) == (queries, 0, 0.2)


def test_every_stages_own_checkpoint_is_measured(tmp_path, monkeypatch):
    small = {
        "sample.groups": 2, "sample.branches": 3, "sample.num_steps": 4, "schedule.left": 2, "schedule.right": 3,
    }  # fmt: skip
    design = SPARSE._replace(arms={"b2": {**SPARSE.arms["b2"], **small}}, budget=12, every=6)
    seen, figures = [], dict.fromkeys([f"{n}_{p}" for n in benchmark.FIGURES for p in ("train", "test")], 0.5)

    def spent(place, config):
        place.stage.mkdir(parents=True, exist_ok=True)
        return {"queries": 6 * (config.stage + 1)}

    monkeypatch.setattr(benchmark, "run_stage", lambda config, loaded: None)
    monkeypatch.setattr(benchmark, "spent", spent)
    monkeypatch.setattr(benchmark, "measure", lambda config, checkpoint, *_: seen.append(checkpoint) or figures)
    job = benchmark.Job("attribute", "b2", 7)
    benchmark.run(job, tmp_path, design)
    folder = tmp_path / "runs" / benchmark.configure(job, tmp_path, design).exp_name
    for stage in (0, 1):
        (folder / f"stage{stage}/evaluation.json").unlink()
    averaged = design._replace(arms={"b2": {**design.arms["b2"], "train.ema_decay": 0.5}})
    benchmark.run(job, tmp_path, averaged)
    assert {path.name for path in seen[2:]} == {"ema"}
    del seen[2:]
    for stage in (0, 1):
        (folder / f"stage{stage}/evaluation.json").unlink()
    benchmark.run(job, tmp_path, design._replace(every=12))
    assert len(seen) == 3  # after 12 queries, and not after 6
    del seen[2:]
    assert [str(path.relative_to(folder)) for path in seen] == [f"stage{n}/checkpoints/checkpoint_1" for n in (0, 1)]


def test_success_is_of_each_picture_and_its_own_prompt(monkeypatch):
    own = "prompts/shapes_attribute_train.json"
    settings = "evaluate.images_per_prompt=3", "reward.name=jpeg_compressibility"
    config = configure(*settings, f"prompts.train={own}", f"prompts.test={own}")
    prompts = read_prompts(own)

    def right(images, asked):
        meant = [prompts[image.getpixel((0, 0))[0]] for image in images]
        return np.array([float(one == other) for one, other in zip(meant, asked, strict=True)])

    drawn = [Image.new("RGB", (32, 32), (n,) * 3) for n, _ in enumerate(prompts) for _ in range(3)]
    for number, image in enumerate(drawn):
        image.paste((255,) * 3, (8, 8, 9 + number // 3, 24))
    monkeypatch.setattr(before_after, "generate", lambda *_: {"train": drawn, "test": drawn})
    monkeypatch.setattr(benchmark_measures, "user_function", lambda name: right)
    found = benchmark_measures.measure(config, None, Models(config), "dark")
    assert found["success_train"] == found["success_test"] == 1
    assert found["entropy_train"] == 0  # nothing of the world is in these pictures
    assert found["diversity_train"] == pytest.approx(0, abs=1e-6)  # and a prompt's are the same
    sizes = Models(config)._reward.score(drawn, [""] * len(drawn))[0]
    assert len(set(sizes)) > 1
    assert found["reward_test"] == pytest.approx(sizes.mean())
    others = drawn[1:] + drawn[:1]  # of every three the last is of another prompt
    monkeypatch.setattr(before_after, "generate", lambda *_: {"train": others, "test": others})
    assert benchmark_measures.measure(config, None, Models(config), "dark")["diversity_train"] > 1e-4
