"""Several processes of one step (accelerate, torch.distributed): who has which share, and how shares come together.

Every function does the plain thing in a single process, without importing accelerate; PyTorch comes where it is used.
"""

import datetime
import functools
import os
import sys
import threading
import time

from ..errors import SharedError, UserError

WAIT = datetime.timedelta(hours=1)  # for the slowest process: a machine that died is noticed


@functools.cache
def _state():
    import torch
    from accelerate import PartialState

    follow_parent()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)
    if state.num_processes != size():
        raise UserError(f"{size()} processes were started, and accelerate sees {state.num_processes}: none would wait")
    return state


def leave():
    """Take leave of the others at the end of a command that has gone well."""
    if _state.cache_info().currsize:
        import torch

        torch.distributed.destroy_process_group()


def give_up():
    """End this process at once, after an error that the others may not have.

    They may be waiting for this one in a collective call. NCCL's orderly end waits for them in turn; a launcher that
    sees a process end stops the rest.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def follow_parent():
    """End this process when the one that started it has ended, however that ended.

    Launchers put their processes into sessions of their own, where a kill of the driver's group does not reach them.
    """
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def size():
    """How many processes work on the step."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank():
    """This one's number; 0 writes what all share."""
    return int(os.environ.get("RANK", "0"))


def device():
    """The process's own GPU where there is one, else the CPU."""
    import torch

    if size() > 1:
        return _state().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_device():
    """Make the process's own GPU the calling thread's: a new thread begins with the machine's first one."""
    import torch

    if size() > 1 and device().type == "cuda":
        torch.cuda.set_device(device())


def share(count):
    """The slice of `count` things that is this process's: contiguous, sizes differ by at most one, maybe empty."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def barrier():
    """Wait for the others."""
    if size() > 1:
        _state().wait_for_everyone()


def gather(value):
    """Everybody's value, by number of the process, for all of them."""
    if size() == 1:
        return [value]
    import torch

    _state()
    values = [None] * size()
    torch.distributed.all_gather_object(values, value)
    return values


def first(value):
    """Process 0's value, for all: what it sees of a shared folder decides."""
    return gather(value)[0]


def agree(work):
    """gather(work()); a UserError of one process is a SharedError of all, so that none waits for ever."""
    try:
        mine = (work(), None)
    except UserError as error:
        mine = (None, str(error))
    results = gather(mine)
    if said := [error for _, error in results if error]:
        raise SharedError(said[0])
    return [result for result, _ in results]


def sum_(tensors):
    """Replace each tensor by its sum over the processes: the same bits for all."""
    if size() == 1:
        return
    import torch

    _state()
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
