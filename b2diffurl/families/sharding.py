"""A denoiser that one GPU does not hold: every process keeps a part of its frozen weights (FSDP2).

Each block's weights are gathered while it computes, forward and backward, so a call of the denoiser is one of all
processes together. The LoRA stays whole everywhere, and its gradient is summed as without sharding.
"""

import warnings

import torch

from ..run import processes


def shard(denoiser):
    """Keep this process's part of a frozen denoiser that is on the CPU, on the process's device, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # FSDP2 warns of blocks that return views, which would lose their hooks if they were changed in place; none is.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(processes.device().type, (processes.size(),))
    for block in reversed(blocks(denoiser)):  # inner blocks before those around them
        fully_shard(block, mesh=mesh)
    return fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)


def blocks(denoiser):
    """The modules that diffusers keeps in one piece, outer ones first."""
    return [module for module in denoiser.modules() if type(module).__name__ in denoiser._no_split_modules]


def is_sharded(denoiser):
    """Whether the processes hold it in parts."""
    if processes.size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(denoiser, FSDPModule)


def calls(working):
    """Whether any process is about to call the denoiser; every one says whether it is, before every call."""
    count = torch.tensor([float(working)], device=processes.device())
    processes.sum_([count])
    return working or count.item() > 0
