"""How much memory a step needs, told before the first one, and what to lower where it was too much.

Weights, gradients, AdamW's two moments and the teacher are counted; activations are measured: the bytes that autograd keeps
for the backward pass of one and of two samples, read by `torch.autograd.graph.saved_tensors_hooks`, and the normalised images
that the networks are given. With activation checkpointing the block that is being computed again is there whole. On a CPU the
batch's own pixels, a byte each, are there too. Of a sharded network a process counts its own part, and the two blocks or heads
that are whole at a time. Over several passes the teacher's targets of all of them, [N, K] of views and masked patches, are
counted too. Temporary tensors and what the allocator does not give back come on top: on a CPU glibc's heap keeps what is freed
in pieces, and a process holds a fifth to a third more; with `micro_batch` 69 % more was measured. MALLOC_MMAP_THRESHOLD_=500000 in
the environment gives it back after every use; a step then takes twice the time and more, so it is not set here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mad.config.training import RunConfig
from mad.files import MadError
from mad.progress import log
from mad.training import ranks
from mad.training.batch import Batch
from mad.training.data import TrainingSet
from mad.training.free_memory import free_bytes, is_exhaustion
from mad.training.objective import present
from mad.training.parallel import first_block_kept
from mad.training.sharding import gathered_bytes, is_sharded, own

TRIAL_STEPS = 64  # enough that every kind has had its turn, unless it hardly counts
COPIES = 4  # of the teacher's scores while they are balanced: by pass, in one piece, their logarithm, a temporary one


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device during a step with `samples` samples per pass."""

    weights: int
    gradients: int
    moments: int
    teacher: int
    fixed: int
    per_sample: int
    samples: int
    targets: int = 0
    pixels: int = 0

    @property
    def activations(self) -> int:
        """Of one pass."""
        return self.fixed + self.per_sample * self.samples

    @property
    def passing(self) -> int:
        """Beside networks, gradients and moments: the targets of all passes are there in each, and were balanced before."""
        return self.pixels + max(self.activations + self.targets, COPIES * self.targets)

    @property
    def is_of_targets(self) -> bool:
        """Whether it is the targets of all passes, and not the activations of one, that set its size."""
        return COPIES * self.targets > self.activations + self.targets

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.teacher + self.passing

    @property
    def to_come(self) -> int:
        """What the first step adds to the networks."""
        return self.gradients + self.moments + self.passing

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "AdamW": self.moments, "teacher": self.teacher}
        listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
        kept = f"activations {size(self.activations)} for {self.samples} samples of {size(self.per_sample)}"
        kept += f", targets of all passes {size(self.targets)}" if self.targets else ""
        kept += f", pixels {size(self.pixels)}" if self.pixels else ""
        return f"{size(self.total)} ({listed}, {kept})"


def size(num_bytes: float) -> str:
    """Bytes in words, in decimal units."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def estimate_memory(
    student: nn.Module, teacher: nn.Module, batches: list[list[Batch]], loss: Callable[[Batch], Tensor], samples: int,
    copies: int = 1, passes: int = 1, targets: int = 0,
) -> MemoryEstimate:  # fmt: skip
    """What a step of `samples` samples per pass needs.

    Args:
        student: Its parameters may be frozen: those need neither gradients nor moments.
        batches: For each sort of views a batch of one sample and one of two; the largest sort counts.
        loss: One forward pass, graph included.
        copies: Of the gradients: 2 under DistributedDataParallel, whose buckets hold them once more.
        passes: Of a step. The gradients of a sharded network are whole until the last of several.
        targets: Bytes of the teacher's targets of all passes; 0 for a single one, among whose activations they are.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    gradients = copies * _num_bytes(map(own, trained))
    if is_sharded(student):
        gradients += _num_bytes(trained) if passes > 1 else gathered_bytes(student)
    with first_block_kept(student.backbone):  # type: ignore[arg-type]
        measured = [[saved_bytes(student, teacher, partial(loss, batch)) for batch in pair] for pair in batches]
    per_sample, fixed = max((two - one, max(2 * one - two, 0)) for one, two in measured)
    on_cpu = next(student.parameters()).device.type == "cpu"
    return MemoryEstimate(
        weights=_num_bytes(map(own, student.parameters())) + gathered_bytes(student), gradients=gradients,
        moments=2 * _num_bytes(map(own, trained)), teacher=_num_bytes(map(own, teacher.parameters())) + gathered_bytes(teacher),
        fixed=fixed, per_sample=per_sample, samples=samples, targets=targets,
        pixels=samples * passes * max(pixel_bytes(one) for one, _ in batches) if on_cpu else 0,
    )  # fmt: skip


def pixel_bytes(batch: Batch) -> int:
    """Bytes of a batch's views, one per pixel and colour."""
    views = (view for group in batch.groups for view in (group.teacher, group.student, group.local))
    return sum(view.numel() for view in views if view is not None)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def target_bytes(run: RunConfig, batches: list[list[Batch]], samples: int) -> int:
    """Bytes of the teacher's targets of `samples` samples, of views and masked patches; `batches` as for `estimate_memory`.

    0 where each pass has targets of its own.
    """
    if run.distill is not None:
        return 0
    share = run.ibot.probability * sum(run.ibot.ratio) / 2
    prototypes = run.head.prototypes, run.ibot.prototypes or run.head.prototypes
    found = []
    for one, _ in batches:
        views = sum(len(group.teacher) * present(group).terms.shape[1] for group in one.groups)
        patches = sum(group.masks.numel() for group in one.groups if group.masks is not None and group.kind != "pair")
        found.append(4 * samples * (views * prototypes[0] + round(patches * share * prototypes[1])))
    return max(found)


def trial_batches(data: TrainingSet) -> list[list[Batch]]:
    """Of each kind of sample in a run's first batches: one, and the same one twice."""
    data = data.trial()
    first: dict[str, int] = {}
    for n in range(min(data.run.steps, TRIAL_STEPS) * data.run.batch):
        first.setdefault(data.order[n][0], n)
        if len(first) == len(data.order.kinds):
            break
    return [[data.__getitems__([n]), data.__getitems__([n, n])] for n in first.values()]


def saved_bytes(student: nn.Module, teacher: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward()`, and those of the networks' images; their weights left out.

    Running statistics and random numbers are afterwards as before.
    """
    networks = (student, teacher)
    tensors = [own(tensor) for net in networks for tensor in (*net.parameters(), *net.buffers())]
    held = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    buffers = [(buffer, buffer.clone()) for net in networks for buffer in net.buffers()]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        weight = (
            tensor if tensor._base is None else tensor._base
        )  # of a sharded network, gathered and freed after its block
        if storage.data_ptr() not in held and not isinstance(weight, nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def note_images(_: nn.Module, given: Any) -> None:
        for tensor in tree_leaves(given):
            if torch.is_tensor(tensor):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    devices = sorted({p.device.index or 0 for p in student.parameters() if p.is_cuda})
    noting = [network.register_forward_pre_hook(note_images) for network in networks]
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    for handle in noting:
        handle.remove()
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return sum(kept.values())


def announce_memory(
    student: nn.Module, teacher: nn.Module, data: TrainingSet, loss: Callable[[Batch], Tensor], passes: int
) -> MemoryEstimate:
    """Log what a step of `passes` passes will need beside what is free, and return it; every process takes part."""
    run, world, device = data.run, ranks.world_size(), next(student.parameters()).device
    samples, copies = run.batch // world // passes, 1 if world == 1 or is_sharded(student) else 2
    trials = trial_batches(data)
    targets = target_bytes(run, trials, samples * passes) if passes > 1 else 0
    estimate = estimate_memory(student, teacher, trials, loss, samples, copies, passes, targets)
    free = free_bytes(device)
    if ranks.rank() == 0:
        known = "" if free is None else f"; free on {device}, the networks being there: {size(free)}"
        log(f"{run.name}: memory of a step, estimated: {estimate}{known}")
        if free is not None and estimate.to_come > free:
            log(
                f"{run.name}: WARNING: {size(estimate.to_come)} are still to come, more than is free; where it fails, "
                f"{remedies(run, estimate)}"
            )
    return estimate


@contextmanager
def memory_errors(run: RunConfig, device: torch.device) -> Iterator[list[MemoryEstimate]]:
    """Turn an allocation that failed into one message that says what to lower, by the estimate that was put into the list.

    Raises:
        MadError: the device or the machine has too little memory.
    """
    estimates: list[MemoryEstimate] = []
    try:
        yield estimates
    except (MemoryError, RuntimeError) as error:
        if not is_exhaustion(error):
            raise
        free = free_bytes(device)
        known = "" if free is None else f" ({size(free)} are free)"
        raise MadError(f"runs.{run.name}: not enough memory on {device}{known}; {remedies(run, *estimates)}") from error


def remedies(run: RunConfig, estimate: MemoryEstimate | None = None) -> str:
    """What would lower a run's need of memory, in the order in which to try it; `runtime` keys leave it the same run."""
    micro, fewer = run.runtime.micro_batch, "fewer head.prototypes"
    if estimate is not None and estimate.is_of_targets:  # of all passes, whatever their number
        keys = ["share the teacher's targets over more GPUs or machines (runtime.processes, --nodes)"]
        fewer += (
            f"{' or ibot.prototypes' if run.ibot.weight and run.ibot.head == 'separate' else ''}, or a smaller batch"
        )
    else:
        keys = [f"lower runtime.micro_batch (now {micro or 'the whole share of the batch'})"] if micro != 1 else []
        keys += ["set runtime.activation_checkpointing: true"] if not run.runtime.activation_checkpointing else []
    keys += ["set runtime.parallel: fsdp"] if ranks.world_size() > 1 and run.runtime.parallel != "fsdp" else []
    resumes = f"{', or '.join(keys)}: the run then resumes from its last checkpoint; or " if keys else ""
    return f"{resumes}train another run with a smaller backbone or {fewer}"
