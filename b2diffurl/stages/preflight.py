"""What run_process.sh asks before it starts; the last line is "<stages> <steps or "one"> <plateau> <run folder>"."""

import os
import shutil
import subprocess

from ..errors import UserError
from ..plan import METHODS
from ..run.command import run_main
from ..run.config import REWARDS, is_function, reward_terms
from ..run.folder import Run
from ..run.prompts import read_prompts
from .begin import steps


def main(config):
    """Find out what would stop the run much later; then print stages, a stage's processes, config.schedule.plateau, and
    the run's folder.

    The processes are "one" of all steps, or the steps that have one each: sample,select,train.
    """
    require_gpu()
    run = Run(config)
    run.check(config)
    load_rewards(config)
    if METHODS[config.method].fusion:
        from ..families import load_family
        from .targets import word_thresholds

        word_thresholds(config, load_family(config), read_prompts(config.prompts.train))
    if config.evaluate.lpips or config.evaluate.inception_score:  # may have to be downloaded
        from ..evaluate.measures import Quality

        Quality(config, "cpu")
    processes = "one" if config.one_process else ",".join(steps(config))
    print(config.schedule.stage_count, processes, config.schedule.plateau, run.folder)


def load_rewards(config):
    """Load what may not load, or has to be downloaded: the reward's models, and the evaluation's CLIP."""
    names = [name for name, _ in reward_terms(config.reward.name)]
    local = config.reward.model.startswith("local-dir:")  # known to be there
    models = {name for name in names if name in REWARDS and not name.startswith("jpeg_")} - (
        {"clip"} if local else set()
    )
    if models or "clip" not in names or any(map(is_function, names)):
        from ..rewards import load_clip, load_reward

        load_reward(config, "cpu", wanted=lambda name: name in models or is_function(name))
        if "clip" not in names:
            load_clip(config, "cpu")


def require_gpu():
    """Raise UserError where the machine shows a GPU that PyTorch cannot use: the run would go to the CPU, unnoticed."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    if not visible or visible.startswith("-") or not shutil.which("nvidia-smi"):
        return
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    if "GPU" not in listed:
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"nvidia-smi lists a GPU, and PyTorch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: is "
            "the driver too old for that CUDA? Give PYTHON=/path/to/python with a build for your driver, or "
            "CUDA_VISIBLE_DEVICES= for the CPU"
        )


if __name__ == "__main__":
    run_main(main)
