"""What the benchmark runs: tasks, arms, budgets and comparisons, as the protocols have them, and the search's grid."""

import typing

LADDER = "b2diffurl.shapes.ladder:"


class Task(typing.NamedTuple):
    """What is to be learnt."""

    reward: str  # config.reward.name
    success: str  # the function of LADDER by which a picture counts as a success
    lists: str  # prompts/shapes_LISTS_{train,test}.json
    search: str = ""  # the same for the search; "": not searched
    images: int = 16  # per prompt, of an evaluation


class Design(typing.NamedTuple):
    """A protocol in numbers; settings are {configuration field: value}."""

    folder: str  # of its protocol and results
    tasks: dict  # {name: Task}
    shared: dict  # settings of all arms over the preset
    arms: dict  # {name: settings over them}
    budget: int  # reward queries of a run
    less: dict  # {arm: the same where it is less}
    grid: dict  # what the search tries: {arm: [settings over it]}
    comparisons: tuple  # (arm, other), by the area under the held-out curve, in every task
    second_look: tuple = ()  # the same, written down later and corrected for themselves
    primary: tuple = ()  # (arm with fewer queries, its bound's confidence): at its end against the rivals at theirs
    rivals: tuple = ()
    margin: float = 0.02  # how far below a rival's such an arm's held-out success may be
    diversity_margin: float = 0.01  # and its diversity
    reference: str = ""  # the arm that ratios.png sets the others against
    preset: str = "shapes"
    every: int = 240  # reward queries between two evaluations
    seeds: tuple = tuple(range(401, 411))
    search_seeds: tuple = (201,)


def rate_and_updates(rate, count):
    """Settings: a learning rate, and trajectories per update."""
    return {"train.learning_rate": rate, "train.trajectories_per_update": count}


def rates_and_updates(rates, counts):
    """Several learning rates, each with several numbers of trajectories per update."""
    return [rate_and_updates(rate, count) for rate in rates for count in counts]


RATES = 4e-3, 8e-3  # that the search tries
ATTRIBUTE = Task("clip", "right", "study", "search")
LEAN = {
    "select.credit": "all", "sample.groups": 24, "train.num_epochs": 1, "schedule.untrained": 10,
    "train.algorithm": "dpok", "train.kl_weight": 0.1, **rate_and_updates(4e-3, 16),
}  # fmt: skip
GUIDED = {"sample.guidance_scale": 3.5, "evaluate.guidance_scale": 5.0}  # 3.5: what the second look's rule chose
HALF = {**LEAN, "schedule.untrained": 6, "train.negative_weight": 0.5, **GUIDED}
SPARSE = Design(
    folder="docs/benchmark",
    tasks={
        "attribute": ATTRIBUTE,
        **{name: Task(f"{LADDER}right_{name}", f"right_{name}", "study") for name in ("dark", "plain")},
        "left": Task(f"{LADDER}right_left", "right_left", "study", "search"),
    },
    shared={"train.log_prob": "sum", "train.clip_range": 0.2},
    arms={
        "ddpo": {"method": "ddpo", **rate_and_updates(8e-3, 64)},
        "ddpo_contrast": {"method": "ddpo", "select.credit": "contrast", **rate_and_updates(4e-3, 32)},
        "ddpo_bpt": {"method": "ddpo_bpt", **rate_and_updates(4e-3, 32)},
        "ddpo_bs": {"method": "ddpo_bs", "schedule.right": 17, **rate_and_updates(8e-3, 16)},
        "b2": {"method": "b2", **rate_and_updates(4e-3, 16)},
        "b2_lean": {"method": "b2", "schedule.right": 17, **LEAN},
        "ddpo_lean": {"method": "ddpo", **LEAN, **rate_and_updates(8e-3, 16)},
        "b2_half": {"method": "b2", "schedule.right": 17, **HALF},
        "ddpo_half": {"method": "ddpo", **HALF, **rate_and_updates(8e-3, 16)},
        "ddpo_guided": {"method": "ddpo", **rate_and_updates(8e-3, 64), **GUIDED},
        "b2_guided": {"method": "b2", **rate_and_updates(4e-3, 16), **GUIDED},
    },
    budget=1440,
    less=dict.fromkeys(("b2_lean", "ddpo_lean", "b2_half", "ddpo_half"), 720),
    grid={
        **dict.fromkeys(("ddpo", "ddpo_bpt"), rates_and_updates(RATES, (32, 64))),
        **dict.fromkeys(("ddpo_contrast", "ddpo_bs", "b2"), rates_and_updates(RATES, (16, 32))),
        "b2_lean": [
            *rates_and_updates(RATES, (16, 32)), {"schedule.untrained": 0}, {"select.credit": "contrast"},
            {"select.credit": "group"}, {"sample.groups": 48}, {"train.num_epochs": 2}, {"schedule.right": 20},
            {"train.step_weights": "inverse_gain"}, {"train.algorithm": "ddpo_is"}, {"train.kl_weight": 0.03},
            {"schedule.untrained": 0, "train.algorithm": "ddpo_is"},
        ],
        "ddpo_lean": rates_and_updates(RATES, (16, 32)),
    },
    comparisons=(
        ("b2", "ddpo"), ("b2", "ddpo_contrast"), ("b2", "ddpo_bpt"), ("b2", "ddpo_bs"), ("b2_lean", "ddpo_lean"),
    ),
    second_look=(("b2_half", "ddpo_half"),),
    primary=(("b2_lean", 0.95), ("b2_half", 0.975)),
    rivals=("b2", "ddpo"),
    reference="ddpo",
    seeds=tuple(range(501, 511)),
    search_seeds=(202, 203),
)  # fmt: skip

FLOW = Design(
    folder="docs/benchmark/flow",
    preset="shapes_flow",
    tasks={
        "attribute": Task("clip", "right", "paired_study", "paired_search"),
        **{name: Task(f"{LADDER}right_{name}", f"right_{name}", "paired_study") for name in ("dark", "plain")},
    },
    shared=rate_and_updates(1e-2, 30),
    arms={
        "ddpo": {"method": "ddpo"}, "ddpo_bpt": {"method": "ddpo_bpt"},
        "ddpo_bs": {"method": "ddpo_bs", "schedule.right": 17}, "b2": {"method": "b2"},
    },
    budget=1440,
    less={},
    grid=dict.fromkeys(("ddpo", "ddpo_bpt", "ddpo_bs", "b2"), rates_and_updates((5e-3, 1e-2), (30, 60))),
    comparisons=(("b2", "ddpo"), ("b2", "ddpo_bpt"), ("b2", "ddpo_bs")),
    reference="ddpo",
    seeds=tuple(range(601, 611)),
    search_seeds=(201, 202),
)  # fmt: skip

FUSED = {"method": "dfusion", "sample.groups": 10}  # 160 images and 80 targets per stage
ALONE = {"method": "ddpo", "sample.groups": 15}  # 240 images
DPO = {"train.algorithm": "dpo", "train.log_prob": "mean", "train.dpo_beta": 1000.0}
DPOK = {"train.algorithm": "dpok"}
SLOW, FAST = {"train.learning_rate": 2e-3}, {"train.learning_rate": 8e-3}
DFUSION_RATES = [{"train.learning_rate": rate} for rate in (2e-3, 4e-3, 8e-3)]
DFUSION = Design(
    folder="docs/d-fusion",
    tasks={
        "attribute": ATTRIBUTE,
        "relation": Task("clip", "right", "relation", images=4),
    },
    shared={
        "sample.branches": 16, "schedule.kind": "constant", "schedule.untrained": 4, "train.log_prob": "sum",
        "train.clip_range": 0.2, "train.learning_rate": 4e-3,
    },
    arms={
        "dpo": {**ALONE, **DPO, "select.credit": "ranked"},
        "dpo_fused": {**FUSED, **DPO, **SLOW},
        "ddpo": {**ALONE, **FAST},
        "ddpo_fused": {**FUSED, **SLOW},
        "dpok": {**ALONE, **DPOK, **FAST},
        "dpok_fused": {**FUSED, **DPOK, **SLOW},
        "dpo_fused_all": {**FUSED, **DPO, **SLOW, "fusion.mask": "all"},
        "dpo_fused_from_0": {**FUSED, **DPO, **SLOW, "fusion.first_step": 0},
    },
    budget=720,
    less={},
    grid={
        "dpo": DFUSION_RATES,
        "dpo_fused": [
            *DFUSION_RATES, {**FAST, "schedule.untrained": 0},
            {**FAST, "schedule.untrained": 0, "train.step_weights": "inverse_gain"},
        ],
        "ddpo": DFUSION_RATES,
        "ddpo_fused": DFUSION_RATES,
    },
    comparisons=(
        ("dpo_fused", "dpo"), ("ddpo_fused", "ddpo"), ("dpok_fused", "dpok"), ("dpo_fused", "dpo_fused_all"),
        ("dpo_fused", "dpo_fused_from_0"),
    ),
)  # fmt: skip
DESIGNS = {"sparse": SPARSE, "flow": FLOW, "dfusion": DFUSION}
