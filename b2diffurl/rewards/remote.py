"""A reward that another process computes, over HTTP: a VLM judge, a model with other packages, a machine of its own.

A POST of {"prompts": [N strings], "metadata": [N objects], "images": [N PNGs in base64]} is answered with {"scores":
[N numbers]}, by any other status or text with an error. docs/rewards.md has the protocol and a server.
"""

import base64
import contextlib
import http.client
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request

from ..errors import UserError
from .answers import Answers, key

HERE = ("localhost", "127.0.0.1", "::1")  # no proxy leads there
WAITS = (1, 2, 4, 8, 16, 32)  # seconds before another try: a server that starts again or is busy answers within them


class Remote:
    """A server's judgement; reward(images, prompts, metadata) -> N numbers, batch_size images per request."""

    folder = None  # where answers are written, and looked up before the server is asked

    def __init__(self, url, batch_size, timeout):
        self.url, self.batch_size, self.timeout = url, batch_size, timeout
        here = urllib.parse.urlsplit(url).hostname in HERE
        self.opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []))

    def __call__(self, images, prompts, metadata):
        """N PIL images, their prompts and what a prompt file says of these, N dicts -> [N numbers].

        Raises UserError where the server has no answer that fits.
        """
        keys = [key(self.url, *asked) for asked in zip(images, prompts, metadata, strict=True)]
        known = Answers(self.folder)
        left = [i for i, own in enumerate(keys) if own not in known]
        for first in range(0, len(left), self.batch_size):
            batch = left[first : first + self.batch_size]
            scores = self._ask(*([given[i] for i in batch] for given in (images, prompts, metadata)))
            known.add(dict(zip([keys[i] for i in batch], scores, strict=True)))
        return [known[own] for own in keys]

    def _ask(self, images, prompts, metadata):
        pictures = [_png(image) for image in images]
        body = json.dumps({"prompts": prompts, "metadata": metadata, "images": pictures}).encode()
        silent = 0
        for wait in (*WAITS, None):
            try:
                return self._scores(self._post(body), len(prompts))
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code}"
                with contextlib.suppress(OSError, http.client.HTTPException):
                    said += f": {error.read(200).decode(errors='replace').strip()}"
                if error.code < 500 and error.code != 429:  # the request is wrong, and will be the next time
                    break
            except (OSError, http.client.HTTPException) as error:  # nobody there, or no answer within the time
                why = getattr(error, "reason", error)
                said, silent = str(why), silent + isinstance(why, TimeoutError)
                if silent == 2:  # each costs the whole timeout
                    break
            if wait is not None:
                time.sleep(wait)
        raise UserError(
            f"config.reward.name: {self.url} did not score {len(prompts)} images ({said}); mend the server and run the "
            "same command again"
        )

    def _post(self, body):
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        with self.opener.open(request, timeout=self.timeout) as answer:
            return answer.read()

    def _scores(self, answer, count):
        try:
            scores = [float(score) for score in json.loads(answer)["scores"]]
            if len(scores) != count:
                raise ValueError(f"{len(scores)} scores for {count} images")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'config.reward.name: {self.url} must answer {{"scores": [{count} numbers]}}: {error}; it said '
                f"{answer[:80]!r}"
            ) from None
        return scores


def _png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
