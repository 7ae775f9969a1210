"""The training loop, the same for every method: views in, loss, checks, optimiser, moving average, records.

Reads top to bottom: `train` is the loop, the functions above it are its parts. Bit-equal resumption on the CPU rests on
three things: sample n is a pure function of (seed, n), torch is seeded by (seed, step, rank) at every step, and a
checkpoint holds student, teacher and optimiser exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mad.config.training import RunConfig
from mad.files import MadError
from mad.models.depthwise import depthwise_in_fp32
from mad.models.heads import Trainee, build_network
from mad.models.masked import drop_paths
from mad.models.vit import build_backbone
from mad.models.weights import Loaded
from mad.progress import log
from mad.training import checkpoint, parallel, ranks, sharding
from mad.training.batch import Batch
from mad.training.data import TrainingSet, batches
from mad.training.memory import announce_memory, memory_errors
from mad.training.method import Losses, Method
from mad.training.objective import num_views
from mad.training.optimiser import BackboneFreeze, set_schedules
from mad.training.process import Interrupted, Stop
from mad.training.records import Records
from mad.training.schedule import cosine
from mad.training.ssl import ema_update


@dataclass
class Run:
    """The state of a run: what a checkpoint holds.

    `precision` names the type of its forward passes, e.g. "bfloat16"; `spread_over` is the number of samples over which the
    regulariser is computed.
    """

    student: Trainee
    teacher: Trainee
    optimiser: torch.optim.Optimizer
    identity: dict[str, Any]
    precision: str
    spread_over: int
    step: int = 0
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint saves, whole on the first process; every process takes part where networks are sharded."""
        return {
            "identity": self.identity,
            "student": sharding.gather_state(self.student.state_dict()),
            "teacher": sharding.gather_state(self.teacher.state_dict()),
            "optimiser": sharding.gather_state(self.optimiser.state_dict()),
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "spread_over": self.spread_over,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.student.load_state_dict(sharding.cut_weights(state["student"], self.student))
        self.teacher.load_state_dict(sharding.cut_weights(state["teacher"], self.teacher))
        self.optimiser.load_state_dict(sharding.cut_moments(state["optimiser"], self.optimiser))
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        if state["threads"] != torch.get_num_threads():
            log(
                f"resumed with {torch.get_num_threads()} threads after {state['threads']}: equal up to rounding, not bit-equal"
            )
        if state["spread_over"] != self.spread_over:
            log(
                f"WARNING: the regulariser sees {self.spread_over} samples at a time from here, {state['spread_over']} before: "
                "another number of passes per step is another objective"
            )


Built = TypeVar("Built", bound=Trainee)


def build_networks(
    run: RunConfig,
    tile_px: int,
    seed: int,
    load: Callable[[nn.Module], Loaded | None] | None = None,
    build: Callable[[nn.Module, RunConfig], Built] = build_network,  # type: ignore[assignment]
) -> tuple[Built, Built]:
    """Student and its moving average, the teacher, equal at the start.

    Args:
        run: for the backbone and its start.
        tile_px: side of the images.
        seed: of the random weights.
        load: replaces those of the backbone (`init: run:NAME`).
        build: the method's network on a backbone.
    """
    torch.manual_seed(seed)
    backbone = build_backbone(run.backbone, tile_px, pretrained=run.init == "timm")
    loaded = None if load is None else load(backbone)
    torch.manual_seed(seed + 1)
    student = build(backbone, run)
    if student.mask_token is not None and loaded is not None and loaded.mask_token is not None:
        with torch.no_grad():
            student.mask_token.copy_(loaded.mask_token)
    teacher = build(build_backbone(run.backbone, tile_px), run)
    teacher.load_state_dict(student.state_dict())
    if run.drop_path:
        drop_paths(student.backbone, run.drop_path, run.backbone.model)
    depthwise_in_fp32(student.backbone)
    teacher.requires_grad_(False).eval()
    return student.train(), teacher


def check_finite(value: Tensor, what: str, step: int, tiles: list[str]) -> float:
    """`value` as a number, the same on all processes; called before optimiser and teacher change.

    Raises:
        MadError: it is NaN or infinite on any process; names the step and, where it is this one's, its tiles.
    """
    value = value.detach()
    finite = torch.isfinite(value)
    if ranks.all_max((~finite).float()):
        if finite:
            raise MadError(
                f"train: {what} is not finite on another process at step {step}, before the weights were changed; that one names "
                "its tiles, and this one stops with it"
            )
        shown = ", ".join(tiles[:20]) + (f" and {len(tiles) - 20} more" if len(tiles) > 20 else "")
        raise MadError(
            f"train: {what} is {float(value)} at step {step}, before the weights were changed; tiles: {shown}. A lower lr, or "
            "precision: fp32, makes another run: give a copy of the entry another name with it, and with `init: file:` the last "
            'file in this run\'s checkpoints/ to start from (docs/training.md, "When a run breaks off")'
        )
    return float(value)


def optimise(model: nn.Module, state: Run, run: RunConfig, tiles: list[str]) -> float:
    """Clip, AdamW, and the moving average; returns the norm of the accumulated gradient before clipping."""
    if state.step < run.freeze_last_layer:
        for prototypes in state.student.last_layers:
            prototypes.grad = None
    norm = sharding.whole(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    clip_grads_with_norm_(model.parameters(), run.clip, norm)
    grad_norm = check_finite(norm, "the norm of the gradient", state.step, tiles)
    state.optimiser.step()
    pairs = zip(state.teacher.parameters(), state.student.parameters(), strict=True)
    moved = [(mine, theirs) for mine, theirs in pairs if theirs.requires_grad]
    momentum = cosine(state.step, run.steps, run.ema, run.ema_end)
    ema_update([sharding.own(mine) for mine, _ in moved], [sharding.own(theirs) for _, theirs in moved], momentum)
    for mine, theirs in zip(state.teacher.buffers(), state.student.buffers(), strict=True):
        mine.copy_(theirs)
    return grad_norm


@dataclass
class Passes:
    """What the forward passes of a step gave: mean losses by name, tiles, kinds, images, seconds of waiting."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    tiles: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    images: int = 0
    waited_s: float = 0.0


def accumulate(
    model: nn.Module,
    state: Run,
    loader: Iterator[Batch],
    passes: int,
    teach_all: Callable[[list[Batch]], list[Any]],
    loss_of: Callable[[nn.Module, Batch, Any], Losses],
) -> Passes:
    """Leave the gradient of the mean loss over `passes` forward passes in the student.

    The teacher sees the whole step before the student sees its first pass: `teach_all` balances its targets over all of it.
    """
    state.optimiser.zero_grad(set_to_none=True)
    begin = time.monotonic()
    with ranks.together(next(model.parameters()).device):
        step = [next(loader) for _ in range(passes)]
    seen = Passes(waited_s=time.monotonic() - begin)
    targets: list[Any] = teach_all(step) if passes > 1 else [None]
    for number, (batch, taught) in enumerate(zip(step, targets, strict=True)):
        seen.tiles += batch.tiles
        seen.kinds |= {group.kind for group in batch.groups}
        seen.images += num_views(batch)
        with parallel.synchronised(model, last=number == passes - 1):
            loss = loss_of(model, batch, taught)
            check_finite(loss.total, "the loss", state.step, batch.tiles)
            (loss.total / passes).backward()
        for part in fields(loss):  # type: ignore[arg-type]
            seen.losses[part.name] = seen.losses.get(part.name, 0.0) + getattr(loss, part.name).detach() / passes
    return seen


def train(state: Run, data: TrainingSet, method: Method, folder: Path) -> None:
    """Run from `state.step` to the last step, writing `folder`/metrics.jsonl and `folder`/checkpoints.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
        MadError: a loss or gradient is not finite, a tile cannot be read, or the memory does not suffice.
        StorageError: the disk is full; the checkpoints saved so far are whole.
    """
    run, chief, world = data.run, ranks.rank() == 0, ranks.world_size()
    passes, checkpoints, device = parallel.num_passes(run, world), folder / "checkpoints", method.numerics.device
    taking_part = chief or sharding.is_sharded(state.student)  # in what needs whole networks
    freeze = BackboneFreeze(state.student, run.freeze_backbone)
    if run.runtime.activation_checkpointing:
        parallel.checkpoint_activations(state.student.backbone)

    def teach_all(step: list[Batch]) -> list[Any]:
        return method.teach(state.student, state.teacher, step, state.step)

    def loss_of(network: nn.Module, batch: Batch, targets: Any = None) -> Losses:
        return method.loss(network, state.teacher, batch, state.step, targets)

    stop, model = Stop(), None
    started = saved_at = time.monotonic()
    earlier, first = state.seconds, state.step
    records: Records | None = None
    try:
        with ranks.together(device):
            records = Records(run, folder, first, device) if chief else None
        with memory_errors(run, device) as estimates:
            if first < run.steps:
                estimates.append(
                    announce_memory(
                        state.student, state.teacher, data, lambda part: loss_of(state.student, part).total, passes
                    )
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
                lr = set_schedules(state.optimiser, run, state.step)
                seen = accumulate(model, state, loader, passes, teach_all, loss_of)
                grad_norm = optimise(model, state, run, seen.tiles)
                means = ranks.all_sum(torch.stack(list(seen.losses.values()))) / world
                now = time.monotonic()
                state.step += 1
                state.seconds = earlier + now - started
                late = now - saved_at >= 60 * run.runtime.checkpoint_minutes
                done, (stopping, due) = state.step == run.steps, ranks.any_of([stop.asked, late], device)
                due = due or done or stopping or state.step % run.runtime.checkpoint_steps == 0
                with ranks.together(device):  # the checkpoint is whole before anyone leaves
                    figures = None
                    if taking_part and (done or state.step % run.runtime.health_every == 0):
                        figures = method.check(state.student, state.teacher, state.step - 1)
                    saved = state.state() if taking_part and due else {}
                    if records:
                        records.add(
                            seen.losses, means, step=state.step - 1, lr=lr, grad_norm=grad_norm,
                            kinds="+".join(sorted(seen.kinds)), data_wait_s=seen.waited_s, images=seen.images * world,
                            seconds=now - begin, health=figures, show=done or stopping,
                        )  # fmt: skip
                        if due:
                            records.flush()
                            checkpoint.save(checkpoints, state.step, saved)
                if due:
                    saved_at = time.monotonic()
                if stopping and not done:
                    raise Interrupted(
                        f"{run.name}: stopped by {stop.by} at step {state.step}; the next start resumes there"
                    )
    finally:
        stop.release()
        if records:
            records.close()
    ranks.barrier()
