"""Prompt files: a JSON array of strings, or JSON Lines whose objects say more of a prompt, for the reward."""

import json
import pathlib

from ..errors import UserError


def read_prompts(path):
    """The prompts of a file, in its order -> list of str. Raises UserError naming the file."""
    return [prompt for prompt, _ in _rows(path)]


def read_metadata(path):
    """What a file says of its prompts -> {prompt: {name: value}}; nothing where it is an array. Raises UserError."""
    return {prompt: more for prompt, more in _rows(path) if more}


def _rows(path):
    """[(prompt, {name: value})] of a prompt file."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        if str(path).endswith(".jsonl"):
            return _of_lines(path, text)
        found = json.loads(text)
    except FileNotFoundError:
        raise UserError(
            f"prompt file {path} does not exist; set config.prompts.train and config.prompts.test"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # of a path, of UTF-8 or of JSON
        raise UserError(f"prompt file {path!r} cannot be read as JSON: {error}") from None
    if not isinstance(found, list) or not found or not all(isinstance(p, str) and p.strip() for p in found):
        raise UserError(f'prompt file {path} must hold a JSON array of one or more non-empty strings, like ["a cat"]')
    for prompt in found:
        _require_text(path, prompt)
    return [(prompt, {}) for prompt in found]


def _of_lines(path, text):
    rows, known = [], {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            own = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"prompt file {path}, line {number}: no JSON ({error})") from None
        prompt = own.get("prompt") if isinstance(own, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f'prompt file {path}, line {number}: must be an object such as {{"prompt": "a cat"}}')
        _require_text(path, prompt)
        more = {name: value for name, value in own.items() if name != "prompt"}
        if known.setdefault(prompt, more) != more:
            raise UserError(f"prompt file {path}, line {number}: {prompt!r} was there before, and said otherwise")
        rows.append((prompt, more))
    if not rows:
        raise UserError(f"prompt file {path} has no prompts")
    return rows


def _require_text(path, prompt):
    """Raise UserError for half a character, a lone surrogate, which no tokenizer takes."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"prompt file {path}: {prompt!r} is no text ({error.reason})") from None
