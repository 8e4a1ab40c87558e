"""Captions and prompt lists of the three templates, the noise in the training captions, and the way back from text.

The templates mirror the paper's: attribute ~ "yellow banana", relation ~ "cup on table", composition ~ two attributes
bound together in one prompt.
"""

import itertools
import re

import numpy as np

from .scene import COLOURS, RELATIONS, SHAPES

TEMPLATES = ("attribute", "relation", "composition")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

# Share of wrong training captions. A wrong caption is wrong in one systematic way (each colour has one partner it is
# mistaken for, relations flip, the two colours of a pair change places): guidance sharpens unstructured noise away.
CAPTION_NOISE = {"attribute": 0.45, "relation": 0.30, "composition": 0.30}

_PATTERNS = {
    "attribute": re.compile(rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"),
    "relation": re.compile(rf"a ({'|'.join(SHAPES)}) ({'|'.join(RELATIONS)}) a ({'|'.join(SHAPES)})"),
    "composition": re.compile(
        rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) and a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    ),
}


def partner(colour):
    """The colour index that noisy captions take `colour` for: red-yellow, green-cyan, blue-magenta."""
    return colour ^ 1


def caption_scenes(template, scenes, rng=None):
    """Captions of a batch of scenes; with rng (numpy Generator) the template's share of them is wrong."""
    n = len(scenes)
    shape, colour, relation = scenes.shape, scenes.colour.copy(), scenes.relation.copy()
    if rng is not None:
        wrong = rng.random(n) < CAPTION_NOISE[template]
        if template == "attribute":
            colour[wrong] = partner(colour[wrong])
        elif template == "relation":
            relation[wrong] ^= 1
        else:
            colour[wrong] = colour[wrong, ::-1]
    if template == "attribute":
        return [f"a {COLOURS[c]} {SHAPES[s]}" for c, s in zip(colour[:, 0], shape[:, 0], strict=True)]
    if template == "relation":
        return [f"a {SHAPES[a]} {RELATIONS[r]} a {SHAPES[b]}" for (a, b), r in zip(shape, relation, strict=True)]
    pairs = zip(colour, shape, strict=True)
    return [f"a {COLOURS[c]} {SHAPES[a]} and a {COLOURS[d]} {SHAPES[b]}" for (c, d), (a, b) in pairs]


def swap(caption, rng):
    """The caption with one thing made false: another colour, the opposite relation, or the two colours exchanged."""
    template, words = parse(caption)
    if template == "attribute":
        other = rng.choice([c for c in COLOURS if c != words[0]])
        return f"a {other} {words[1]}"
    if template == "relation":
        return f"a {words[0]} {OPPOSITE[words[1]]} a {words[2]}"
    return f"a {words[2]} {words[1]} and a {words[0]} {words[3]}"


def parse(caption):
    """Caption -> (template, its words in order). Raises ValueError for text outside the three templates."""
    for template, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(caption.strip()):
            return template, match.groups()
    raise ValueError(f"not a shapes prompt: {caption!r} (like 'a red circle', 'a ring above a cross')")


def understood(caption):
    """Whether a text is a caption of this world."""
    return any(pattern.fullmatch(caption.strip()) for pattern in _PATTERNS.values())


def all_captions(template):
    """Every caption of a template, in a fixed order."""
    if template == "attribute":
        return [f"a {c} {s}" for s in SHAPES for c in COLOURS]
    pairs = list(itertools.permutations(SHAPES, 2))
    if template == "relation":
        return [f"a {a} {r} a {b}" for a, b in pairs for r in RELATIONS]
    colours = list(itertools.permutations(COLOURS, 2))
    return [f"a {c} {a} and a {d} {b}" for a, b in pairs for c, d in colours]


def prompt_lists(template):
    """(train, held-out) prompts, disjoint: 15 + 15 attributes, 40 + 40 relations, 40 + 40 compositions.

    Every colour, shape and relation occurs in both lists; what is held out is the combination.
    """
    captions = all_captions(template)
    if template == "attribute":
        odd = [(i // len(COLOURS) + i % len(COLOURS)) % 2 for i in range(len(captions))]
        return [c for c, o in zip(captions, odd, strict=True) if not o], [
            c for c, o in zip(captions, odd, strict=True) if o
        ]
    order = np.random.default_rng(0).permutation(len(captions))
    return [captions[i] for i in sorted(order[:40])], [captions[i] for i in sorted(order[40:80])]


def paired_lists():
    """(train, held-out) attribute prompts, disjoint, 20 + 10: a shape has both colours of a confused pair or neither.

    With one of them, as in prompt_lists, drawing it always would be right on the list and wrong on the other.
    """
    lists = [[], []]
    for shape, pair in itertools.product(range(len(SHAPES)), range(len(COLOURS) // 2)):
        held_out = (shape + pair) % 3 == 0  # one pair per shape
        lists[held_out].extend(f"a {COLOURS[colour]} {SHAPES[shape]}" for colour in (2 * pair, partner(2 * pair)))
    return tuple(lists)
