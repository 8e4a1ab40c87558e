"""What the study compares: the runs (loss, method, seed, settings) and the configuration of each of them."""

import re
import typing

from ..errors import UserError
from ..run.command import parse


def prompt_lists(name):
    """{configuration field: file} of the train and held-out prompts of one world.

    name: "study" or "search", attribute prompts about three and about two shapes, none in both.
    """
    return {f"prompts.{part}": f"prompts/shapes_{name}_{part}.json" for part in ("train", "test")}


def at_rates(*rates, **others):
    """[{configuration field: value}], one for each learning rate; others: further fields of `train` for all of them."""
    shared = {f"train.{name}": value for name, value in others.items()}
    return [{"train.learning_rate": rate, **shared} for rate in rates]


OTHERS = ("ddpo_sf", "dpok", "dpo")
MEAN = {"train.log_prob": "mean", "train.clip_range": 1e-3}
LOSSES = {  # what results.csv calls a loss: its settings; ddpo_is and ddpo_is_sum run with all four methods
    "ddpo_is": {"train.algorithm": "ddpo_is", **MEAN},
    "ddpo_is_sum": {"train.algorithm": "ddpo_is", "train.log_prob": "sum", "train.clip_range": 0.2},
    **{name: {"train.algorithm": name, **MEAN} for name in OTHERS},
}
THIRD_SEED = ("ddpo_is",)  # losses whose finalists have one more seed in the search
WORLDS = ("shapes", "shapes_flow")
ARMS = ("ddpo", "ddpo_bpt", "ddpo_bs", "b2")
SIZES = {"sample.groups": 48, "evaluate.images_per_prompt": 16}
BUDGETS = {  # settings over the preset's, the same for every run of a kind of study
    "full": {"schedule.stage_count": 12, **SIZES, **prompt_lists("study")},
    "quick": {"schedule.stage_count": 4, "sample.groups": 12, "evaluate.images_per_prompt": 4, **prompt_lists("study")},
    "search": {"schedule.stage_count": 8, **SIZES, **prompt_lists("search")},
}
ROUNDS = {"ddpo_sf": 4}  # on-policy, so one update per stage: 4 times the stages, each with a quarter of the groups
EVALUATE_EVERY = 192  # groups, four stages of SIZES

GRID = {  # by loss, the settings searched: the learning rate, and the loss's own coefficient where it has one
    "ddpo_is": at_rates(5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "ddpo_is_sum": at_rates(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "ddpo_sf": at_rates(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "dpok": [
        *at_rates(4e-3, 8e-3, 1.6e-2, kl_weight=0.1),
        *at_rates(8e-3, kl_weight=0.01),
        *at_rates(8e-3, kl_weight=1),
    ],
    "dpo": [
        *at_rates(4e-3, 8e-3, 1.6e-2, dpo_beta=1000),
        *at_rates(8e-3, dpo_beta=100),
        *at_rates(8e-3, dpo_beta=10000),
    ],
}
FINALISTS = {  # by (loss, method), the two settings of GRID with the best reward on the search's first seed
    ("ddpo_is", "ddpo"): at_rates(4e-3, 8e-3),
    ("ddpo_is", "ddpo_bpt"): at_rates(1.6e-2, 8e-3),
    ("ddpo_is", "ddpo_bs"): at_rates(3.2e-2, 1.6e-2),
    ("ddpo_is", "b2"): at_rates(1.6e-2, 3.2e-2),
    ("ddpo_is_sum", "ddpo"): at_rates(2e-3, 4e-3),
    ("ddpo_is_sum", "ddpo_bpt"): at_rates(2e-3, 4e-3),
    ("ddpo_is_sum", "ddpo_bs"): at_rates(8e-3, 4e-3),
    ("ddpo_is_sum", "b2"): at_rates(8e-3, 4e-3),
    ("ddpo_sf", "ddpo"): at_rates(4e-3, 2e-3),
    ("ddpo_sf", "b2"): at_rates(2e-3, 4e-3),
    ("dpo", "ddpo"): at_rates(8e-3, 4e-3, dpo_beta=1000),
    ("dpo", "b2"): [*at_rates(8e-3, dpo_beta=1000), *at_rates(8e-3, dpo_beta=10000)],
}
CHOSEN = {  # by (loss, method), the settings with the best mean reward over the search's seeds (dpok: one seed)
    ("ddpo_is", "ddpo"): {"train.learning_rate": 8e-3},
    ("ddpo_is", "ddpo_bpt"): {"train.learning_rate": 8e-3},
    ("ddpo_is", "ddpo_bs"): {"train.learning_rate": 1.6e-2},
    ("ddpo_is", "b2"): {"train.learning_rate": 1.6e-2},
    ("ddpo_is_sum", "ddpo"): {"train.learning_rate": 2e-3},
    ("ddpo_is_sum", "ddpo_bpt"): {"train.learning_rate": 4e-3},
    ("ddpo_is_sum", "ddpo_bs"): {"train.learning_rate": 4e-3},
    ("ddpo_is_sum", "b2"): {"train.learning_rate": 8e-3},
    ("ddpo_sf", "ddpo"): {"train.learning_rate": 2e-3},
    ("ddpo_sf", "b2"): {"train.learning_rate": 4e-3},
    ("dpok", "ddpo"): {"train.learning_rate": 8e-3, "train.kl_weight": 0.01},
    ("dpok", "b2"): {"train.learning_rate": 8e-3, "train.kl_weight": 0.01},
    ("dpo", "ddpo"): {"train.learning_rate": 4e-3, "train.dpo_beta": 1000},
    ("dpo", "b2"): {"train.learning_rate": 8e-3, "train.dpo_beta": 1000},
}


class Job(typing.NamedTuple):
    """A run of the matrix: everything in which it differs from the others."""

    algorithm: str  # a key of LOSSES
    method: str  # one of ARMS
    seed: int
    settings: tuple  # of (configuration field, value)
    world: str = "shapes"  # the preset whose model and prompts it has; worlds have folders of their own

    def key(self):
        """What names the run in results.csv: (algorithm, method, settings as text, seed)."""
        told = ", ".join(f"{name.split('.')[-1]} {str(value).replace(' ', '')}" for name, value in self.settings)
        return self.algorithm, self.method, told, self.seed

    def name(self):
        """The run in messages: its key, separated by spaces."""
        return " ".join(map(str, self.key()))


def matrix(kind, cells=(), seeds=(), changes=(), world="shapes"):
    """The Jobs of a study, in the order in which they are run.

    kind: "full" (five seeds for the four methods of ddpo_is and of ddpo_is_sum, three for two methods of each other
    loss), "quick" (part of it, on one or two seeds) or "search" (every setting of GRID on a seed of its own, then
    FINALISTS on one more, or on two with ddpo_is). cells: "algorithm:method", only these where given. seeds: these
    instead of the study's; a search ignores them. changes: (configuration field, value), over every run's settings.
    world: one of WORLDS; the chosen settings are those of shapes.
    """
    tried = _search() if kind == "search" else _evidence(kind, seeds)
    jobs = [Job(*cell, seed, tuple({**settings, **dict(changes)}.items()), world) for cell, seed, settings in tried]
    return [job for job in jobs if not cells or ":".join(job[:2]) in cells]


def _cells(losses, methods):
    """[(algorithm, method)] of all losses with all methods."""
    return [(algorithm, method) for algorithm in losses for method in methods]


def _search():
    """[((algorithm, method), seed, settings)] of the search."""
    cells = _cells(("ddpo_is", "ddpo_is_sum"), ARMS) + _cells(OTHERS, ("ddpo", "b2"))
    finals = [(cell, settings) for cell, finalists in FINALISTS.items() for settings in finalists]
    return [
        *((cell, 201, settings) for cell in cells for settings in GRID[cell[0]]),
        *((cell, 202, settings) for cell, settings in finals),
        *((cell, 203, settings) for cell, settings in finals if cell[0] in THIRD_SEED),
    ]


def _evidence(kind, seeds):
    """[((algorithm, method), seed, settings)] of a full or quick study."""
    if kind == "quick":
        ddpo, many = _cells(("ddpo_is",), ARMS), (101, 102)
        others, few = _cells(OTHERS, ("b2",)), (101,)
    else:
        ddpo, many = _cells(("ddpo_is", "ddpo_is_sum"), ARMS), range(101, 106)
        others, few = _cells(OTHERS, ("ddpo", "b2")), range(101, 104)
    runs = [(cell, seed) for seed in seeds or many for cell in ddpo]
    runs += [(cell, seed) for seed in seeds or few for cell in others]
    return [(cell, seed, CHOSEN[cell]) for cell, seed in runs]


def configure(job, out, kind):
    """A run's checked configuration: its world's preset with the settings in which the study differs from it.

    out: pathlib.Path of the study, whose runs/ holds the run. UserError where one of the job's settings is refused.
    """
    budget, rounds = BUDGETS[kind], ROUNDS.get(job.algorithm, 1)
    settings = {
        **budget, "schedule.stage_count": budget["schedule.stage_count"] * rounds,
        "sample.groups": budget["sample.groups"] // rounds,
        "exp_name": re.sub(r"[^\w.]+", "_", job.name()), "save_path": str(out / "runs"),
        "method": job.method, "seed": job.seed, **LOSSES[job.algorithm],
        "select.credit": "",  # by the method, whatever the preset has
        "keep.images": 1, "keep.trajectories": 1, "keep.optimiser": 2, **dict(job.settings),
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    config = parse(["study", "--config", f"config/stage_process.py:{job.world}", *flags])[0]
    if config.evaluate.images_per_prompt < 2:
        raise UserError(
            "--set evaluate.images_per_prompt=1: must be at least 2, or a prompt's pictures have no diversity"
        )
    return config


def evaluated(config):
    """Whether the result of stage config.stage is evaluated: after every EVALUATE_EVERY groups, and at the end."""
    end = config.stage == config.schedule.stage_count - 1
    return end or (config.stage + 1) * config.sample.groups % EVALUATE_EVERY == 0
