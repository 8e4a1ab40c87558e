"""A study's results.csv: one row per run and stage."""

import csv
import os

FIGURES = {  # the columns that the report has, and what it calls them
    "oracle_train": "oracle, train",
    "oracle_test": "oracle, held-out",
    "reward_train": "reward, train",
    "reward_test": "reward, held-out",
    "diversity_train": "CLIP diversity, train",
    "entropy_train": "open entropy (bits), train",
}
NAMES = {**FIGURES, "queries": "reward queries", "unet_evals": "UNet evaluations"}
COLUMNS = (
    "algorithm", "method", "settings", "seed", "stage", "queries", "unet_evals", "seconds", "reward_samples",
    "oracle_samples", "reward_train", "reward_test", "oracle_train", "oracle_test", "diversity_train",
    "diversity_test", "entropy_train", "entropy_test",
)  # fmt: skip
TEXTS, COUNTS = ("algorithm", "method", "settings"), ("seed", "stage", "queries", "unet_evals")
ORDER = ("ddpo_is", "ddpo_is_sum", "ddpo_sf", "dpok", "dpo", "ddpo", "ddpo_bpt", "ddpo_bs", "b2")


def write(path, rows, columns=COLUMNS):
    """Write a results.csv, whole or not at all, since the study goes on from it; floats to six decimals.

    rows: dicts of the columns; stages that were not evaluated have none from "reward_train" on.
    """
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    os.replace(aside, path)


def read(path, texts=TEXTS, counts=COUNTS):
    """The rows of a results.csv as write got them; none where there is no file.

    texts, counts: the columns of text and of whole numbers; all others are numbers.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [
            {k: v if k in texts else int(v) if k in counts else float(v) for k, v in row.items() if v != ""}
            for row in csv.DictReader(stream)
        ]


def cell_of(row):
    """The runs that a row belongs to, which differ in the seed alone: (algorithm, method, settings)."""
    return row["algorithm"], row["method"], row["settings"]


def final_rows(rows):
    """{(algorithm, method, settings): {seed: the row of the run's last stage}} in the order of the table."""
    cells = {}
    for row in sorted(rows, key=lambda r: (ORDER.index(r["algorithm"]), ORDER.index(r["method"]), r["stage"])):
        cells.setdefault(cell_of(row), {})[row["seed"]] = row
    return cells


def evaluated_rows(rows, last):
    """{queries: row} of the evaluated stages of the run that ended in the row `last`."""
    run = (*cell_of(last), last["seed"])
    return {r["queries"]: r for r in rows if (*cell_of(r), r["seed"]) == run and "oracle_train" in r}


def over_lists(row, key):
    """The mean of a figure ("reward", "oracle", ...) over train and held-out prompts."""
    return (row[f"{key}_train"] + row[f"{key}_test"]) / 2
