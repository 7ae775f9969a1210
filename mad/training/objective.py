"""One step's loss from student, teacher and a batch: the only place where a method's views meet its losses.

Both methods use DINO's cross-entropy against Sinkhorn-Knopp targets, and KoLeo. They differ in the views (`views.py`) and in
the terms: under `mad` every child answers to every view of its parent; in multi-crop every student crop answers to every
other global crop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mad.config.training import STANDALONE, RunConfig
from mad.training import ranks
from mad.training.data import Batch, Group
from mad.training.ssl import dino_cross_entropy, koleo_by_position, multicrop_terms, pair_terms, sinkhorn_knopp
from mad.training.views import normalise

KOLEO_FLOOR = 0.01  # two tiles of bare glass coincide: with a smaller floor their repulsion drowns every other gradient


@dataclass(frozen=True)
class Numerics:
    """How images become tensors: normalisation of the backbone, device, and the type of the forward pass."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    dtype: torch.dtype

    def images(self, views: Tensor) -> Tensor:
        """uint8 views [B, V, H, W, 3] to normalised images [B * V, 3, H, W] on the device."""
        return normalise(views.to(self.device, non_blocking=True).flatten(0, 1), self.mean, self.std)

    def autocast(self) -> torch.autocast:
        """The context of forward passes."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class StepLoss:
    """`total` is minimised; `dino` (mean cross-entropy) and `koleo` (unweighted) are its parts."""

    total: Tensor
    dino: Tensor
    koleo: Tensor


def full_size(group: Group) -> Tensor:
    """The student's full-size views: the children of pairs, the global crops of multi-crops."""
    return group.teacher if group.student is None else group.student


def num_views(batch: Batch) -> int:
    """Images that pass through a network in a step: the teacher's and the student's."""
    return sum(
        view.shape[0] * view.shape[1]
        for group in batch.groups
        for view in (group.teacher, full_size(group), group.local)
    )


def loss_names(run: RunConfig, kinds: list[str]) -> list[str]:
    """The losses of a run in words, for its model card."""
    crops = run.views
    cross = f"DINO cross-entropy, Sinkhorn-Knopp targets, K = {run.head.prototypes}"
    multicrop = f"{cross}: multi-crop, {crops.global_crops} global + {crops.local_crops} local"
    if run.method == "mad":
        pairs = [kind for kind in kinds if kind != STANDALONE]
        names = (
            [f"{cross}: {run.children} children against 2 views of their parent ({', '.join(pairs)})"] if pairs else []
        )
        names += [f"{multicrop} (standalone tiles)"] if STANDALONE in kinds else []
    else:
        names = [f"{multicrop} ({', '.join(kinds)})"]
    return names + ([f"KoLeo, weight {run.koleo:g}, per view position"] if run.koleo else [])


def step_loss(
    student: nn.Module, teacher: nn.Module, batch: Batch, run: RunConfig, numerics: Numerics, teacher_temp: float
) -> StepLoss:
    """The loss of one process's share of a batch; its gradient, averaged over processes, is that of the global batch."""
    groups = batch.groups
    distributed = ranks.world_size() > 1
    large = torch.cat([numerics.images(full_size(group)) for group in groups])
    small = [numerics.images(group.local) for group in groups if group.local.numel()]
    with numerics.autocast():
        with torch.no_grad():
            context = torch.cat([numerics.images(group.teacher) for group in groups])
            teacher_scores = teacher([context])[1][0]
        embeddings, scores = student([large, torch.cat(small)] if small else [large])
    targets = sinkhorn_knopp(teacher_scores, teacher_temp, distributed=distributed)

    per_sample, at_target, at_large, at_small = [], 0, 0, 0
    by_kind: dict[str, Tensor] = {}
    for group in groups:
        count, teacher_views = group.teacher.shape[:2]
        student_views, local_views = full_size(group).shape[1], group.local.shape[1]
        q = targets[at_target : (at_target := at_target + count * teacher_views)].unflatten(0, (count, teacher_views))
        rows = slice(at_large, at_large := at_large + count * student_views)
        p = scores[0][rows].unflatten(0, (count, student_views))
        by_kind[group.kind] = embeddings[0][rows].unflatten(0, (count, student_views))
        if local_views:
            local = scores[1][at_small : (at_small := at_small + count * local_views)]
            p = torch.cat([p, local.unflatten(0, (count, local_views))], dim=1)
        is_pair = group.kind == "pair"
        terms = pair_terms(student_views, teacher_views) if is_pair else multicrop_terms(teacher_views, local_views)
        per_sample.append(dino_cross_entropy(p, q, terms.to(p.device), run.student_temp))
    values = torch.cat(per_sample)
    total = ranks.all_sum(torch.tensor(float(len(values)), device=values.device))
    dino = values.sum() * ranks.world_size() / total
    spread = _koleo(by_kind, embeddings[0], run) if run.koleo else torch.zeros_like(dino)
    return StepLoss(dino + run.koleo * spread, dino, spread)


def _koleo(by_kind: dict[str, Tensor], embeddings: Tensor, run: RunConfig) -> Tensor:
    """KoLeo of every kind of view over all processes, weighted by samples.

    Every process takes part for every kind that its method can hold, with no rows where its share has none of it.
    """
    sizes = {"multicrop": run.views.global_crops} | ({"pair": run.children} if run.method == "mad" else {})
    losses, counts = [], []
    for kind, views in sizes.items():
        rows = by_kind.get(kind, embeddings[:0].reshape(0, views, embeddings.shape[-1]))
        everyone = ranks.gather(rows)
        if len(everyone):
            losses.append(koleo_by_position(everyone, KOLEO_FLOOR) * len(everyone))
            counts.append(len(everyone))
    return torch.stack(losses).sum() / sum(counts)
