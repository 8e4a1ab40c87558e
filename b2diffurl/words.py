"""Which tokens of a prompt say what is in the picture, for D-Fusion's masks."""

import math
import re

from .errors import UserError

STOP_WORDS = frozenset(  # they lie on no region of their own
    re.findall(
        r"\w+",
        """
        a an the this that these those some any each every no its his her their my your our it he she they we you i
        and or but nor not with without of in on at to from by for as into onto over under above below behind beside
        between near next left right top bottom front inside outside
        is are was were be being been has have had do does did there while very
        """,
    )
)


MASKS = ("quantile", "maximum", "absolute", "all")  # what fusion.region makes of a word's attention map


def content_tokens(prompt, spans):
    """The tokens of the words that are no stop words, as their places in spans.

    spans: (first, last) characters of each token in the prompt; the same twice for what is no part of it.
    """
    words = [(w.start(), w.end()) for w in re.finditer(r"(?<!['’])\b[^\W_]+", prompt) if w[0].lower() not in STOP_WORDS]
    return [
        place
        for place, (first, last) in enumerate(spans)
        if any(begin < last and first < end for begin, end in words) and first < last
    ]


def thresholds(prompt, spans, given, threshold):
    """A prompt's row for fusion.region: the threshold at each token of a word, nan at the others (len(spans),) floats.

    given: what the prompt file says of the prompt: "positions" are places among the prompt's own tokens, from 0, in
    place of all its content words; "thresholds" are theirs, in place of `threshold`, a number each. UserError where
    there are no such tokens.
    """
    own = [place for place, (first, last) in enumerate(spans) if first < last]
    positions = given.get("positions")
    if positions is None:
        places = content_tokens(prompt, spans)
        if not places:
            raise UserError(
                f'prompt {prompt!r}: no content word in what the model reads of it; give its "positions" in a .jsonl'
            )
    elif not (isinstance(positions, list) and positions and all(_is_place(p, len(own)) for p in positions)):
        raise UserError(
            f'prompt {prompt!r}: "positions" must be a list of numbers from 0 to {len(own) - 1}, its tokens'
        )
    else:
        places = [own[position] for position in positions]
    levels = given.get("thresholds", [threshold] * len(places))
    if not isinstance(levels, list) or len(levels) != len(places) or not all(map(_is_level, levels)):
        raise UserError(
            f'prompt {prompt!r}: "thresholds" must be a list of {len(places)} numbers in [0, 1], one for each token'
        )
    row = [math.nan] * len(spans)
    for place, level in zip(places, levels, strict=True):
        row[place] = float(level)
    return row


def _is_place(value, count):
    return type(value) is int and 0 <= value < count


def _is_level(value):
    return type(value) in (int, float) and 0 <= value <= 1
