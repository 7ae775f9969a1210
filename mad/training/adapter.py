"""Training of a cross-scale adapter: MAD's objective, with frozen embeddings in the place of images and backbone.

    mad        the moving-average teacher sees a parent's embedding, the student its children's, drawn anew each time:
               cross-entropy over prototypes, targets balanced by Sinkhorn-Knopp (MAD paper, Methods); `both_ways` adds the same
               with parent and children changing places
    contrast   InfoNCE: which of the batch's parents is a child's, which child is a parent's
    keep       mean (cos(z_i, z_j) - cos(x~_i, x~_j))^2 over tiles i, j of one magnification: what a magnification tells its own
               tiles apart by is not given up; any rotation is free
    koleo      spreads the parents, and the children of each position (mad.training.ssl)

Own choices: everything but the first term. Embeddings cannot be augmented, so parent and child are the only two views. The
prototypes lie in the space of the adapted embeddings, without an MLP between, since that MLP would align instead of the adapter
and is thrown away. Every step takes a batch of each transition of the ladder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mad.config.adapters import AdapterConfig
from mad.config.training import RunConfig
from mad.files import MadError
from mad.models.adapter import Adapter
from mad.models.heads import DinoHead
from mad.progress import Steps
from mad.training.index import Index
from mad.training.mem import info_nce
from mad.training.objective import KOLEO_FLOOR
from mad.training.pairing import Pairing
from mad.training.schedule import cosine, warmup_cosine
from mad.training.seeds import generators
from mad.training.ssl import by_position, dino_cross_entropy, ema_update, koleo, pair_terms, sinkhorn_knopp

STREAM = 32  # of a seed's random numbers, independent of those of other trainings
CHECKS = 5  # of the held-out patients, beside the one before the first step


@dataclass(frozen=True)
class PairBatch:
    """Standardised embeddings of one transition: `parents` [B, D] at magnification `coarse`, `children` [B, C, D] at `fine`."""

    parents: Tensor
    children: Tensor
    coarse: float
    fine: float


class Tower(nn.Module):
    """An adapter and prototypes; the teacher is the moving average of the student's."""

    def __init__(self, adapter: Adapter, prototypes: int) -> None:
        super().__init__()
        self.adapter = adapter
        self.head = DinoHead(adapter.shape.dim, 1, adapter.shape.dim, prototypes)
        self.head.mlp = nn.Sequential()


def losses(entry: AdapterConfig, student: Tower, teacher: Tower, batch: PairBatch) -> dict[str, Tensor]:
    """`align`, `keep` and `koleo`, unweighted, of a batch of one transition."""
    count = batch.children.shape[:2]
    up = student.adapter.adapt(batch.parents, batch.coarse)
    down = student.adapter.adapt(batch.children.flatten(0, 1), batch.fine).unflatten(0, count)
    if entry.loss == "contrast":
        found = [info_nce(down[:, position], up, entry.contrast_temp) for position in range(count[1])]
        align = torch.stack(found).mean()
    else:
        align = _cross_entropy(entry, student, teacher, batch, up, down)
    frozen = (batch.parents, up), (batch.children.flatten(0, 1), down.flatten(0, 1))
    keep = torch.stack([keep_neighbours(before, after) for before, after in frozen]).mean()
    spread = koleo(up, KOLEO_FLOOR) + by_position(lambda x: koleo(x, KOLEO_FLOOR), down)
    return {"align": align, "keep": keep, "koleo": spread / 2}


def _cross_entropy(
    entry: AdapterConfig, student: Tower, teacher: Tower, batch: PairBatch, up: Tensor, down: Tensor
) -> Tensor:
    """MAD's cross-entropy of children [B, C, D] against their parents [B, D] and, `both_ways`, of parents against children."""
    children = down.shape[1]
    with torch.no_grad():
        scores = teacher.head(teacher.adapter.adapt(batch.parents, batch.coarse))
        target = sinkhorn_knopp(scores, entry.teacher_temp)[:, None]
    upwards = dino_cross_entropy(
        student.head(down.flatten(0, 1)).unflatten(0, down.shape[:2]),
        target,
        _terms(children, 1, up),
        entry.student_temp,
    ).mean()
    if not entry.both_ways:
        return upwards
    with torch.no_grad():
        scores = teacher.head(teacher.adapter.adapt(batch.children.flatten(0, 1), batch.fine))
        targets = sinkhorn_knopp(scores, entry.teacher_temp).unflatten(0, down.shape[:2])
    downwards = dino_cross_entropy(
        student.head(up)[:, None], targets, _terms(1, children, up), entry.student_temp
    ).mean()
    return (upwards + downwards) / 2


def _terms(student_views: int, teacher_views: int, like: Tensor) -> Tensor:
    return pair_terms(student_views, teacher_views).to(like.device)


def keep_neighbours(before: Tensor, after: Tensor) -> Tensor:
    """Mean squared change of the cosines between embeddings [N, D] before and after."""
    cosines = [unit @ unit.T for unit in (F.normalize(x.float(), dim=-1) for x in (before, after))]
    return (cosines[1] - cosines[0]).square().mean()


class PairSource:
    """Batches of pairs by the number of the step: a pure function of (seed, step)."""

    def __init__(self, entry: AdapterConfig, seed: int, index: Index, features: NDArray, adapter: Adapter) -> None:
        """`index` holds the pairs of the train split; its rows are those of `features` [n, D], which `adapter` standardises.

        Raises:
            MadError: no transition has two pairs.
        """
        # MAD's own draws of children, and of its shuffled control
        as_run = RunConfig(name=entry.name, method="mad", children=entry.children, pairs=entry.pairs)
        self._pairing, self._seed, self._batch = Pairing(index, as_run), seed, entry.batch
        self._features, self._adapter = features, adapter
        self.counts = {kind: len(places) for kind, places in self._pairing.usable.items() if len(places) > 1}
        if not self.counts:
            raise MadError(
                f"adapters.{entry.name}: no transition of the train split has two pairs with {entry.children} embedded children; "
                "look at report/qc.html, and at sample.max_pairs"
            )

    def __call__(self, step: int) -> list[PairBatch]:
        """One batch of each transition; no parent twice in it."""
        (rng,) = generators(self._seed, STREAM, [step])
        found = []
        for kind in self.counts:
            usable = self._pairing.usable[kind]
            places = rng.permutation(usable)[: self._batch]
            drawn = [self._pairing.draw(kind, int(place), rng) for place in places]
            coarse, fine = (float(name.removesuffix("x")) for name in kind.split("-"))
            parents = self._read([parent for parent, _ in drawn], coarse)
            children = self._read([own for _, own in drawn], fine)
            found.append(PairBatch(parents, children, coarse, fine))
        return found

    def _read(self, rows: list[Any], magnification: float) -> Tensor:
        features = torch.from_numpy(self._features[np.array(rows)]).to(self._adapter.mean.device)
        return self._adapter.standardise(features, magnification)


def uniform(entry: AdapterConfig, source: PairSource) -> float:
    """What `align` is where nothing is learned: ln K, or the mean over transitions of ln B."""
    if entry.loss == "mad":
        return math.log(entry.prototypes)
    sizes = [min(count, entry.batch) for count in source.counts.values()]
    return math.fsum(math.log(size) for size in sizes) / len(sizes)


def train_adapter(
    adapter: Adapter,
    entry: AdapterConfig,
    seed: int,
    source: PairSource,
    check: Callable[[Adapter], dict[str, Any]],
) -> tuple[Adapter, list[dict[str, Any]]]:
    """Train; returns the moving average, and a record per step, with what `check` finds of it under `health` some times.

    Args:
        adapter: untrained, with the moments of the train split.
        entry: its configuration.
        seed: of prototypes and order.
        source: of the batches.
        check: figures on held-out patients.

    Raises:
        MadError: a loss or gradient is not finite.
    """
    torch.manual_seed(seed)
    device = adapter.mean.device
    student = Tower(adapter, entry.prototypes).to(device)
    teacher = deepcopy(student).requires_grad_(False)
    groups = [
        {"params": [p for p in student.parameters() if (p.ndim >= 2) == decays], "weight_decay": decay}
        for decays, decay in ((True, entry.weight_decay), (False, 0.0))
    ]
    optimiser = torch.optim.AdamW(groups, lr=entry.lr)
    records: list[dict[str, Any]] = []
    progress, every = Steps(entry.name, entry.steps), max(1, math.ceil(entry.steps / CHECKS))
    try:
        for step in range(entry.steps):
            lr = warmup_cosine(step, entry.steps, entry.warmup, entry.lr, 0.0)
            for group in optimiser.param_groups:
                group["lr"] = lr
            of_each = [losses(entry, student, teacher, batch) for batch in source(step)]
            parts = {name: torch.stack([each[name] for each in of_each]).mean() for name in of_each[0]}
            total = parts["align"] + entry.keep * parts["keep"] + entry.koleo * parts["koleo"]
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            norm = nn.utils.clip_grad_norm_(student.parameters(), entry.clip)
            if not bool(torch.isfinite(total) and torch.isfinite(norm)):
                raise MadError(f"adapters.{entry.name}: loss or gradient is not finite at step {step}; lower lr")
            optimiser.step()
            ema_update(teacher.parameters(), student.parameters(), cosine(step, entry.steps, entry.ema, 1.0))
            record: dict[str, Any] = {"step": step, "loss": float(total.detach()), "lr": lr, "grad_norm": float(norm)}
            record |= {name: float(part.detach()) for name, part in parts.items()}
            done = step + 1 == entry.steps
            if done or (step + 1) % every == 0:
                record["health"] = check(teacher.adapter)
            records.append(record)
            told = f"loss {record['loss']:.3f}, align {record['align']:.3f}"
            progress.advance(told.__str__, force=done)
    finally:
        progress.close()
    return teacher.adapter.eval(), records
