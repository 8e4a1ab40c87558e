"""D-Fusion's pairs: reference, base, target and mask side by side, on the page and as a picture.

`python -m b2diffurl.report.fused model/lora/NAME/stage0 --out FILE` draws the picture.
"""

import argparse
import pathlib
import sys

from PIL import Image, ImageDraw

from ..errors import UserError
from ..run import storage
from .embedded import encoded

PAIRS = 6  # of a stage, shown
TILE, LABEL, HEAD = 96, 120, 20  # pixels, of the picture: a tile's side, the prompt's width, the heading's height
VALUES = {
    "reference": "reward_reference", "base": "reward_base", "target": "reward_target", "mask": "mask_share",
}  # fmt: skip


def strip(folder, stage):
    """{stage, pairs: [{prompt, tiles: [{name, image, value}]}]} for the page; None without targets.

    folder: of the stage. value: a picture's reward, a mask's share of its picture.
    """
    if not (folder / "fused.json").exists() or not (folder / "fused").is_dir():
        return None
    shown = [
        {
            "prompt": row["prompt"],
            "tiles": [
                {"name": name, "image": encoded(image), "value": row[VALUES[name]]}
                for name, image in pictures(folder, row).items()
            ],
        }
        for row in widest(folder)
    ]
    return {"stage": stage, "pairs": shown} if shown else None


def widest(folder):
    """The PAIRS rows of fused.json, of different prompts, whose reference is furthest above its base in reward."""
    rows, found = storage.read_json(folder / "fused.json", "run_fuse.py"), {}
    for row in sorted(rows, key=lambda row: row["reward_base"] - row["reward_reference"]):
        found.setdefault(row["prompt"], row)
    return [*found.values()][:PAIRS]


def pictures(folder, row):
    """{name: PIL image} of a row of fused.json, TILE pixels a side at most; the mask with its own few pixels seen."""
    own = {"reference": "images", "base": "images", "target": "fused", "mask": "fused"}
    found = {name: Image.open(folder / place / row[name], formats=["PNG"]) for name, place in own.items()}
    found["mask"] = found["mask"].resize((TILE, TILE), Image.Resampling.NEAREST)
    return {name: _fitted(image) for name, image in found.items()}


def _fitted(image):
    image = image.convert("RGB")
    image.thumbnail((TILE, TILE))
    return image


def draw(folder):
    """-> PIL image: a line for every pair that widest chooses, the prompt and then the four pictures."""
    rows = widest(folder)
    sheet = Image.new("RGB", (LABEL + 4 * (TILE + 4), HEAD + len(rows) * (TILE + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(VALUES):
        pen.text((LABEL + number * (TILE + 4), 4), name, fill="black")
    for line, row in enumerate(rows):
        top = HEAD + line * (TILE + 4)
        pen.text((4, top + TILE // 2 - 12), row["prompt"][:20], fill="black")
        for number, image in enumerate(pictures(folder, row).values()):
            place = LABEL + number * (TILE + 4), top
            sheet.paste(image.resize((TILE, TILE), Image.Resampling.NEAREST), place)
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.report.fused", description="A stage's fused targets.")
    parser.add_argument("stage", type=pathlib.Path, metavar="model/lora/NAME/stage0", help="folder of a stage")
    parser.add_argument("--out", required=True, help="the picture, a PNG")
    given = parser.parse_args()
    try:
        draw(given.stage).save(given.out)
    except (UserError, OSError) as error:
        sys.exit(f"report: {error}")
