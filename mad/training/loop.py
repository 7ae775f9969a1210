"""The training loop, the same for every method: views in, loss, checks, optimiser, moving-average teacher, records.

Reads top to bottom: `train` is the loop, the functions above it are its parts. Bit-equal resumption on the CPU rests on
three things: sample n is a pure function of (seed, n), torch is seeded by (seed, step, rank) at every step, and a
checkpoint holds student, teacher and optimiser exactly.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mad.config.training import RunConfig
from mad.files import FULL, MadError, StorageError
from mad.models.depthwise import depthwise_in_fp32
from mad.models.heads import Network, build_network
from mad.models.masked import drop_paths
from mad.models.vit import build_backbone
from mad.progress import log
from mad.training import checkpoint, parallel, ranks
from mad.training.data import Batch, TrainingSet, batches
from mad.training.health import HealthSet, check_health
from mad.training.memory import announce_memory, memory_errors
from mad.training.objective import Numerics, StepLoss, num_views, step_loss
from mad.training.optimiser import BackboneFreeze, set_schedules
from mad.training.schedule import cosine, linear
from mad.training.ssl import ema_update


class Interrupted(Exception):  # noqa: N818  a request, not an error
    """The run was asked to stop (SIGTERM) and has saved a checkpoint of the step that it names."""


@dataclass
class Run:
    """The state of a run: what a checkpoint holds.

    `precision` names the type of its forward passes, e.g. "bfloat16"; `balanced_over` is the number of samples over which
    the teacher's targets are balanced.
    """

    student: Network
    teacher: Network
    optimiser: torch.optim.Optimizer
    identity: dict[str, Any]
    precision: str
    balanced_over: int
    step: int = 0
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint saves."""
        return {
            "identity": self.identity,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "balanced_over": self.balanced_over,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        if state["threads"] != torch.get_num_threads():
            log(
                f"resumed with {torch.get_num_threads()} threads after {state['threads']}: equal up to rounding, not bit-equal"
            )
        if state["balanced_over"] != self.balanced_over:
            log(
                f"WARNING: targets are balanced over {self.balanced_over} samples from here, over {state['balanced_over']} "
                "before: another number of passes per step is another objective"
            )


def build_networks(
    run: RunConfig, tile_px: int, seed: int, load: Callable[[nn.Module], Any] | None = None
) -> tuple[Network, Network]:
    """Student and teacher, equal at the start. `load` replaces the random weights of the backbone (`init: run:NAME`)."""
    torch.manual_seed(seed)
    backbone = build_backbone(run.backbone, tile_px, pretrained=run.init == "timm")
    if load is not None:
        load(backbone)
    torch.manual_seed(seed + 1)
    student = build_network(backbone, run)
    teacher = build_network(build_backbone(run.backbone, tile_px), run)
    teacher.load_state_dict(student.state_dict())
    if run.drop_path:
        drop_paths(student.backbone, run.drop_path, run.backbone.model)
    depthwise_in_fp32(student.backbone)
    teacher.requires_grad_(False).eval()
    return student.train(), teacher


def check_finite(value: Tensor, what: str, step: int, tiles: list[str]) -> float:
    """`value` as a number, the same on all processes; called before optimiser and teacher change.

    Raises:
        MadError: it is NaN or infinite on any process; names the step and this process's tiles.
    """
    value = value.detach()
    bad = ranks.all_max((~torch.isfinite(value)).float())
    if bad:
        shown = ", ".join(tiles[:20]) + (f" and {len(tiles) - 20} more" if len(tiles) > 20 else "")
        raise MadError(
            f"train: {what} is {float(value)} at step {step}, before the weights were changed; tiles: {shown}. Lower lr, or "
            f"set precision: fp32, and run again: training resumes from the last checkpoint"
        )
    return float(value)


def optimise(model: nn.Module, state: Run, run: RunConfig, tiles: list[str]) -> float:
    """Clip, AdamW, and the teacher's moving average; returns the norm of the accumulated gradient before clipping."""
    if state.step < run.freeze_last_layer:
        for head in state.student.heads:
            head.prototypes.grad = None
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
    grad_norm = check_finite(norm, "the norm of the gradient", state.step, tiles)
    state.optimiser.step()
    pairs = zip(state.teacher.parameters(), state.student.parameters(), strict=True)
    moved = [(mine, theirs) for mine, theirs in pairs if theirs.requires_grad]
    momentum = cosine(state.step, run.steps, run.ema, run.ema_end)
    ema_update([mine for mine, _ in moved], [theirs for _, theirs in moved], momentum)
    for mine, theirs in zip(state.teacher.buffers(), state.student.buffers(), strict=True):
        mine.copy_(theirs)
    return grad_norm


class Stop:
    """Set by SIGTERM; processes agree on it between steps."""

    def __init__(self) -> None:
        self.asked = False
        self._previous = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop."""
        if ranks.world_size() == 1:
            return self.asked
        return bool(ranks.all_max(torch.tensor(float(self.asked), device=device)))

    def release(self) -> None:
        """Give the signal back to its former handler."""
        signal.signal(signal.SIGTERM, self._previous)


@dataclass
class Passes:
    """What the forward passes of a step gave: mean losses by name of `StepLoss`, tiles, kinds, images, seconds of waiting."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    tiles: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    images: int = 0
    waited_s: float = 0.0


def accumulate(
    model: nn.Module, state: Run, loader: Iterator[Batch], passes: int, loss_of: Callable[[nn.Module, Batch], StepLoss]
) -> Passes:
    """Leave the gradient of the mean loss over `passes` forward passes in the student."""
    state.optimiser.zero_grad(set_to_none=True)
    seen = Passes()
    for number in range(passes):
        begin = time.monotonic()
        batch = next(loader)
        seen.waited_s += time.monotonic() - begin
        seen.tiles += batch.tiles
        seen.kinds |= {group.kind for group in batch.groups}
        seen.images += num_views(batch)
        with parallel.synchronised(model, last=number == passes - 1):
            loss = loss_of(model, batch)
            check_finite(loss.total, "the loss", state.step, batch.tiles)
            (loss.total / passes).backward()
        for part in fields(loss):
            seen.losses[part.name] = seen.losses.get(part.name, 0.0) + getattr(loss, part.name).detach() / passes
    return seen


def train(state: Run, data: TrainingSet, health: HealthSet, numerics: Numerics, folder: Path) -> None:
    """Run from `state.step` to the last step, writing `folder`/metrics.jsonl and `folder`/checkpoints.

    Raises:
        Interrupted: SIGTERM came; a checkpoint was saved.
        MadError: a loss or gradient is not finite, a tile cannot be read, or the memory does not suffice.
        StorageError: the disk is full; the checkpoints saved so far are whole.
    """
    run, chief, world = data.run, ranks.rank() == 0, ranks.world_size()
    passes, checkpoints = parallel.num_passes(run, world), folder / "checkpoints"
    freeze = BackboneFreeze(state.student, run.freeze_backbone)
    if run.runtime.activation_checkpointing:
        parallel.checkpoint_activations(state.student.backbone)

    def loss_of(network: nn.Module, batch: Batch) -> StepLoss:
        return step_loss(network, state.teacher, batch, run, numerics, teacher_temp(run, state.step))

    stop, model, metrics = Stop(), None, folder / "metrics.jsonl"
    started = saved_at = logged_at = time.monotonic()
    earlier, first, ln_k = state.seconds, state.step, math.log(run.head.prototypes)
    try:
        with memory_errors(run, numerics.device):
            if first < run.steps:
                announce_memory(
                    state.student, state.teacher, data, lambda part: loss_of(state.student, part).total, passes
                )
            if run.runtime.compile:
                parallel.compile_blocks(state.student, state.teacher)
            layout = {"rank": ranks.rank(), "world": world, "passes": passes}
            loader = batches(data, start=first, workers=run.runtime.workers, **layout)
            while state.step < run.steps:
                begin = time.monotonic()
                if freeze.apply(state.step) or model is None:
                    model = parallel.replicate(state.student)
                torch.manual_seed(hash((data.seed, state.step, ranks.rank())) % 2**63)
                lr, temp = set_schedules(state.optimiser, run, state.step), teacher_temp(run, state.step)
                seen = accumulate(model, state, loader, passes, loss_of)
                grad_norm = optimise(model, state, run, seen.tiles)
                means = (ranks.all_sum(torch.stack(list(seen.losses.values()))) / world).tolist()
                losses = dict(zip(seen.losses, means, strict=True))
                now = time.monotonic()
                record: dict[str, Any] = {"step": state.step, "loss": losses.pop("total"), **losses}
                record |= {"dino_of_ln_k": record["dino"] / ln_k, "lr": lr, "grad_norm": grad_norm}
                record |= {"kinds": "+".join(sorted(seen.kinds)), "data_wait_s": seen.waited_s}
                record["images_per_s"] = seen.images * world / (now - begin)
                state.step += 1
                state.seconds = earlier + now - started
                done, stopping = state.step == run.steps, stop.agreed(numerics.device)
                if chief and (done or state.step % run.runtime.health_every == 0):
                    record["health"] = check_health(
                        state.student, state.teacher, health, numerics, run.student_temp, temp
                    )
                if chief:
                    append_line(metrics, json.dumps(record))
                    if done or stopping or now - logged_at >= run.runtime.log_seconds:
                        left = (run.steps - state.step) * (now - started) / (state.step - first)
                        log(
                            f"{run.name}: step {state.step}/{run.steps} loss {record['loss']:.3f} "
                            f"({record['dino_of_ln_k']:.3f} of ln K) {record['images_per_s']:.0f} images/s, {left:.0f} s left"
                        )
                        logged_at = now
                    due = state.step % run.runtime.checkpoint_steps == 0
                    if done or stopping or due or now - saved_at >= 60 * run.runtime.checkpoint_minutes:
                        checkpoint.save(checkpoints, state.step, state.state())
                        saved_at = time.monotonic()
                if stopping and not done:
                    ranks.barrier()  # the checkpoint is whole before anyone leaves
                    raise Interrupted(
                        f"{run.name}: stopped by SIGTERM at step {state.step}; the next start resumes there"
                    )
    finally:
        stop.release()
    ranks.barrier()


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file.

    Raises:
        StorageError: the disk is full.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StorageError(f"{path}: cannot be written ({error.strerror}); make room, then the run resumes") from None


def teacher_temp(run: RunConfig, step: int) -> float:
    """Temperature of the teacher's targets at `step`."""
    return linear(step, run.teacher_temp_warmup, run.teacher_temp_start, run.teacher_temp)
