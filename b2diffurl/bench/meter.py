"""Measuring time, operations and memory of a piece of work."""

import contextlib
import ctypes
import gc
import os
import pathlib
import platform
import signal
import statistics
import time

import torch

from ..run.processes import device


def seconds_per_call(work, budget):
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
    """The configured batch, or as large a power of two as lets work(batch) end within the budget."""
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
        return str(error).strip().splitlines()[0].partition(". GPU ")[0]  # what is free there fills a screen
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
    a = torch.randn(size, size, device=device(), dtype=dtype)
    return 2 * size**3 / min(_times(lambda: a @ a, budget))


def count(work, model):
    """Run work() once -> (operations that it executes, bytes that it saves for a backward pass).

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
    """count() of one more image or transition in work(n): without what is done once per call, as merging a LoRA."""
    (one, saved_by_one), (two, saved_by_two) = (count(lambda n=n: work(n), model) for n in (1, 2))
    return two - one, saved_by_two - saved_by_one


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
