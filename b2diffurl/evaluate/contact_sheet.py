"""before_after.png: pictures of two models from the same noise, side by side."""

import numpy as np
from PIL import Image, ImageDraw

ROWS, COLUMNS, TILE, LABEL, GAP = 6, 4, 96, 190, 12  # prompts per list, images per prompt and model; pixels


def shown(prompts):
    """Indices of the prompts that get a row: up to ROWS, spread over the list."""
    return sorted({round(i) for i in np.linspace(0, len(prompts) - 1, ROWS)})


def draw(lists, pictures):
    """-> PIL image; lists: {name: prompts}, pictures: {("before" | "after", name): [a shown prompt's images, ...]}."""
    rows = [(name, place, i) for name in lists for place, i in enumerate(shown(lists[name]))]
    width = max(len(images) for prompts in pictures.values() for images in prompts)
    sheet = Image.new("RGB", (LABEL + 2 * width * TILE + GAP, 20 + len(rows) * (TILE + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for half, model in enumerate(("before", "after")):
        left = LABEL + half * (width * TILE + GAP)
        pen.text((left, 4), model, fill="black")
        for row, (name, place, i) in enumerate(rows):
            top = 20 + row * (TILE + 4)
            pen.text((4, top + TILE // 2 - 12), f"{name}\n{lists[name][i][:30]}", fill="black")
            for k, image in enumerate(pictures[model, name][place]):
                smooth = Image.Resampling.LANCZOS if image.width > TILE else Image.Resampling.NEAREST
                sheet.paste(image.resize((TILE, TILE), smooth), (left + k * TILE, top))
    return sheet
