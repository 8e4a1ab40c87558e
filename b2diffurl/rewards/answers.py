"""What reward servers have answered, in a folder until their step is complete: no picture is paid for twice."""

import contextlib
import hashlib
import json
import math

from ..run import processes


def key(url, image, prompt, metadata):
    """What an answer is known by: the SHA-256 of the question, the picture's pixels included."""
    asked = json.dumps([url, prompt, metadata, image.mode, image.size], sort_keys=True)
    return hashlib.sha256(asked.encode() + image.tobytes()).hexdigest()


class Answers(dict):
    """{key: score} of all processes' files in a folder, `answers<rank>.jsonl`, a line an answer; in memory for None.

    A process that is killed loses none. The folder is made with the first answer.
    """

    def __init__(self, folder):
        super().__init__()
        self.path = folder and folder / f"answers{processes.rank()}.jsonl"
        for path in _files(folder) if folder else ():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    name, score = json.loads(line)
                except ValueError:  # torn where its process was killed
                    continue
                self[name] = score

    def add(self, answers):
        """Take in {key: score}; scores that are no finite number are not written, since they stop the step."""
        self.update(answers)
        if self.path:
            lines = [json.dumps([name, score]) + "\n" for name, score in answers.items() if math.isfinite(score)]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write("\n" + "".join(lines))  # a line of its own, even below a torn one


def forget(folder):
    """Delete the answers in a folder, and the folder where it holds nothing else."""
    for path in _files(folder):
        path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _files(folder):
    return sorted(folder.glob("answers[0-9]*.jsonl"))
