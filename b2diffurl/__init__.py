"""B²-DiffuRL: backward progressive, branch-based reinforcement learning for diffusion models (arXiv 2503.11240)."""

import os
import time

# libgomp's threads wait for each other by spinning, by default so long that two jobs on the same cores take six times
# as long as one after the other; this costs a hundredth where the cores are free. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

STARTED = time.perf_counter()  # when a script began, nearly: this is the first module that each of them imports
