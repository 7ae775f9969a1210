"""One step's loss from student, teacher and a batch: the only place where a method's views meet its losses.

`present` says for each kind of sample what the student sees and which of it answers to which view of the teacher:

    kind          student sees                         terms                                      masked
    multicrop     global and local crops               each crop against every other global crop  global crops
    pair          children                             each child against both parent views       nothing
    global_pair   children and the parent's views      pair's, and each parent view against the   parent views
                                                       other one

With `targets: cell` a child answers to its own part of both parent views, not to the whole of them.
`step_loss` is then the same for all of them: targets from the teacher, DINO's cross-entropy on the terms, iBOT's on the masked
patches, and a regulariser that spreads the student's full-size views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mad.config.training import RunConfig
from mad.training import ranks
from mad.training.batch import Batch, Group
from mad.training.ssl import (
    by_position,
    cell_terms,
    centred_softmax,
    dino_cross_entropy,
    global_cell_terms,
    global_pair_terms,
    kde,
    koleo,
    multicrop_terms,
    pair_terms,
    patch_cross_entropy,
    sinkhorn_knopp,
    update_centre,
)
from mad.training.views import normalise

KOLEO_FLOOR = 0.01  # two tiles of bare glass coincide: with a smaller floor their repulsion drowns every other gradient
PARENT_VIEWS = 2
CENTRES = ("centre", "patch_centre")  # buffers of a network, in the order of its scores: images, then masked patches


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
    """`total` is minimised; `dino`, `ibot` (mean cross-entropies) and `spread` are its parts, unweighted."""

    total: Tensor
    dino: Tensor
    ibot: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Presented:
    """What a group of B samples shows: S full-size views [B, S, P, P, 3] and L local ones to the student.

    `terms` [S + L, T]: weights of the cross-entropies with the teacher's T targets per sample: one per view that it sees, or of
    a pair with `cells` one per child and view, in a "global_pair" behind those of the whole views. The last `shared` of the S views
    are the teacher's own; `masks` [B, S, N] hides patches in these alone.
    """

    full_size: Tensor
    terms: Tensor
    shared: int
    masks: Tensor | None


def present(group: Group, parent_weight: float = 1.0) -> Presented:
    """The table above; `parent_weight`: of a term between two of the parent's views."""
    (count, teacher_views), local_views = group.teacher.shape[:2], group.local.shape[1]
    if group.student is None:
        return Presented(group.teacher, multicrop_terms(teacher_views, local_views), teacher_views, group.masks)
    children = group.student.shape[1]
    if group.kind != "global_pair":
        masks = None if group.masks is None else group.masks.new_zeros(count, children, group.masks.shape[-1])
        pairwise = pair_terms if group.cells is None else cell_terms
        return Presented(group.student, pairwise(children, teacher_views), 0, masks)
    masks = None if group.masks is None else F.pad(group.masks, (0, 0, children, 0))
    views = torch.cat([group.student, group.teacher], dim=1)
    joint = global_pair_terms if group.cells is None else global_cell_terms
    return Presented(views, joint(children, teacher_views, parent_weight), teacher_views, masks)


def num_views(batch: Batch) -> int:
    """Images that pass through a network in a step: the teacher's and the student's."""
    return sum(
        view.shape[0] * view.shape[1]
        for group in batch.groups
        for view in (group.teacher, present(group).full_size, group.local)
    )


@dataclass(frozen=True)
class Targets:
    """What the student's scores of one pass are compared with.

    `probabilities` are the teacher's: [N, K] of its views and, where patches are masked, [M, K] of those patches. `counts`: how
    many samples (DINO) and images (iBOT) all processes average over, per pass: the sum over the step's passes, shared by them.
    """

    probabilities: list[Tensor]
    counts: Tensor


def teach(
    student: nn.Module,
    teacher: nn.Module,
    batches: list[Batch],
    run: RunConfig,
    numerics: Numerics,
    teacher_temp: float,
) -> list[Targets]:
    """The targets of the batches that one step accumulates, balanced over all of them: as many passes, the same targets.

    Under `centring: ema` the student's buffers move on to the centres that the next step will use.
    """
    taught = [_ask(teacher, batch, numerics)[0] for batch in batches]
    return _balance(student, teacher, batches, taught, run, teacher_temp)


def step_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    run: RunConfig,
    numerics: Numerics,
    teacher_temp: float,
    targets: Targets | None = None,
) -> StepLoss:
    """The loss of one process's share of a batch; its gradient, averaged over processes, is that of the global batch.

    Without `targets` this batch is the whole step, and they are those of `teach`.
    """
    groups, shown = batch.groups, [present(group, run.parent_weight) for group in batch.groups]
    context: list[Tensor] = []
    if targets is None:
        taught, context = _ask(teacher, batch, numerics)
        (targets,) = _balance(student, teacher, [batch], [taught], run, teacher_temp)
    large = [
        context[place] if context and part.full_size is group.teacher else numerics.images(part.full_size)
        for place, (group, part) in enumerate(zip(groups, shown, strict=True))
    ]
    small = [numerics.images(group.local) for group in groups if group.local.numel()]
    images = [_joined(large), _joined(small)] if small else [_joined(large)]
    masks = _flat([part.masks for part in shown])
    with numerics.autocast():
        embeddings, scores = student(images, masks)

    per_sample, at_target, at_large, at_small = [], 0, 0, 0
    by_kind: dict[str, Tensor] = {}
    for group, part in zip(groups, shown, strict=True):
        count, num_targets = len(group.teacher), part.terms.shape[1]
        student_views, local_views = part.full_size.shape[1], group.local.shape[1]
        rows = slice(at_target, at_target := at_target + count * num_targets)
        q = targets.probabilities[0][rows].unflatten(0, (count, num_targets))
        rows = slice(at_large, at_large := at_large + count * student_views)
        p = scores[0][rows].unflatten(0, (count, student_views))
        by_kind[group.kind] = embeddings[0][rows].unflatten(0, (count, student_views))
        if local_views:
            local = scores[1][at_small : (at_small := at_small + count * local_views)]
            p = torch.cat([p, local.unflatten(0, (count, local_views))], dim=1)
        per_sample.append(dino_cross_entropy(p, q, part.terms.to(p.device), run.student_temp))
    dino = _global_mean(torch.cat(per_sample), targets.counts[0])
    ibot = torch.zeros_like(dino)
    if masks is not None:
        per_image = patch_cross_entropy(scores[-1], targets.probabilities[1], masks, run.student_temp)
        ibot = _global_mean(per_image, targets.counts[1])
    spread = _spread(by_kind, embeddings[0], run) if run.koleo else torch.zeros_like(dino)
    total = dino + run.koleo * spread
    return StepLoss(total + run.ibot.weight * ibot if masks is not None else total, dino, ibot, spread)


def _joined(parts: list[Tensor]) -> Tensor:
    """The rows of `parts` one after the other; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flat(masks: list[Tensor | None]) -> Tensor | None:
    """The masks [B, V, N] of all groups as one [images, N]; None where nothing is ever masked."""
    known = [mask.flatten(0, 1) for mask in masks if mask is not None]
    return torch.cat(known) if known else None


@torch.no_grad()
def _ask(teacher: nn.Module, batch: Batch, numerics: Numerics) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's scores of a batch, of views or cells and then of masked patches, and the images of each group that it saw."""
    context = [numerics.images(group.teacher) for group in batch.groups]
    starts = [0, *accumulate(map(len, context))]
    cells = [
        (start, group.cells) for start, group in zip(starts, batch.groups, strict=False) if group.cells is not None
    ]
    asked = [(start, weights.to(numerics.device).flatten(0, 1)) for start, weights in cells]
    with numerics.autocast():
        masks = _flat([group.masks for group in batch.groups])
        _, scores = teacher([_joined(context)], masks, hide=False, cells=asked[0] if asked else None)
    if asked:
        views, parts, *patches = scores
        scores = [_with_cells(batch.groups, views.split([len(part) for part in context]), parts), *patches]
    return scores, context


def _with_cells(groups: list[Group], views: Sequence[Tensor], parts: Tensor) -> Tensor:
    """Scores of the targets of all groups, sample by sample in the order of `Presented.terms`; `parts` [B * T * S, K] of one."""
    found = []
    for group, scores in zip(groups, views, strict=True):
        if group.cells is not None:
            of_cells = parts.unflatten(0, (len(group.cells), -1))  # [B, T * S, K]
            whole = [scores.unflatten(0, (len(group.cells), -1))] if group.kind == "global_pair" else []
            scores = torch.cat([*whole, of_cells], dim=1).flatten(0, 1)
        found.append(scores)
    return torch.cat(found)


@torch.no_grad()
def _balance(
    student: nn.Module,
    teacher: nn.Module,
    batches: list[Batch],
    taught: list[list[Tensor]],
    run: RunConfig,
    temperature: float,
) -> list[Targets]:
    """Scores of the batches of a step to their targets; moves the student's centres."""
    network = student.module if isinstance(student, nn.parallel.DistributedDataParallel) else student
    counts = _counts(batches, taught[0][0].device)
    targets = [Targets([], counts) for _ in taught]
    for centre, *parts in zip(CENTRES, *taught, strict=False):
        scores = _joined(parts)
        if run.centring == "ema":
            balanced = centred_softmax(scores, getattr(teacher, centre), temperature)
            update_centre(getattr(network, centre), scores, run.centre_momentum)
        else:
            balanced = sinkhorn_knopp(scores, temperature, distributed=ranks.world_size() > 1)
        for own, part in zip(targets, balanced.split([len(part) for part in parts]), strict=True):
            own.probabilities.append(part)
    return targets


def _counts(batches: list[Batch], device: torch.device) -> Tensor:
    """`Targets.counts` of a step of these batches."""
    groups = [group for batch in batches for group in batch.groups]
    samples = sum(len(group.teacher) for group in groups)
    images = sum(group.teacher.shape[0] * group.teacher.shape[1] for group in groups if group.kind != "pair")
    return ranks.all_sum(torch.tensor([float(samples), float(images)], device=device)).clamp_min(1) / len(batches)


def _global_mean(values: Tensor, count: Tensor) -> Tensor:
    """The sum of `values` over the `count` of all processes, times their number: gradients are averaged over processes."""
    return values.sum() * ranks.world_size() / count


def _spread(by_kind: dict[str, Tensor], embeddings: Tensor, run: RunConfig) -> Tensor:
    """The regulariser on every kind of view over all processes, weighted by samples.

    Every process takes part for every kind that its method can hold, with no rows where its share has none of it.
    """
    sizes = {"multicrop": run.views.global_crops}
    sizes |= {"pair": run.children} if run.method == "mad" else {}
    sizes |= {"global_pair": run.children + PARENT_VIEWS} if run.method == "mad_global" else {}
    losses, counts = [], []
    for kind, views in sizes.items():
        rows = by_kind.get(kind, embeddings[:0].reshape(0, views, embeddings.shape[-1]))
        everyone = ranks.gather(rows)
        if len(everyone):
            losses.append(by_position(lambda x: _repulsion(x, run), everyone) * len(everyone))
            counts.append(len(everyone))
    return torch.stack(losses).sum() / sum(counts)


def _repulsion(x: Tensor, run: RunConfig) -> Tensor:
    return kde(x, run.kde_kappa) if run.spread == "kde" else koleo(x, KOLEO_FLOOR)
