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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mad.config.training import RunConfig
from mad.files import MadError
from mad.models.heads import DinoHead, Network
from mad.models.vit import build_backbone, embedding_dim
from mad.progress import log
from mad.training import checkpoint, ranks
from mad.training.data import TrainingSet, batches
from mad.training.health import HealthSet, check_health
from mad.training.objective import Numerics, num_views, step_loss
from mad.training.schedule import cosine, linear, warmup_cosine
from mad.training.ssl import ema_update


class Interrupted(Exception):  # noqa: N818  a request, not an error
    """The run was asked to stop (SIGTERM) and has saved a checkpoint of the step that it names."""


@dataclass
class Run:
    """The state of a run: what a checkpoint holds. `precision` names the type of its forward passes, e.g. "bfloat16"."""

    student: Network
    teacher: Network
    optimiser: torch.optim.Optimizer
    identity: dict[str, Any]
    precision: str
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


def build_networks(
    run: RunConfig, tile_px: int, seed: int, load: Callable[[nn.Module], Any] | None = None
) -> tuple[Network, Network]:
    """Student and teacher, equal at the start. `load` replaces the random weights of the backbone (`init: run:NAME`)."""
    torch.manual_seed(seed)
    backbone = build_backbone(run.backbone, tile_px, pretrained=run.init == "timm")
    if load is not None:
        load(backbone)
    torch.manual_seed(seed + 1)
    head = (run.head.hidden, run.head.bottleneck, run.head.prototypes)
    student = Network(backbone, DinoHead(embedding_dim(backbone), *head))
    teacher = Network(build_backbone(run.backbone, tile_px), DinoHead(embedding_dim(backbone), *head))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False).eval()
    return student.train(), teacher


def build_optimiser(student: nn.Module, run: RunConfig) -> torch.optim.Optimizer:
    """AdamW with two groups: matrices and kernels decay, biases, norms and other vectors do not."""
    decayed = [p for p in student.parameters() if p.ndim >= 2]
    plain = [p for p in student.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "decays": True}, {"params": plain, "decays": False, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=run.lr, fused=True)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of forward passes: bf16 where it is asked for, or where `auto` finds the device good at it."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        good = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        good = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if good else torch.float32


def set_schedules(optimiser: torch.optim.Optimizer, run: RunConfig, step: int) -> float:
    """Put the learning rate and weight decay of `step` into the optimiser; returns the learning rate."""
    lr = warmup_cosine(step, run.steps, run.warmup, run.lr, run.min_lr)
    decay = cosine(step, run.steps, run.weight_decay, run.weight_decay_end)
    for group in optimiser.param_groups:
        group["lr"] = lr
        group["weight_decay"] = decay if group["decays"] else 0.0
    return lr


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


def optimise(model: nn.Module, state: Run, loss: Tensor, run: RunConfig, tiles: list[str]) -> float:
    """Backward, clip, AdamW, and the teacher's moving average; returns the norm of the gradient before clipping."""
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if state.step < run.freeze_last_layer:
        state.student.head.prototypes.grad = None
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
    grad_norm = check_finite(norm, "the norm of the gradient", state.step, tiles)
    state.optimiser.step()
    ema_update(
        state.teacher.parameters(), state.student.parameters(), cosine(state.step, run.steps, run.ema, run.ema_end)
    )
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


def train(state: Run, data: TrainingSet, health: HealthSet, numerics: Numerics, folder: Path) -> None:
    """Run from `state.step` to the last step, writing `folder`/metrics.jsonl and `folder`/checkpoints.

    Raises:
        Interrupted: SIGTERM came; a checkpoint was saved.
        MadError: a loss or gradient is not finite, or a tile cannot be read.
    """
    run, chief, world = data.run, ranks.rank() == 0, ranks.world_size()
    model: nn.Module = state.student
    if world > 1:
        model = nn.parallel.DistributedDataParallel(state.student)
    stop, checkpoints = Stop(), folder / "checkpoints"
    loader = batches(data, start=state.step, rank=ranks.rank(), world=world, workers=run.runtime.workers)
    ln_k, started, earlier, first = math.log(run.head.prototypes), time.monotonic(), state.seconds, state.step
    saved_at = logged_at = started
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        try:
            while state.step < run.steps:
                begin = time.monotonic()
                batch = next(loader)
                loaded = time.monotonic()
                torch.manual_seed(hash((data.seed, state.step, ranks.rank())) % 2**63)
                lr = set_schedules(state.optimiser, run, state.step)
                temp = linear(state.step, run.teacher_temp_warmup, run.teacher_temp_start, run.teacher_temp)
                loss = step_loss(model, state.teacher, batch, run, numerics, temp)
                check_finite(loss.total, "the loss", state.step, batch.tiles)
                grad_norm = optimise(model, state, loss.total, run, batch.tiles)
                shares = torch.stack([loss.total, loss.dino, loss.koleo]).detach()
                value, dino, koleo = (ranks.all_sum(shares) / world).tolist()
                now = time.monotonic()
                record: dict[str, Any] = {"step": state.step, "loss": value, "dino": dino, "dino_of_ln_k": dino / ln_k}
                record |= {"koleo": koleo, "lr": lr, "grad_norm": grad_norm}
                record |= {"kinds": "+".join(group.kind for group in batch.groups), "data_wait_s": loaded - begin}
                record["images_per_s"] = num_views(batch) * world / (now - begin)
                state.step += 1
                state.seconds = earlier + now - started
                done, stopping = state.step == run.steps, stop.agreed(numerics.device)
                if chief and (done or state.step % run.runtime.health_every == 0):
                    record["health"] = check_health(
                        state.student, state.teacher, health, numerics, run.student_temp, temp
                    )
                if chief:
                    metrics.write(json.dumps(record) + "\n")
                    metrics.flush()
                    if done or stopping or now - logged_at >= run.runtime.log_seconds:
                        rate = (state.step - first) / (now - started)
                        left = (run.steps - state.step) / rate
                        log(
                            f"{run.name}: step {state.step}/{run.steps} loss {value:.3f} ({dino / ln_k:.3f} of ln K) "
                            f"{record['images_per_s']:.0f} images/s, {left:.0f} s left"
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
