"""Sending a run's figures and pictures to a tracker of accelerate's: one run per experiment, whatever the process."""

import functools
import hashlib
import importlib.util
import os

import numpy as np

from .folder import flat


def track(config, step, values, log, images=()):
    """Send a finished step's figures, and PIL images where given, to config.log_with; "" sends nothing.

    Called when the step's files are in place; a failure there is a warning and costs nothing here.
    """
    if not config.log_with:
        return
    try:
        if importlib.util.find_spec(config.log_with) is None:
            raise ModuleNotFoundError(f"{config.log_with} is not installed")
        settings = _plain(config)
        folder = os.path.abspath(config.save_path)
        tracker = _tracker(config.log_with, config.exp_name, folder, tuple(settings.items()))
        if config.stage == 0 and step == "sample" and config.log_with != "trackio":
            tracker.store_init_configuration(settings)
        figures = {"stage": config.stage, **{_unique(step, name): value for name, value in values.items()}}
        where = {"step": config.stage} if config.log_with == "tensorboard" else {}  # the others count their own
        tracker.log(figures, **where)
        if images:
            _send_images(tracker, f"{step}/images", images, where)
    except Exception as error:
        log.warning(f"stage {config.stage} {step}: not sent to {config.log_with} ({error})")


def _send_images(tracker, name, images, where):
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.stack([np.asarray(image) for image in images])}, **where, dataformats="NHWC")
        tracker.tracker.flush()  # or a process that ends may lose them
    elif tracker.name == "trackio":  # accelerate sends it no images
        import trackio

        tracker.log({f"{name}/{i}": trackio.Image(image) for i, image in enumerate(images)})
    else:
        tracker.log_images({name: list(images)})


def _plain(config):
    """{dotted name: value} of a run's settings, as every tracker can hold them."""
    plain = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in flat(config).items()}
    del plain["stage"]
    return plain


def _unique(step, name):
    """The figure's name; with the step's where every step has one of that name."""
    return f"{step}/{name}" if "/" not in name or name.startswith("perf/") else name


@functools.cache
def _tracker(kind, exp_name, save_path, settings):
    """The experiment's tracker, one a process; all continue the run whose id follows from the run's folder."""
    from accelerate import Accelerator

    name = f"{exp_name}-{hashlib.sha256(save_path.encode()).hexdigest()[:8]}"
    accelerator = Accelerator(log_with=kind, project_dir="log")
    if kind == "tensorboard":
        accelerator.init_trackers(f"tensorboard/{name}")
    elif kind == "trackio":
        os.environ.setdefault("TRACKIO_DIR", os.path.abspath("log/trackio"))
        options = {"name": name, "resume": "allow", "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        options["config"] = dict(settings)  # a process that goes on would empty it
        accelerator.init_trackers("b2diffurl", init_kwargs={kind: options})
    else:
        options = {"id": name, "name": exp_name, "resume": "allow", "dir": "log"}
        accelerator.init_trackers("b2diffurl", init_kwargs={kind: options})
    return accelerator.get_tracker(kind)
