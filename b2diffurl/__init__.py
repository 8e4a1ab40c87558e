"""B²-DiffuRL: backward progressive, branch-based reinforcement learning for diffusion models (arXiv 2503.11240)."""

import time

STARTED = time.perf_counter()  # when a script began, nearly: this is the first module that each of them imports
