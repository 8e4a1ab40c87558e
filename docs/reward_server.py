"""A server for config.reward.name=http://localhost:8000/score: put your own model into `score`.

    python docs/reward_server.py [port]

It needs nothing but Pillow and numpy, and none of this project's packages.
"""

import base64
import http.server
import io
import json
import sys

import numpy as np
from PIL import Image


def score(images, prompts, metadata):
    """N images, prompts and dicts of the prompt file -> N numbers, higher is better. This one likes bright pictures."""
    return [float(np.asarray(image).mean()) / 255 for image in images]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a POST of {"prompts", "metadata", "images"} with {"scores"}."""

    def do_POST(self):
        status = 400  # what was sent is wrong, and is not sent again; with 500, a failure here, it is
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = [Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in asked["images"]]
            status = 500
            status, said = 200, {"scores": score(images, asked["prompts"], asked["metadata"])}
        except Exception as error:  # whatever went wrong, the trainer shall read it
            said = {"error": repr(error)}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
