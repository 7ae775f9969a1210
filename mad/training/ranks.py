"""One process or many: the few facts of torch.distributed that training needs.

Under `torchrun` every process runs the same stage; without it everything here is the identity. Collectives are used only
after `start`, so that pure functions can ask `world_size` anywhere.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather  # imported within a group it would hold on to that one for ever

from mad.files import MadError


def is_distributed() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the group that `torchrun` announces (nccl with GPUs, otherwise gloo), yield this process's device, leave it."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    join = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not is_distributed()
    if join:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        barrier()  # nobody leaves while another still talks
    except BaseException as error:
        if join:
            _forget_frames(error)
        raise
    finally:
        if join:
            dist.destroy_process_group()


def _forget_frames(error: BaseException | None) -> None:
    """Empty the frames that an error and those before it keep alive, a DDP model among their variables.

    A reducer that outlives its group would end it, holding Python's lock while it joins a thread that may wait for that lock.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def barrier() -> None:
    """Wait for every process."""
    if is_distributed():
        dist.barrier()


def all_sum(value: Tensor) -> Tensor:
    """`value` summed over processes, in place."""
    if is_distributed():
        dist.all_reduce(value)
    return value


def all_max(value: Tensor) -> Tensor:
    """Elementwise maximum over processes, in place."""
    if is_distributed():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def any_of(flags: list[bool], device: torch.device) -> list[bool]:
    """Of each flag, whether any process has it set: the same answer everywhere. `device` is where the group talks."""
    return flags if not is_distributed() else all_max(torch.tensor(flags, device=device).float()).bool().tolist()


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """What a process does without the others: where one of them fails, all do, or they would wait for it for ever.

    Raises:
        MadError: another process failed; the one that did raises its own error.
    """
    try:
        yield
    except Exception:
        any_of([True], device)
        raise
    if any_of([False], device)[0]:
        raise MadError("another process failed and says why; this one stops with it")


def gather(value: Tensor) -> Tensor:
    """Rows [B_r, ...] of all processes, in order of rank; B may differ. Gradients flow back to each owner's rows."""
    if not is_distributed():
        return value
    counts = [torch.zeros(1, dtype=torch.int64, device=value.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(value)], device=value.device))
    sizes = [int(count) for count in counts]
    padding = value.new_zeros((max(sizes) - len(value), *value.shape[1:]))
    parts = all_gather(torch.cat([value, padding]))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
