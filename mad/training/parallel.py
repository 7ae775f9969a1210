"""How a step is laid out: over processes, over forward passes, over blocks. None of it changes what a step computes.

The global batch of `batch` samples is shared out to processes, and a process's share to passes of `runtime.micro_batch`.
Gradients are the mean over passes and processes. Losses that look at many samples (Sinkhorn-Knopp, KoLeo) see one pass of
all processes: with several passes the targets are balanced over fewer samples than DINO's, which `balance_note` says.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mad.config.training import RunConfig
from mad.files import MadError
from mad.training import ranks
from mad.training.data import samples_per_process


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


def balanced_over(run: RunConfig, world: int) -> int:
    """Samples over which the teacher's targets are balanced: one pass of all processes."""
    return run.batch // num_passes(run, world)


def balance_note(run: RunConfig, world: int) -> str | None:
    """What accumulation changes, in words; None where a step is one pass."""
    passes = num_passes(run, world)
    if passes == 1:
        return None
    seen = f"{balanced_over(run, world)} samples at a time, not the {run.batch} of a step (accumulated over {passes} passes)"
    if run.centring == "ema":
        return f"KoLeo sees {seen}; the teacher's centre moves {passes} times per step"
    return f"Teacher targets and KoLeo see {seen}: fewer than DINO's, which balances over the whole batch"


def replicate(student: nn.Module) -> nn.Module:
    """The student as every process trains it, with the gradients that it needs now: wrap again when they change."""
    return student if ranks.world_size() == 1 else nn.parallel.DistributedDataParallel(student)


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """The context of one pass, forward and backward: processes exchange gradients in the last one only."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
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


def checkpoint_activations(backbone: nn.Module) -> None:
    """Let each block keep its inputs only and compute the rest again in the backward pass.

    The blocks are wrapped rather than timm's `set_grad_checkpointing` used, which not every model has or obeys alike.

    Raises:
        MadError: the backbone has no blocks, or keeps running statistics, which the second pass would count twice.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules()):
        raise MadError(
            f"runtime.activation_checkpointing: {type(backbone).__name__} has batch norms, whose statistics would count twice; "
            "set it to false, or take a model with layer or group norms"
        )
    for block in blocks(backbone):
        block.forward = _checkpointed(block.forward)  # type: ignore[method-assign]


def _checkpointed(forward):  # type: ignore[no-untyped-def]
    def run(*args, **kwargs):  # type: ignore[no-untyped-def]
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def compile_blocks(*networks: nn.Module, backend: str = "inductor") -> None:
    """Compile each block of the networks' backbones in place; parameter names stay as they are."""
    for network in networks:
        for block in blocks(network.backbone):  # type: ignore[arg-type]
            block.compile(backend=backend)
