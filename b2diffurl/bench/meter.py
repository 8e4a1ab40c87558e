"""Measuring time, operations and memory of a piece of work, and what rounding does to a stage's first pass."""

import contextlib
import ctypes
import dataclasses
import gc
import os
import pathlib
import platform
import signal
import statistics
import time

import torch

from .. import models
from ..ddim import prediction_gain
from ..errors import UserError
from ..run.config import read_prompts
from ..update import ROUNDING, Pairs, pair_loss, precision_of, prediction_error


def seconds_a_call(work, budget):
    """Median seconds of work(): once to warm up, then as often as fits the budget, at least once."""
    return statistics.median(_times(work, budget))


def _times(work, budget):
    _timed(work)
    times, end = [], time.perf_counter() + budget
    while not times or time.perf_counter() + times[-1] < end:
        times.append(_timed(work))
    return times


def _timed(work):
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def fitting(batch, work, budget):
    """The configured batch, or as large a power of two as lets a call of work(batch) end within the budget."""
    size = 1
    _timed(lambda: work(1))
    while size < batch and 2 * _timed(lambda size=size: work(size)) < budget:
        size = min(2 * size, batch)
    return size


def largest(most, work):
    """The largest power of two up to `most` with which work(size) runs -> (size, why no larger one did, or "").

    Raises RuntimeError where not even work(1) does.
    """
    size, refused = 1, _refusal(work, 1)
    if refused:
        raise RuntimeError(refused)
    while 2 * size <= most and not refused:
        refused = _refusal(work, 2 * size)
        size *= 1 if refused else 2
    release()
    return size, refused


def _refusal(work, size):
    """What work(size) complains of, "" where it runs; with the exception go the tensors that its frames hold."""
    try:
        _timed(lambda: work(size))
    except RuntimeError as error:  # OutOfMemoryError is one; cuBLAS and cuDNN have words of their own for it
        return str(error).strip().splitlines()[0]
    return ""


@contextlib.contextmanager
def within(seconds):
    """Raise TimeoutError in the block once it has taken that long."""

    def stop(*_):
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def release():
    """Give the memory that nothing refers to any longer back to the GPU and to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def matmul_rate(dtype, budget):
    """FLOP/s of a large square matrix product in dtype on the run's device: the yardstick of the other rates.

    The fastest call counts: what the machine can do, whatever runs beside it.
    """
    size = 8192 if torch.cuda.is_available() else 2048
    a = torch.randn(size, size, device=models.device(), dtype=dtype)
    return 2 * size**3 / min(_times(lambda: a @ a, budget))


def count(work, model):
    """Run work() once -> (operations that it executes, bytes that it keeps for a backward pass).

    Operations are those of matrix products, convolutions and attention, a multiplication and an addition being two; of
    the bytes, model's own weights are left out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    sizes, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keeping, FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops(), sum(sizes.values())


def count_each(work, model):
    """count() of one more image or pair in work(n): without what a call does once, as adding a LoRA to the weights."""
    (one, kept_by_one), (two, kept_by_two) = (count(lambda n=n: work(n), model) for n in (1, 2))
    return two - one, kept_by_two - kept_by_one


@contextlib.contextmanager
def peak_memory(phase):
    """Put the block's peak bytes into phase["peak_bytes"]: allocated on the GPU, or this process's resident ones.

    None where neither can be told (neither CUDA nor Linux).
    """
    release()  # what is freed must not count for this block
    reset = pathlib.Path("/proc/self/clear_refs")
    phase["peak_bytes"] = None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield
        phase["peak_bytes"] = torch.cuda.max_memory_allocated()
    elif os.access(reset, os.W_OK):
        reset.write_text("5", encoding="ascii")  # resets VmHWM
        yield
        status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
        phase["peak_bytes"] = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    else:
        yield


def machine():
    """What ran: the GPU, or the processor, with the system and Python."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    processor = next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), "")
    chip = f"{processor or platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        chip = f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB; {chip}"
    return f"{chip}; {platform.system()}, Python {platform.python_version()}"


def sample_pairs(loaded, checkpoint, images, steps):
    """Sample images together, over a whole schedule of `steps` steps -> (its scheduler, Pairs (images, steps)).

    Raises UserError where a latent is not finite.
    """
    config = loaded.config.copy_and_resolve_references()
    config.sample.num_steps = steps
    scheduler, device = models.load_scheduler(config), models.device()
    sampler = dataclasses.replace(loaded.sampler(checkpoint), scheduler=scheduler)
    noise = torch.randn(images, steps + 1, *sampler.latent_shape)
    embeds = loaded.embed([read_prompts(config.prompts.train)[0]] * images).to(device)
    start = sampler.initial(noise[:, 0])
    path, log_probs = sampler.denoise(start, embeds, noise[:, 1:], range(steps))
    if not log_probs.isfinite().all():
        raise UserError(f"config.mixed_precision={config.mixed_precision!r}: the latents are not finite")
    latents, advantages = torch.cat([start[:, None], path], 1), 1.0 - 2 * (torch.arange(images, device=device) % 2)
    return scheduler, Pairs(latents, log_probs, scheduler.timesteps, advantages, embeds, sampler.negative_embeds)


def first_pass(loaded, checkpoint, images, steps, batch):
    """How far the densities of training are off those of sampling, by step, before any update -> figures.

    As in a stage: the images are sampled together, over a whole schedule of `steps` steps; then their transitions are
    read in shuffled order, `batch` a call, with gradients and with the LoRA beside the weights. Batch sizes and
    gradients make other kernels compute, and their rounding is what is seen.
    """
    config = loaded.config.copy_and_resolve_references()
    config.train.algorithm, config.train.log_prob = "ddpo_is", "mean"
    scheduler, pairs = sample_pairs(loaded, checkpoint, images, steps)
    unet, _ = loaded.trainable(checkpoint)
    log_ratios = torch.empty(images * steps, dtype=torch.float64)
    for part in torch.randperm(len(log_ratios)).split(batch):
        rows, at = (index.to(pairs.latents.device) for index in (part // steps, part % steps))
        log_ratios[part] = pair_loss(unet, scheduler, pairs, rows, at, config)[1]["ratio"].double().log().cpu()
    dimensions, by_step = pairs.latents[0, 0].numel(), []
    gains = prediction_gain(scheduler, pairs.timesteps, config.sample.eta)
    for t, gain, own in zip(pairs.timesteps.tolist(), gains.tolist(), log_ratios.view(images, steps).T, strict=True):
        row = {"t": t, "ratio_error": own.expm1().abs().max().item()}
        if loaded.config.train.log_prob == "sum":
            row["ratio_error_of_sum"] = (own * dimensions).expm1().abs().max().item()
        by_step.append(row | {"prediction_error": prediction_error(own, gain, dimensions)})
    figures = {"images": images, "steps": steps, "steps_of_run": loaded.config.sample.num_steps, "pairs_a_call": batch}
    return figures | {"allowed": ROUNDING[precision_of(config)], "by_step": by_step}


def affordable(config, sampling, batch, seconds):
    """(images, steps, pairs a call) for first_pass: the run's, or what can be walked and read in that time.

    sampling: its figures. batch: of training; another one where it is the number of images: calls of the same size
    round alike on a CPU, so that there would be nothing to see.
    """
    walked = int(seconds / (2 * sampling["seconds_per_step"]))
    steps = max(1, min(config.sample.num_steps, walked // 2))
    images = max(2, min(sampling["batch"], walked // steps))
    return images, steps, batch if batch != images else images // 2


def first_pass_lines(figures):
    """first_pass's figures as text: the three steps whose prediction is furthest off."""
    fewer = "" if figures["steps"] == figures["steps_of_run"] else f" (a run has {figures['steps_of_run']})"
    lines = [
        f"first pass: {figures['images']} images sampled together in {figures['steps']} steps{fewer}, read again "
        f"{figures['pairs_a_call']} a call; the prediction may be off by {figures['allowed']:g} standard deviations"
    ]
    for row in sorted(figures["by_step"], key=lambda row: -row["prediction_error"])[:3]:
        line = f"  t={row['t']}: the prediction is off by {row['prediction_error']:.1e}, |ratio - 1| at most "
        lines.append(line + f"{row['ratio_error']:.1e}")
        if "ratio_error_of_sum" in row:
            lines[-1] += f", {row['ratio_error_of_sum']:.1e} with the preset's log_prob=sum"
    return lines
