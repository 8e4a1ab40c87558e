"""Measuring time, operations and memory of a piece of work, on a CPU or a GPU alike."""

import contextlib
import ctypes
import gc
import os
import pathlib
import platform
import statistics
import time

import torch

from . import models


def seconds_a_call(work, budget):
    """Median seconds of work(): once to warm up, then as often as fits the budget, at least once."""
    _timed(work)
    times, end = [], time.perf_counter() + budget
    while not times or time.perf_counter() + times[-1] < end:
        times.append(_timed(work))
    return statistics.median(times)


def fitting(batch, work, budget):
    """The configured batch, or as large a power of two as lets a call of work(batch) end within the budget."""
    size = 1
    _timed(lambda: work(1))
    while size < batch and 2 * _timed(lambda size=size: work(size)) < budget:
        size = min(2 * size, batch)
    return size


def _timed(work):
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_rate(dtype, budget):
    """FLOP/s of a large square matrix product in dtype on the run's device: the yardstick of the other rates."""
    size = 8192 if torch.cuda.is_available() else 4096
    a = torch.randn(size, size, device=models.device(), dtype=dtype)
    return 2 * size**3 / seconds_a_call(lambda: a @ a, budget)


def count(work, model):
    """Run work() once -> (operations that it executes, bytes that it keeps for a backward pass).

    Operations are those of matrix products, convolutions and attention; of the bytes, model's own weights are left out.
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


@contextlib.contextmanager
def peak_memory(phase):
    """Put the block's peak bytes into phase["peak_bytes"]: allocated on the GPU, or this process's resident ones.

    None where neither can be told (neither CUDA nor Linux).
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what is freed must not count for this block
    reset = pathlib.Path("/proc/self/clear_refs")
    phase["peak_bytes"] = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
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
