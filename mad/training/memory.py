"""How much memory a step needs, told before the first one, and what to lower where it was too much.

Weights, gradients, AdamW's two moments and the teacher are counted; activations are measured: the bytes that autograd keeps
for the backward pass of one and of two samples, read by `torch.autograd.graph.saved_tensors_hooks`. Temporary tensors and
what the allocator does not give back come on top: on a CPU glibc's heap may hold several times as much, unless the
environment sets MALLOC_MMAP_THRESHOLD_=500000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mad.config.training import RunConfig
from mad.files import MadError
from mad.progress import log
from mad.training import ranks
from mad.training.data import Batch, TrainingSet

TRIAL_STEPS = 64  # enough that every kind has had its turn, unless it hardly counts
SCARCE = ("not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory")  # torch's words


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

    @property
    def activations(self) -> int:
        """Of one pass."""
        return self.fixed + self.per_sample * self.samples

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.teacher + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "AdamW": self.moments, "teacher": self.teacher}
        listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
        kept = f"activations {size(self.activations)} for {self.samples} samples of {size(self.per_sample)}"
        return f"{size(self.total)} ({listed}, {kept})"


def size(num_bytes: float) -> str:
    """Bytes in words, in decimal units."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def estimate_memory(
    student: nn.Module, teacher: nn.Module, batches: list[list[Batch]], loss: Callable[[Batch], Tensor], samples: int,
    copies: int = 1,
) -> MemoryEstimate:  # fmt: skip
    """What a step of `samples` samples per pass needs.

    Args:
        student: Its parameters may be frozen: those need neither gradients nor moments.
        batches: For each sort of views a batch of one sample and one of two; the largest sort counts.
        loss: One forward pass, graph included.
        copies: Of the gradients: 2 under DistributedDataParallel, whose buckets hold them once more.
    """
    trained = _num_bytes(p for p in student.parameters() if p.requires_grad)
    measured = [[saved_bytes(student, teacher, partial(loss, batch)) for batch in pair] for pair in batches]
    per_sample, fixed = max((two - one, max(2 * one - two, 0)) for one, two in measured)
    return MemoryEstimate(
        weights=_num_bytes(student.parameters()), gradients=copies * trained, moments=2 * trained,
        teacher=_num_bytes(teacher.parameters()), fixed=fixed, per_sample=per_sample, samples=samples,
    )  # fmt: skip


def _num_bytes(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trial_batches(data: TrainingSet) -> list[list[Batch]]:
    """Of each kind of sample in a run's first batches: one, and the same one twice."""
    first: dict[str, int] = {}
    for n in range(min(data.run.steps, TRIAL_STEPS) * data.run.batch):
        first.setdefault(data.order[n][0], n)
        if len(first) == len(data.order.kinds):
            break
    return [[data.__getitems__([n]), data.__getitems__([n, n])] for n in first.values()]


def saved_bytes(student: nn.Module, teacher: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward()`, without the networks' own weights.

    Running statistics and random numbers are afterwards as before.
    """
    networks = (student, teacher)
    own = {tensor.untyped_storage().data_ptr() for net in networks for tensor in (*net.parameters(), *net.buffers())}
    buffers = [(buffer, buffer.clone()) for net in networks for buffer in net.buffers()]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    devices = sorted({p.device.index or 0 for p in student.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return sum(kept.values())


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free for this process: the GPU's, or the machine's within the limit of its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        found.append(int(limit) - int((group / "memory.current").read_text()))
    return min(found, default=None)


def announce_memory(
    student: nn.Module, teacher: nn.Module, data: TrainingSet, loss: Callable[[Batch], Tensor], passes: int
) -> None:
    """Log what a step of `passes` passes will need beside what is free; every process takes part."""
    run, world, device = data.run, ranks.world_size(), next(student.parameters()).device
    samples, copies = run.batch // world // passes, 1 if world == 1 else 2
    estimate = estimate_memory(student, teacher, trial_batches(data), loss, samples, copies)
    free = free_bytes(device)
    if ranks.rank() == 0:
        known = "" if free is None else f"; free on {device}: {size(free)}"
        log(f"{run.name}: memory of a step, estimated: {estimate}{known}")
        if free is not None and estimate.total > free:
            log(f"{run.name}: WARNING: that is more than is free; where it fails, {remedies(run)}")


@contextmanager
def memory_errors(run: RunConfig, device: torch.device) -> Iterator[None]:
    """Turn an allocation that failed into one message that says what to lower.

    Raises:
        MadError: the device or the machine has too little memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        certain = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not certain and not any(words in str(error).lower() for words in SCARCE):
            raise
        free = free_bytes(device)
        known = "" if free is None else f" ({size(free)} are free)"
        raise MadError(
            f"runs.{run.name}: not enough memory on {device}{known}; {remedies(run)}; the run then resumes from its last "
            "checkpoint"
        ) from error


def remedies(run: RunConfig) -> str:
    """What would lower a run's need of memory, in the order in which to try it."""
    micro = run.runtime.micro_batch
    keys = [f"lower runtime.micro_batch (now {micro or 'the whole share of the batch'})"] if micro != 1 else []
    keys += ["set runtime.activation_checkpointing: true"] if not run.runtime.activation_checkpointing else []
    return ", or ".join([*keys, "take a smaller backbone or fewer head.prototypes"])
