"""The ladder of sparse rewards: each rung is its conditions, on drawn scenes whose truth is known."""

import numpy as np
import pytest
from PIL import Image

from b2diffurl.shapes import ladder
from b2diffurl.shapes.scene import COLOURS, SHAPES, SIZE, render, sample_scenes


@pytest.fixture(scope="module")
def drawn():
    """(scenes, their PIL images, true prompts) of 400 one-object scenes."""
    scenes = sample_scenes("attribute", 400, np.random.default_rng(0))
    pictures = (render(scenes).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    prompts = [f"a {COLOURS[c]} {SHAPES[s]}" for c, s in zip(scenes.colour[:, 0], scenes.shape[:, 0], strict=True)]
    return scenes, [Image.fromarray(picture) for picture in pictures], prompts


def test_every_rung_is_its_conditions(drawn):
    scenes, images, prompts = drawn
    left, dark = scenes.centre[:, 0, 0] < ladder.LEFT, scenes.grey.mean(1) < ladder.DARK
    plain = scenes.texture == 0
    clear = (abs(scenes.centre[:, 0, 0] - ladder.LEFT) > 0.5) & (abs(scenes.grey.mean(1) - ladder.DARK) > 0.04)
    for rung, wanted in (
        (ladder.right, np.ones(400)), (ladder.right_dark, dark), (ladder.right_left, left),
        (ladder.right_plain, plain),
        (ladder.right_dark_left, dark & left),
    ):  # fmt: skip
        found = rung(images, prompts)
        assert (found == wanted)[clear].mean() > 0.97
        assert wanted[clear].sum() > 20
        assert found[clear & (wanted > 0)].mean() > 0.95  # else the many that are worth nothing would hide the few


def test_a_wrong_picture_is_worth_nothing_on_any_rung(drawn):
    _, images, prompts = drawn
    wrong = [
        prompt.replace(prompt.split()[1], COLOURS[(COLOURS.index(prompt.split()[1]) + 2) % 6]) for prompt in prompts
    ]
    for rung in (ladder.right, ladder.right_dark, ladder.right_plain, ladder.right_left, ladder.right_dark_left):
        assert not rung(images, wrong).any()


def test_another_worlds_prompts_are_said_so(drawn):
    with pytest.raises(ValueError, match="the miniature world's pictures and prompts alone"):
        ladder.right_dark(drawn[1][:1], ["a cat washing dishes"])


def test_a_picture_of_nothing_is_worth_nothing():
    assert ladder.right_dark_left([Image.new("RGB", (SIZE, SIZE), (20, 20, 20))], ["a red circle"]).tolist() == [0]
