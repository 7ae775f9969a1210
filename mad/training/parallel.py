"""How a step is laid out: over processes, over forward passes, over blocks. None of it changes what a step computes.

The global batch of `batch` samples is shared out to processes, and a process's share to passes of `runtime.micro_batch`.
Gradients are the mean over passes and processes. The teacher's targets are balanced over the whole step; the regulariser that
spreads the student's views sees one pass of all processes, which `spread_note` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from mad.config.training import RunConfig
from mad.files import MadError
from mad.training import ranks
from mad.training.batch import samples_per_process


def num_passes(run: RunConfig, world: int) -> int:
    """Forward passes that each of `world` processes needs for its share of a step.

    Raises:
        MadError: the share is not a whole number of passes.
    """
    share = samples_per_process(run.batch, world)
    micro = min(run.runtime.micro_batch or share, share)
    if share % micro:
        fitting = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise MadError(
            f"runs.{run.name}.runtime.micro_batch: {share} samples per process (batch {run.batch} over {world}) cannot be cut "
            f"into passes of {micro}; take one of {fitting}"
        )
    return share // micro


def check_runtime(run: RunConfig, backbone: nn.Module, world: int) -> None:
    """Fail before anything is touched where `run` cannot be trained by `world` processes as its `runtime` says.

    Raises:
        MadError: the batch cannot be shared out, or the backbone does not suit what is asked for.
    """
    num_passes(run, world)
    if world > 1 and keeps_statistics(backbone):
        raise MadError(
            f"runs.{run.name}: {run.backbone.model} has batch norms, whose statistics would differ from process to process; train "
            "it on one process, or take a model with layer or group norms"
        )
    if run.runtime.activation_checkpointing:
        check_recomputable(backbone)
    if run.runtime.compile:
        blocks(backbone)


def spread_over(run: RunConfig, world: int) -> int:
    """Samples that the regulariser (KoLeo) sees at a time: one pass of all processes; all of a step where it has no weight."""
    return run.batch // num_passes(run, world) if run.koleo else run.batch


def spread_note(run: RunConfig, world: int) -> str | None:
    """What accumulation changes, in words; None where it changes nothing."""
    seen = spread_over(run, world)
    if seen == run.batch:
        return None
    return f"The regulariser ({run.spread}) sees {seen} samples at a time, not the {run.batch} of a step, which is accumulated"


def replicate(student: nn.Module) -> nn.Module:
    """The student as every process trains it, with the gradients that it needs now: wrap again when they change."""
    if not isinstance(student, FSDPModule):
        return student if ranks.world_size() == 1 else nn.parallel.DistributedDataParallel(student)
    for module in student.modules():
        if isinstance(module, FSDPModule):  # gathering is when it looks which parameters have gradients
            module.unshard()
            module.reshard()
    return student


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """The context of one pass, forward and backward: processes exchange gradients in the last one only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a backbone, in order: those of a ViT, or the stages of a convolutional network.

    Raises:
        MadError: timm's model has neither.
    """
    for name in ("blocks", "stages", "layers"):
        if isinstance(found := getattr(backbone, name, None), nn.Sequential | nn.ModuleList):
            return list(found)
    raise MadError(f"runtime: {type(backbone).__name__} has no blocks to checkpoint or compile one by one")


def keeps_statistics(backbone: nn.Module) -> bool:
    """Whether a backbone has batch norms, which count every forward pass."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules())


def check_recomputable(backbone: nn.Module) -> None:
    """Fail where blocks cannot be computed twice.

    Raises:
        MadError: the backbone has no blocks, or keeps running statistics, which the second pass would count twice.
    """
    blocks(backbone)
    if keeps_statistics(backbone):
        raise MadError(
            f"runtime.activation_checkpointing: {type(backbone).__name__} has batch norms, whose statistics would count twice; "
            "set it to false, or take a model with layer or group norms"
        )


def checkpoint_activations(backbone: nn.Module) -> None:
    """Let each block keep its inputs only and compute the rest again in the backward pass.

    The blocks are wrapped rather than timm's `set_grad_checkpointing` used, which not every model has or obeys alike.

    Raises:
        MadError: the backbone has no blocks, or keeps running statistics, which the second pass would count twice.
    """
    check_recomputable(backbone)
    for block in blocks(backbone):
        # Bound, not closed over, so that a copy of the network runs its own blocks.
        forward = getattr(block.forward, "__func__", type(block).forward)
        block.forward = MethodType(partial(_recomputed, forward), block)  # type: ignore[method-assign]


@contextmanager
def first_block_kept(backbone: nn.Module) -> Iterator[None]:
    """Within it the first checkpointed block keeps what it computes, as each does in its turn while its gradient is computed."""
    for block in backbone.modules():
        recomputed = block.forward
        forward = getattr(recomputed, "__func__", None)
        if isinstance(forward, partial) and forward.func is _recomputed:
            block.forward = MethodType(forward.args[0], block)  # type: ignore[method-assign]
            break
    else:
        yield
        return
    try:
        yield
    finally:
        block.forward = recomputed  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(block, *args, **kwargs)
    return checkpoint(forward, block, *args, use_reentrant=False, **kwargs)


def compile_blocks(*networks: nn.Module, backend: str = "inductor") -> None:
    """Compile each block of the networks' backbones in place; parameter names stay as they are."""
    for network in networks:
        for block in blocks(network.backbone):  # type: ignore[arg-type]
            block.compile(backend=backend)
