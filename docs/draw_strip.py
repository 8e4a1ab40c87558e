"""Draws docs/before_after.png, the default run before and after: `python docs/draw_strip.py`, at the repository's root.

Six prompts of the train list and two held-out ones, each with its first picture from the evaluation's noise; where the
oracle takes all eight of the trained model's, the last train prompt gives way to the first picture that it refuses.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from PIL import Image, ImageDraw, ImageFont

from b2diffurl.evaluate.before_after import generate
from b2diffurl.models import Models
from b2diffurl.run.command import parse
from b2diffurl.run.prompts import read_prompts
from b2diffurl.shapes.oracle import verdicts

RUN = pathlib.Path("model/lora/shapes_b2")
TILE, GAP, SIDE, TOP, LINE = 112, 6, 60, 40, 22  # pixels: a picture's side, between them, left, above, of a mark's line


def spread(prompts, count):
    """So many prompts, evenly from the list."""
    return [prompts[round(i * (len(prompts) - 1) / (count - 1))] for i in range(count)]


def chosen(lists, images, count):
    """[(list, prompt, place among the list's images)] of the eight."""
    picked = [
        (name, prompt, lists[name].index(prompt) * count)
        for name, number in (("train", 6), ("held-out", 2))
        for prompt in spread(lists[name], number)
    ]
    repeated = {name: [prompt for prompt in own for _ in range(count)] for name, own in lists.items()}
    right = {name: verdicts(images[name], repeated[name]) for name in lists}
    if all(right[name][place] for name, _, place in picked):
        wrong = [("train", repeated["train"][i], i) for i in range(len(right["train"])) if not right["train"][i]]
        picked[5:6] = wrong[:1] or picked[5:6]
    return [(*own, bool(right[own[0]][own[2]])) for own in picked]


def draw(picked, before, after):
    """-> PIL image: prompts, the base model's pictures, the trained model's, and what the oracle says of these."""
    sheet = Image.new("RGB", (SIDE + 8 * (TILE + GAP), TOP + 2 * (TILE + GAP) + LINE), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for line, name in enumerate(("before", "after")):
        pen.text((4, TOP + line * (TILE + GAP) + TILE // 2 - 8), name, fill="black", font=font)
    for column, (name, prompt, place, right) in enumerate(picked):
        left = SIDE + column * (TILE + GAP)
        pen.text((left, 4), prompt + ("\n(held-out)" if name == "held-out" else ""), fill="black", font=font)
        for line, images in enumerate((before, after)):
            picture = images[name][place].resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, TOP + line * (TILE + GAP)))
        pen.text((left, TOP + 2 * (TILE + GAP)), "right" if right else "wrong", fill="black", font=font)
    return sheet


if __name__ == "__main__":
    config = parse(["draw_strip", "--config", "config/stage_process.py:shapes"])[0]
    lists = {"train": read_prompts(config.prompts.train), "held-out": read_prompts(config.prompts.test)}
    checkpoint = RUN / f"stage{config.schedule.stage_count - 1}/checkpoints/checkpoint_1"
    loaded = Models(config).evaluating()
    before, after = (generate(loaded, lists, folder, "strip") for folder in (None, checkpoint))
    draw(chosen(lists, after, config.evaluate.images_per_prompt), before, after).save("docs/before_after.png")
