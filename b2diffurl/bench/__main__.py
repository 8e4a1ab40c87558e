"""`python -m b2diffurl.bench`: see rates.py; with --gpu-check, gpu_check.py."""

import argparse
import os
import pathlib
import sys

import torch

from .. import bench
from ..run.command import run_main
from . import rates


def run(argv):
    """Command line -> main, which run_main guards."""
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.bench", description=bench.__doc__)
    parser.add_argument("--preset", help="of config/stage_process.py; sdv1.4 with CUDA, else shapes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--out", default="", help="folder for bench.json and bench.txt")
    parser.add_argument("--quick", action="store_true", help="a minute: a fifth of the time for each figure")
    parser.add_argument("--gpu-check", action="store_true", help="try what a first run on a GPU meets, into --out")
    given, flags = parser.parse_known_args(argv[1:])
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cuda = torch.cuda.is_available()
    if given.device == "cuda" and not cuda:
        sys.exit("bench: --device cuda: PyTorch sees no CUDA device here")
    if given.gpu_check:
        from . import gpu_check

        if not given.out or given.preset or given.quick or flags:
            parser.error("--gpu-check takes --out DIR, and no preset or settings")
        sys.exit(gpu_check.main(pathlib.Path(given.out).resolve()))
    flags = ["--config", f"config/stage_process.py:{given.preset or ('sdv1.4' if cuda else 'shapes')}", *flags]
    sys.argv[1:] = flags
    run_main(lambda config: rates.main(config, flags, given.out, given.quick))


if __name__ == "__main__":
    run(sys.argv)
