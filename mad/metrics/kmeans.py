"""K-Means with greedy k-means++ starts, every start advanced at once, on all points (MAD paper, Table 3: k = 5).

Library defaults subsample or start once; the local optimum found then says as much about the start as about the embedding.
Here all starts share each pass over the data (one matrix product for starts x k centres), the one of least inertia is kept,
and the inertia of every start is returned, so that the spread can be reported. Distances in float32 on centred data, sums
and the final inertia in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """The best of several starts."""

    labels: NDArray[np.int64]
    """[n]"""
    centres: NDArray[np.float64]
    """[k, d]"""
    inertia: float
    """Sum of squared distances of the rows to their centres."""
    inertias: NDArray[np.float64]
    """Inertia of every start [s]."""


def kmeans(
    features: NDArray,
    k: int,
    *,
    starts: int = 20,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
    seed: int = 0,
    device: str | torch.device = "cpu",
    chunk: int = 16384,
) -> Clusters:
    """Cluster features [n, d] into k clusters.

    Args:
        features: [n, d] float, n >= k.
        k: number of clusters.
        starts: k-means++ starts, of which the one of least inertia is kept.
        max_iterations: Lloyd iterations at most.
        tolerance: a start has converged when its centres move by less than this share of the mean variance per dimension
            (squared movement summed over centres, as scikit-learn), or when no row changes its cluster.
        seed: of the starts.
        device: where distances are computed.
        chunk: rows on the device at once.

    Raises:
        ValueError: fewer rows than clusters.
    """
    if len(features) < k:
        raise ValueError(f"{len(features)} rows cannot make {k} clusters")
    data = _Chunks(features, device, chunk)
    limit = tolerance * data.variance
    generator = torch.Generator().manual_seed(seed)
    centres = _plus_plus(data, k, starts, generator)  # [s, k, d] float64
    active = torch.arange(starts)
    previous: Tensor | None = None
    for _ in range(max_iterations):
        if not len(active):
            break
        labels, total, count, far = _assign(data, centres[active])
        moved_to = total / count.clamp(min=1)[..., None]
        for start, cluster in (count == 0).nonzero().tolist():  # an emptied cluster restarts at the farthest row
            moved_to[start, cluster] = data.row(int(far[start, cluster]))
        shift = ((moved_to - centres[active]) ** 2).sum((1, 2))
        centres[active] = moved_to
        same = (labels == previous).all(0) if previous is not None else torch.zeros(len(active), dtype=torch.bool)
        going = ~((shift <= limit) | same)
        active, previous = active[going], labels[:, going]
    labels, total, count, _ = _assign(data, centres)
    # sum |x - c|^2 = sum |x|^2 - 2 c . sum x + n |c|^2 for every start at once, then exactly for the best.
    within = (count * (centres**2).sum(2) - 2 * (centres * total).sum(2)).sum(1)
    inertias = (data.variance * features.size + within).clamp(min=0)
    best = int(inertias.argmin())
    inertia = _inertia(data, centres[best], labels[:, best].long())
    return Clusters(
        labels=labels[:, best].long().numpy(),
        centres=(centres[best] + data.mean).numpy(),
        inertia=inertia,
        inertias=inertias.numpy(),
    )


class _Chunks:
    """Rows in chunks, centred by their mean (float32 distances lose digits far from the origin)."""

    def __init__(self, features: NDArray, device: str | torch.device, size: int):
        self.features, self.device, self.size = features, device, size
        total, squares = torch.zeros(features.shape[1], dtype=torch.float64), 0.0
        for _, rows in self._raw():
            total += rows.double().sum(0)
        self.mean = total / len(features)
        for _, rows in self._raw():
            squares += float(((rows.double() - self.mean) ** 2).sum())
        self.variance = squares / features.size

    def __len__(self) -> int:
        return len(self.features)

    def _raw(self):
        for start in range(0, len(self.features), self.size):
            block = np.asarray(self.features[start : start + self.size], np.float32)
            yield slice(start, start + len(block)), torch.from_numpy(np.ascontiguousarray(block))

    def __iter__(self):
        """(slice, rows [m, d] float32 on the device), centred."""
        shift = self.mean.float().to(self.device)
        for rows, block in self._raw():
            yield rows, block.to(self.device) - shift

    def row(self, index: int) -> Tensor:
        return torch.from_numpy(np.asarray(self.features[index], np.float64)) - self.mean


def _squared(rows: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [m, c] of rows [m, d] to centres [c, d]."""
    norms = (rows**2).sum(1, keepdim=True) + (centres**2).sum(1)
    return torch.addmm(norms, rows, centres.T, alpha=-2).clamp_(min=0)


def _plus_plus(data: _Chunks, k: int, starts: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007; scikit-learn's 2 + log k trials per centre), all starts at once."""
    trials = 2 + int(math.log(k))
    num_rows = len(data)
    centres = torch.empty(starts, k, data.features.shape[1], dtype=torch.float64)
    first = torch.randint(num_rows, (starts,), generator=generator)
    centres[:, 0] = torch.stack([data.row(int(index)) for index in first])
    nearest = torch.full((num_rows, starts), torch.inf)  # squared distance to the closest centre so far
    _lower(data, nearest, centres[:, 0])
    for place in range(1, k):
        drawn = _draw(nearest, trials, generator)  # [trials, s]
        candidates = torch.stack([data.row(int(index)) for index in drawn.flatten()]).view(trials, starts, -1)
        potential = torch.zeros(trials, starts, dtype=torch.float64)
        for rows, block in data:
            distance = _squared(block, candidates.flatten(0, 1).float().to(data.device)).cpu()
            potential += distance.view(-1, trials, starts).minimum(nearest[rows, None]).double().sum(0)
        chosen = potential.argmin(0)
        centres[:, place] = candidates[chosen, torch.arange(starts)]
        _lower(data, nearest, centres[:, place])
    return centres


def _draw(nearest: Tensor, trials: int, generator: torch.Generator) -> Tensor:
    """Row indices [trials, s] with probability proportional to the squared distance [n, s]."""
    cumulative = nearest.double().cumsum(0)
    points = torch.rand(trials, nearest.shape[1], generator=generator, dtype=torch.float64) * cumulative[-1]
    return torch.searchsorted(cumulative.T.contiguous(), points.T.contiguous()).clamp(max=len(nearest) - 1).T


def _lower(data: _Chunks, nearest: Tensor, centres: Tensor) -> None:
    """Lower `nearest` [n, s] to the distance of each start's new centre [s, d]."""
    moved = centres.float().to(data.device)
    for rows, block in data:
        nearest[rows] = nearest[rows].minimum(_squared(block, moved).cpu())


def _assign(data: _Chunks, centres: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels [n, s] (int16), sums [s, k, d] and counts [s, k] of the clusters, and each start's k farthest rows [s, k]."""
    starts, k, dim = centres.shape
    flat = centres.flatten(0, 1).float().to(data.device)
    labels = torch.empty(len(data), starts, dtype=torch.int16)
    total = torch.zeros(starts * k, dim, dtype=torch.float64)
    count = torch.zeros(starts * k, dtype=torch.float64)
    far_value, far_row = torch.empty(0, starts), torch.empty(0, starts, dtype=torch.int64)
    for rows, block in data:
        lowest, label = _squared(block, flat).view(len(block), starts, k).min(2)
        member = torch.nn.functional.one_hot(label, k).to(block.dtype).flatten(1)  # [m, s k]
        total += (member.T @ block).double().cpu()
        count += member.sum(0).double().cpu()
        labels[rows] = label.to(torch.int16).cpu()
        value, row = lowest.cpu().topk(min(k, len(block)), dim=0)
        far_value, far_row = torch.cat([far_value, value]), torch.cat([far_row, row + rows.start])
        far_value, order = far_value.sort(dim=0, descending=True, stable=True)
        far_value, far_row = far_value[:k], far_row.gather(0, order[:k])
    return labels, total.view(starts, k, dim), count.view(starts, k), far_row.T


def _inertia(data: _Chunks, centres: Tensor, labels: Tensor) -> float:
    """Inertia of one start by differences."""
    return sum(float(((block.double().cpu() - centres[labels[rows]]) ** 2).sum()) for rows, block in data)
