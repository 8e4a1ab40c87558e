"""D-Fusion: the regions, the mixing, one step by two plain passes, and the stages that train on fused targets."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_sdxl
import torch
from PIL import Image
from safetensors.torch import load_file
from small import SHAPE, TOKENS, policy_of, random_prompts

from b2diffurl import fusion, gaussian
from b2diffurl.errors import UserError
from b2diffurl.families import load_family, lora
from b2diffurl.families.sd import StableDiffusion
from b2diffurl.models import Models
from b2diffurl.noise import stream_noise
from b2diffurl.report import fused as report
from b2diffurl.run.command import parse
from b2diffurl.selection import select_pairs
from b2diffurl.shapes import oracle
from b2diffurl.stages import fuse, preflight, sample, select, train
from b2diffurl.stages.loop import run_stage
from b2diffurl.words import content_tokens, thresholds

NAN = math.nan
PAIRS = 2
SMALL = (
    "method=dfusion", "sample.groups=3", "sample.branches=5", "schedule.stage_count=2", "schedule.left=3",
    "schedule.right=5", "schedule.untrained=1", "sample.num_steps=6", "train.trajectories_per_update=2",
    "evaluate.images_per_prompt=1", "sample.batch_size=5", "fusion.first_step=4", "exp_name=t", "train.log_prob=mean",
)  # fmt: skip


def configure(folder, stage, *more):
    flags = [f"--config.{own}" for own in (*SMALL, f"save_path={folder}", f"stage={stage}", *more)]
    return parse(["x", "--config", "config/stage_process.py:shapes", *flags])[0]


def brute_region(maps, levels, kind):
    """By loops over pictures, places and tokens."""
    found = torch.zeros(maps.shape[:2], dtype=torch.bool)
    for b in range(len(maps)):
        for token in range(maps.shape[2]):
            level, own = levels[b, token].item(), maps[b, :, token].tolist()
            if math.isnan(level):
                continue
            if kind == "quantile":
                kept = sorted(own, reverse=True)[: max(1, round(level * len(own)))]
                chosen = [value in kept for value in own]
            else:
                least = level * max(own) if kind == "maximum" else level
                chosen = [value >= least for value in own]
            found[b] |= torch.tensor(chosen)
    return found


@pytest.mark.parametrize("kind", ["quantile", "maximum", "absolute"])
def test_regions_are_those_of_loops(kind):
    maps = torch.rand(3, 16, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    levels = torch.tensor([[NAN, 0.2, NAN, 0.2, NAN], [0.01, NAN, NAN, NAN, 0.25], [NAN, NAN, 1.0, NAN, NAN]])
    found = fusion.region(maps, levels, kind)
    assert torch.equal(found, brute_region(maps, levels, kind))
    assert 0 < found.float().mean() < 1


def test_everything_is_a_region_too_and_a_quantile_is_never_nothing():
    maps = torch.rand(1, 9, 2, generator=torch.Generator().manual_seed(0))
    assert fusion.region(maps, torch.full((1, 2), NAN), "all").all()
    assert fusion.region(maps, torch.tensor([[0.0, NAN]]), "quantile").sum() == 1
    assert not fusion.region(maps, torch.full((1, 2), NAN), "maximum").any()


def test_keys_are_mixed_by_the_nearest_place_of_the_mask():
    keys = torch.randn(2 * 2 * PAIRS, 16, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, False, True], [False, False, True, False]])
    found, halves = fusion.mix(keys, mask, 2), 2 * PAIRS
    for half in range(2):
        for pair in range(PAIRS):
            reference, target = half * halves + pair, half * halves + PAIRS + pair
            assert torch.equal(found[reference], keys[reference])
            for place in range(16):
                row, column = divmod(place, 4)
                own = reference if mask[pair, row // 2 * 2 + column // 2] else target
                assert torch.equal(found[target, place], keys[own, place])


@pytest.fixture
def fused(scheduler):
    """A policy with a LoRA that says something, latents of two references and two targets, prompts, and thresholds."""
    from small import build_unet

    unet = build_unet()
    for name, own in lora.add(unet, StableDiffusion.lora_targets, 4, seed=3).items():
        torch.nn.init.normal_(own, 0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    unet.requires_grad_(False)
    latents = torch.randn(2 * PAIRS, *SHAPE, generator=torch.Generator().manual_seed(1))
    levels = torch.full((PAIRS, TOKENS), NAN)
    levels[0, 3], levels[1, [2, 7]] = 0.3, 0.2
    return policy_of(unet, scheduler), latents, random_prompts(PAIRS), levels


def prediction(policy, latents, cond, around=None):
    """The guided prediction of step 7 for references and targets, with the fusion where one is given."""
    twice = {name: own.repeat(len(latents) // len(own), 1, 1) for name, own in cond.items()}
    time = policy.kernel.time(torch.full((len(latents),), 7))
    call = lambda: policy.family.predict(policy.denoiser, latents, time, twice, policy.negative, 5.0)  # noqa: E731
    if around is None:
        return call()
    with around.on():
        return call()


class Attention:
    """A plain attention processor of one picture: it notes keys and values, or takes others' where a mask says so."""

    def __init__(self, name, notes, mask=None):
        self.name, self.notes, self.mask = name, notes, mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states)[0], attn.to_k(text)[0], attn.to_v(text)[0]
        if self.mask is not None and encoder_hidden_states is None and self.name.startswith(("mid", "up")):
            side, here = int(len(self.mask) ** 0.5), int(len(key) ** 0.5)
            at = torch.arange(here) * side // here
            grid = self.mask.view(side, side)[at][:, at]
            theirs, grid = self.notes[self.name], grid.reshape(-1, 1).float()
            key, value = grid * theirs[0] + (1 - grid) * key, grid * theirs[1] + (1 - grid) * value
        heads, probabilities = [], []
        for own in torch.arange(query.shape[1]).chunk(attn.heads):
            weights = torch.softmax(query[:, own] @ key[:, own].T / len(own) ** 0.5, -1)
            probabilities.append(weights)
            heads.append(weights @ value[:, own])
        if self.mask is None:
            self.notes[self.name] = key, value, torch.stack(probabilities).mean(0)
        return attn.to_out[0](torch.cat(heads, -1))[None]


def by_two_passes(policy, reference, target, cond, level, looked):
    """The target's guided prediction: a pass of the reference that notes, then one of the target that takes."""
    unet, halves, notes = policy.denoiser, [], ({}, {})
    names, time = list(unet.attn_processors), policy.kernel.time(torch.tensor([7]))
    negative = policy.negative["encoder_hidden_states"]
    for own, text in zip(notes, (negative, cond), strict=True):
        unet.set_attn_processor({name: Attention(name, own) for name in names})
        unet(reference[None], time, encoder_hidden_states=text)
    maps = torch.stack([notes[1][name][2] for name in names if name.startswith(looked) and ".attn2." in name]).mean(0)
    mask = brute_region(maps[None], level[None], "quantile")[0]
    for own, text in zip(notes, (negative, cond), strict=True):
        unet.set_attn_processor({name: Attention(name, own, mask) for name in names})
        halves.append(unet(target[None], time, encoder_hidden_states=text).sample)
    return halves[0] + 5 * (halves[1] - halves[0]), mask


@torch.no_grad()
def test_one_call_fuses_as_two_plain_passes_do(fused):
    """The reference's pass first and then the target's, with explicit attention: the authors' order of things."""
    policy, latents, cond, levels = fused
    around = fusion.Fusion(policy.family, policy.denoiser, levels, "quantile")
    found, plain = prediction(policy, latents, cond, around), prediction(policy, latents, cond)
    processors = policy.denoiser.attn_processors
    for pair in range(PAIRS):
        own = cond["encoder_hidden_states"][pair : pair + 1]
        target = latents[PAIRS + pair]
        wanted, mask = by_two_passes(policy, latents[pair], target, own, levels[pair], "down_blocks.0")
        assert torch.equal(around.mask[pair], mask)
        assert 0 < mask.float().mean() < 1
        torch.testing.assert_close(found[PAIRS + pair], wanted[0], rtol=1e-3, atol=1e-4)
        assert (found[PAIRS + pair] - plain[PAIRS + pair]).abs().max() > 1e-2
    policy.denoiser.set_attn_processor(processors)


@torch.no_grad()
def test_no_mask_changes_nothing_and_a_full_one_not_the_reference(fused):
    policy, latents, cond, levels = fused
    plain = prediction(policy, latents, cond)
    never = fusion.Fusion(policy.family, policy.denoiser, levels * 0 + 2, "absolute")  # no probability is 2
    assert torch.equal(prediction(policy, latents, cond, never), plain)
    always = fusion.Fusion(policy.family, policy.denoiser, levels, "all")
    full = prediction(policy, latents, cond, always)
    assert torch.equal(full[:PAIRS], plain[:PAIRS])
    assert (full[PAIRS:] - plain[PAIRS:]).abs().max() > 1e-2
    same = latents[:PAIRS].repeat(2, 1, 1, 1)  # a target that is its reference
    torch.testing.assert_close(prediction(policy, same, cond, always), prediction(policy, same, cond))
    assert torch.equal(prediction(policy, latents, cond), plain)  # nothing is left in the denoiser


def test_looked_at_is_a_quarter_of_the_side_and_fused_from_the_middle_up():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(8, 8, 8, 8), layers_per_block=2, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=8,
    )  # fmt: skip
    names = {layer: name for name, layer in unet.named_modules()}
    fused, looked = ([names[layer] for layer in own] for own in StableDiffusion.attentions(StableDiffusion(None), unet))
    assert {name.split(".attentions")[0] for name in fused} == {f"up_blocks.{i}" for i in (1, 2, 3)} | {"mid_block"}
    assert len(fused) == 10  # SD 1.x: mid and up, self-attention
    assert [name.split(".attentions")[0] for name in looked] == ["down_blocks.2"] * 2  # its two of 16x16


def test_words_are_what_is_no_stop_word():
    spans = [(0, 0), (0, 1), (2, 5), (6, 9), (9, 13), (14, 16), (17, 18), (19, 25), (25, 26), (0, 0)]
    assert content_tokens("a Red catfish on a bridge.", spans) == [2, 3, 4, 7]
    assert content_tokens("the dog's", [(0, 3), (4, 7), (7, 8), (8, 9)]) == [1]
    row = thresholds("a Red catfish on a bridge.", spans, {}, 0.5)
    assert [place for place, own in enumerate(row) if own == 0.5] == [2, 3, 4, 7]
    assert sum(map(math.isnan, row)) == 6
    given = {"positions": [2, 6], "thresholds": [0.03, 0]}  # among the prompt's own tokens, as the authors count
    row = thresholds("a Red catfish on a bridge.", spans, given, 0.5)
    assert {place: own for place, own in enumerate(row) if not math.isnan(own)} == {3: 0.03, 7: 0.0}


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        ("of the", {}, "no content word"),
        ("a cat", {"positions": [2]}, "from 0 to 1"),
        ("a cat", {"positions": []}, "from 0 to 1"),
        ("a cat", {"positions": 1}, "from 0 to 1"),
        ("a cat", {"positions": [1], "thresholds": [0.1, 0.2]}, "a list of 1 numbers"),
        ("a cat", {"thresholds": 0.1}, "a list of 1 numbers"),
        ("a cat", {"thresholds": ["x"]}, "a list of 1 numbers"),
        ("a cat", {"thresholds": [NAN]}, r"in \[0, 1\]"),
        ("a cat", {"thresholds": [5]}, r"in \[0, 1\]"),
        ("a cat", {"positions": [1.0]}, "from 0 to 1"),
        ("a cat", {"positions": [True]}, "from 0 to 1"),
    ],
)
def test_words_that_cannot_be_are_one_line(prompt, given, message):
    spans = [(0, 0), *[(m, m + len(w)) for m, w in ((prompt.index(w), w) for w in prompt.split())], (0, 0)]
    with pytest.raises(UserError, match=message) as caught:
        thresholds(prompt, spans, given, 0.5)
    assert "\n" not in str(caught.value)


def test_references_are_the_best_quarter_twice_and_bases_the_worst_half():
    scores = np.random.default_rng(0).permutation(16).astype(float)[None]
    order = [int(place) for place in np.argsort(-scores[0])]
    wanted = [(0, order[place // 2], order[8 + place]) for place in range(8)]  # the authors' pairing
    assert select_pairs(scores) == wanted
    assert select_pairs([[1, 1, 1, 1]]) == []  # nothing is better than anything
    assert select_pairs([[0, 1, 1, 0, 0, 0], [3, 2, 1, 0, 5, 4]]) == [(0, 1, 4), (0, 1, 5), (1, 4, 2), (1, 4, 3)]
    with pytest.raises(ValueError, match="4 branches"):
        select_pairs([[1, 2, 3]])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two stages of dfusion with ddpo_is; in the second the interval begins before the first fused step."""
    folder = tmp_path_factory.mktemp("fused")
    with contextlib.chdir(pathlib.Path(__file__).parent.parent):
        loaded = Models(configure(folder, 0))
        for stage in (0, 1):
            run_stage(configure(folder, stage), loaded=loaded)
    return folder


def records(folder, step):
    lines = (folder / "t/metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["step"] == step]


def rows_of(stage):
    return json.loads((stage / "fused.json").read_text())


def picture(path):
    return np.asarray(Image.open(path), dtype=np.float64) / 255


@pytest.mark.usefixtures("elsewhere")
def test_what_a_fused_stage_leaves(finished):
    for number in (0, 1):
        stage = finished / f"t/stage{number}"
        rows, scores = rows_of(stage), json.loads((stage / "scores.json").read_text())["scores"]
        by_name = {row["image"]: row for row in scores}
        rewards = np.array([row["reward"] for row in scores]).reshape(3, 5)
        assert [(r["group"], r["reference"], r["base"]) for r in rows] == [
            (g, f"{5 * g + best:05d}.png", f"{5 * g + worst:05d}.png") for g, best, worst in select_pairs(rewards)
        ]
        assert {row["image"] for row in scores if row["kept"]} == {
            r[name] for r in rows for name in ("reference", "base")
        }
        images, prompts = [Image.open(stage / "fused" / row["target"]) for row in rows], [row["prompt"] for row in rows]
        with Models(configure(finished, number)).scoring() as reward:
            wanted = reward.score(images, prompts)[0]
        line = next(line for line in records(finished, "fuse") if line["stage"] == number)
        assert line["fuse/targets"] == line["fuse/kept"] == len(rows) == 6
        trained = [np.mean(row["kl"][:-1]) for row in rows]  # schedule.untrained=1
        assert line["fuse/kl"] == pytest.approx(np.mean(trained), rel=1e-3, abs=1e-4)
        for name, folder in (("target", "fused"), ("base", "images"), ("reference", "images")):
            right = oracle.verdicts([Image.open(stage / folder / row[name]) for row in rows], prompts)
            assert line[f"fuse/{name}_oracle"] == pytest.approx(right.mean(), abs=1e-6)
        for row, own in zip(rows, wanted, strict=True):
            assert row["reward_target"] == pytest.approx(own, abs=1e-6)
            assert row["reward_base"] == by_name[row["base"]]["reward"] < row["reward_reference"]
            assert row["reward_reference"] == by_name[row["reference"]]["reward"]
            base = picture(stage / "images" / row["base"])
            for name, other in (
                ("distance", "fused/" + row["target"]),
                ("reference_distance", "images/" + row["reference"]),
            ):
                assert row[name] == pytest.approx(np.sqrt(((picture(stage / other) - base) ** 2).mean()), abs=1e-5)
            mask = picture(stage / "fused" / row["mask"])
            assert mask.mean() == pytest.approx(row["mask_share"], abs=0.01)
            assert mask.shape == (4, 4)
    queries = [line["reward/queries"] for line in records(finished, "fuse")]
    assert queries == [21, 42]
    assert [line["reward/queries"] for line in records(finished, "select")] == [15, 36]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("number", [0, 1])
@torch.no_grad()
def test_targets_are_their_bases_until_the_fusion_and_have_the_plain_policys_densities(finished, number):
    stage, config = finished / f"t/stage{number}", configure(finished, number)
    stored, sampled, rows = (
        load_file(stage / "fused.safetensors"),
        load_file(stage / "samples.safetensors"),
        rows_of(stage),
    )
    start, length = (3, 2) if number == 0 else (2, 3)  # the last of six steps is not trained on
    before = finished / "t/stage0/checkpoints/checkpoint_1" if number else None
    policy = Models(config).policy(before)
    states = stored["states"].unflatten(0, (len(rows), 2 + 2 * length))
    path = lambda side: torch.cat([states[:, side, None], states[:, 2 + side * length :][:, :length]], 1)  # noqa: E731
    base, target = path(0), path(1)
    per_group = sampled["states"].unflatten(0, (3, -1))
    for pair, row in enumerate(rows):
        branch, group = int(row["base"][:5]) % 5, row["group"]
        assert torch.equal(base[pair, 0], per_group[group, branch])
        assert torch.equal(base[pair, 1:], per_group[group, 5 + branch * length :][:length])
    same = max(0, 4 - start)  # steps before the first that is fused
    torch.testing.assert_close(target[:, : same + 1], base[:, : same + 1], rtol=1e-4, atol=1e-4)
    assert (target[:, same + 1] - base[:, same + 1]).abs().max() > 1e-3
    cond = {"encoder_hidden_states": stored["cond.encoder_hidden_states"][stored["prompt"].view(len(rows), -1)[:, 0]]}
    for side, own in enumerate((base, target)):
        for k in range(length):
            mean, sigma = policy.transition(own[:, k], torch.full((len(rows),), start + k), cond)
            wanted = gaussian.log_prob(own[:, k + 1], mean, sigma)
            found = stored["log_prob"].view(len(rows), 2, length)[:, side, k]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("elsewhere")
def test_the_report_shows_each_prompts_pair(finished):
    stage = finished / "t/stage0"
    rows, shown = rows_of(stage), report.strip(stage, 0)["pairs"]
    rows.sort(key=lambda row: row["reward_reference"] - row["reward_base"], reverse=True)  # the widest pairs
    assert [pair["prompt"] for pair in shown] == list(dict.fromkeys(row["prompt"] for row in rows))
    first = rows[0]
    assert [tile["value"] for tile in shown[0]["tiles"]] == [
        first["reward_reference"], first["reward_base"], first["reward_target"], first["mask_share"],
    ]  # fmt: skip
    sheet = np.asarray(report.draw(stage))
    for number, path in enumerate(
        (f"images/{first['reference']}", f"images/{first['base']}", f"fused/{first['target']}")
    ):
        left = report.LABEL + number * (report.TILE + 4)
        tile = sheet[report.HEAD : report.HEAD + report.TILE, left : left + report.TILE]
        assert np.array_equal(tile[1::3, 1::3], np.asarray(Image.open(stage / path)))  # 32 pixels drawn as 96


@pytest.mark.usefixtures("elsewhere")
def test_credit_is_the_targets_and_then_its_bases_worth(finished):
    stage = finished / "t/stage0"
    stored, rows = load_file(stage / "selected.safetensors"), rows_of(stage)
    scores = json.loads((stage / "scores.json").read_text())["scores"]
    wanted = []
    for row in rows:
        own = [other["reward"] for other in scores if other["prompt"] == row["prompt"]]
        wanted += [
            (row[name] - np.mean(own)) / (np.std(own, ddof=1) + 1e-8) for name in ("reward_target", "reward_base")
        ]
    assert stored["sample"].tolist() == [number for number in range(12) for _ in range(2)]
    np.testing.assert_allclose(stored["advantage"][::2], wanted, rtol=1e-4, atol=1e-5)
    assert stored["row"][:4].tolist() == [2, 3, 0, 1]  # of a pair the target's transitions, then the base's


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "more", [("train.algorithm=dpok",), ("train.algorithm=dpo", "train.dpo_reference=base", "train.dpo_clip_range=0.1"),
             ("train.algorithm=dpo", "fusion.keep=better")],
    ids=["dpok", "dpo to the base", "dpo of the better"],
)  # fmt: skip
def test_other_algorithms_train_on_targets(finished, tmp_path, more):
    if "train.algorithm=dpok" in more:
        more = (*more, "fusion.mask=all", "schedule.kind=constant")
    for stage in (0, 1):
        run_stage(configure(tmp_path, stage, *more))
        rows = rows_of(tmp_path / f"t/stage{stage}")
        for row in rows:
            assert row["kept"] == (row["reward_target"] > row["reward_base"] or "fusion.keep=better" not in more)
            assert row["mask_share"] == 1 or "fusion.mask=all" not in more
        stored = load_file(tmp_path / f"t/stage{stage}/selected.safetensors")
        if "train.algorithm=dpok" not in more:
            assert len(stored["sample"].unique()) == sum(row["kept"] for row in rows)
            length = len(stored["row"]) // len(stored["sample"].unique())
            assert torch.equal(stored["row"], stored["rival"] + length)  # the target wins
    for line in records(tmp_path, "train"):
        assert line["policy/ratio_first"] == pytest.approx(1, abs=1e-3)
        assert line["train/updates"] > 0
        assert ("policy/base_clipped" in line) == ("train.dpo_reference=base" in more)


def without(folder, copy, names):
    """A copy of the run whose second stage lacks some files, with half-written ones beside them."""
    shutil.copytree(folder, copy)
    for name in names:
        path = copy / "t/stage1" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (copy / "t/stage1/fused.tmp").mkdir()
    (copy / "t/stage1/fused.tmp/99999.png").write_bytes(b"half")
    (copy / "t/stage1/fused.json.tmp").write_text("[")


@pytest.mark.usefixtures("elsewhere")
def test_interrupted_in_the_fusion_it_ends_the_same(finished, tmp_path):
    names = ["checkpoints", "fused.json", "selected.safetensors", "fused.safetensors", "fused", "scores.json"]
    for number in (2, 4, 6):
        copy = tmp_path / f"copy{number}"
        without(finished, copy, names[:number])
        run_stage(configure(copy, 1))
        for path in (finished / "t/stage1").rglob("*"):
            if path.suffix in (".safetensors", ".png"):
                assert path.read_bytes() == (copy / "t/stage1" / path.relative_to(finished / "t/stage1")).read_bytes()
        assert len(records(copy, "fuse")) == len(records(copy, "train")) == 2
        assert not (copy / "t/stage1/fused.tmp").exists()


def drive(folder, count, *settings):
    """One stage by the driver on `count` processes -> what it printed."""
    flags = [f"--config.{own}" for own in (*SMALL, f"save_path={folder}", "schedule.stage_count=1", *settings)]
    environment = {
        **os.environ, "PYTHON": sys.executable, "PRESET": "shapes", "OMP_NUM_THREADS": "1",
        "LAUNCH": f"torchrun --standalone --nproc_per_node {count}",
    }  # fmt: skip
    command = ["bash", "run_process.sh", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not list((folder / "t/stage0").glob("share*"))
    return done.stdout


def same_targets(ours, theirs):
    """Two stages' targets are the same but for rounding."""
    for mine, other in zip(rows_of(ours), rows_of(theirs), strict=True):
        assert mine["base"] == other["base"]
        assert mine["reward_target"] == pytest.approx(other["reward_target"], abs=0.02)
        found, wanted = (picture(stage / "fused" / mine["target"]) for stage in (ours, theirs))
        assert np.abs(found - wanted).max() < 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_the_driver_runs_the_fourth_script_with_two_processes(finished, tmp_path):
    """Four scripts on two processes leave what one process does, but for rounding."""
    assert "6 targets, reward" in drive(tmp_path, 2, "one_process=False", "schedule.right=3")
    same_targets(finished / "t/stage0", tmp_path / "t/stage0")


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_more_processes_than_pairs_leave_what_one_does(tmp_path):
    """One prompt has two pairs; the third process fuses none, scores none and trains on none."""
    few = tmp_path / "few.json"
    few.write_text('["a red circle"]')
    own = ("sample.groups=1", f"prompts.train={few}", f"prompts.test={few}")
    assert "2 targets, reward" in drive(tmp_path / "three", 3, *own)
    run_stage(configure(tmp_path / "one", 0, *own, "schedule.stage_count=1"))
    one, three = (tmp_path / name / "t/stage0" for name in ("one", "three"))
    same_targets(one, three)
    last = "checkpoints/checkpoint_1/pytorch_lora_weights.safetensors"
    ours, theirs = (load_file(stage / last) for stage in (one, three))
    moved = torch.cat([own.flatten() for name, own in ours.items() if "lora_B" in name or "lora.up" in name])
    off = torch.cat([(ours[n] - theirs[n]).flatten() for n in ours if "lora_B" in n or "lora.up" in n])
    assert moved.abs().max() > 1e-4
    assert off.norm() < 0.05 * moved.norm()  # AdamW's first step follows the gradient's sign, also where it is rounding


@pytest.mark.usefixtures("elsewhere")
def test_fusion_out_of_place_is_one_line(finished, tmp_path):
    for flag, message in (
        ("sample.branches=3", "must be at least 4"), ("select.credit=all", "trains on its pairs"),
        ("fusion.first_step=5", r"must be in 0\.\.4"), ("train.algorithm=ddpo_sf", "the policy itself drew"),
        ("fusion.threshold=1.5", "at most 1"),
        ("fusion.mask=some", "must be one of quantile"), ("train.dpo_clip_range=1", r"must be in \[0, 1\)"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            configure(tmp_path, 0, flag)
    with pytest.raises(UserError, match=r"needs a UNet: in StableDiffusion3Pipeline"):
        load_family(configure(tmp_path, 0, "pretrained.model=model/shapes_flow/pipeline"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle"}\n{"prompt": "a cyan ring", "positions": [3]}\n')
    with pytest.raises(
        UserError, match=r"'a cyan ring': \"positions\" must be .* from 0 to 2"
    ):  # before the first stage
        preflight.main(configure(tmp_path, 0, f"prompts.train={prompts}"))
    with pytest.raises(UserError, match=r"config\.method=b2 fuses nothing"):
        fuse.main(configure(tmp_path, 0, "method=b2"))
    config = configure(tmp_path, 0)
    config.exp_name = "other"
    sample.main(config)
    with pytest.raises(UserError, match=r"scores\.json is missing: run run_select\.py"):
        fuse.main(config)
    select.main(config)
    with pytest.raises(UserError, match=r"selected\.safetensors is missing: run run_fuse\.py"):
        train.main(config)


@pytest.mark.usefixtures("elsewhere")
def test_sdxl_fuses_in_half_precision_too(tmp_path):
    more = (f"pretrained.model={tiny_sdxl.write(tmp_path)}", "mixed_precision=bf16", "reward.name=jpeg_compressibility",
            "evaluate.oracle=False", "train.clip_range=0.3")  # fmt: skip
    run_stage(configure(tmp_path, 0, *more))
    (line,) = records(tmp_path, "fuse")
    assert line["fuse/targets"] == 6
    assert 0.2 < line["fuse/mask_share"] < 1
    assert line["fuse/distance"] > 0
    assert "fuse/target_oracle" not in line
    assert records(tmp_path, "train")[0]["train/updates"] > 0


@pytest.mark.usefixtures("elsewhere")
def test_all_steps_train_in_half_precision(tmp_path):
    """The last step's targets lie many σ off the plain policy's means; the first pass knows, and is not misled."""
    more = ("mixed_precision=bf16", "schedule.untrained=0", "train.algorithm=dpo", "schedule.kind=constant")
    run_stage(configure(tmp_path, 0, *more))
    (line,) = records(tmp_path, "train")
    assert line["train/updates"] > 0
    assert line["policy/prediction_error"] < 0.5


@pytest.mark.usefixtures("elsewhere")
def test_masks_of_nothing_or_everything_are_said(tmp_path, capsys):
    for number, (mask, threshold, what) in enumerate((("absolute", 1.0, "nothing"), ("maximum", 0.0, "everything"))):
        config = configure(tmp_path / str(number), 0, f"fusion.mask={mask}", f"fusion.threshold={threshold}")
        for step in (sample, select, fuse):
            step.main(config)
        assert f"the masks cover {what}" in capsys.readouterr().out


@pytest.mark.usefixtures("elsewhere")
def test_a_later_stage_in_which_nothing_is_better_trains_on_nothing(finished, tmp_path, monkeypatch):
    (tmp_path / "ones.py").write_text("def reward(images, prompts):\n    return [1.0] * len(images)\n")
    monkeypatch.syspath_prepend(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "t/stage1")
    stored = json.loads((copy / "t/config.json").read_text())
    (copy / "t/config.json").write_text(json.dumps({**stored, "reward.name": "ones:reward"}))
    run_stage(configure(copy, 1, "reward.name=ones:reward"))
    assert rows_of(copy / "t/stage1") == []
    assert report.strip(copy / "t/stage1", 1) is None
    assert records(copy, "fuse")[1]["fuse/targets"] == records(copy, "train")[1]["train/updates"] == 0
    last = "checkpoints/checkpoint_1/pytorch_lora_weights.safetensors"
    before, after = (load_file(copy / f"t/stage{number}" / last) for number in (0, 1))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("elsewhere")
def test_what_targets_cost(finished):
    for number, start in ((0, 3), (1, 2)):
        line = next(line for line in records(finished, "fuse") if line["stage"] == number)
        # both at every step, and the plain policy at the two fused ones; two halves of the guidance
        assert line["perf/unet_evals"] == 2 * 6 * (2 * (6 - start) + 2)


@pytest.mark.usefixtures("elsewhere")
@torch.no_grad()
def test_the_kl_is_of_the_fused_mean_in_nats(finished):
    stage, config, length, start = finished / "t/stage0", configure(finished, 0), 2, 3
    stored, rows, policy = load_file(stage / "fused.safetensors"), rows_of(stage), Models(config).policy()
    scores = {row["image"]: row for row in json.loads((stage / "scores.json").read_text())["scores"]}
    states = stored["states"].unflatten(0, (len(rows), 2 + 2 * length))
    target = torch.cat([states[:, 1, None], states[:, 2 + length :]], 1)
    cond = {"encoder_hidden_states": stored["cond.encoder_hidden_states"][stored["prompt"].view(len(rows), -1)[:, 0]]}
    for k in range(length):
        plain, sigma = policy.transition(target[:, k], torch.full((len(rows),), start + k), cond)
        noise = torch.stack([stream_noise(scores[row["base"]]["seed"], 6 - start, target.shape[2:])[k] for row in rows])
        fused = target[:, k + 1] - sigma * noise
        wanted = ((fused - plain) ** 2 / (2 * sigma**2)).flatten(1).sum(1)
        assert [row["kl"][k] for row in rows] == pytest.approx(wanted.tolist(), rel=1e-2, abs=1e-2)
    assert max(row["kl"][1] for row in rows) > 1 > 1e-3 > max(row["kl"][0] for row in rows)
