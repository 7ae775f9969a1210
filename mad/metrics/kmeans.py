"""K-Means with greedy k-means++ starts, every start advanced at once, on all points (MAD paper, Table 3: k = 5).

Library defaults subsample or start once; the local optimum found then says as much about the start as about the embedding.
Here starts share passes over the data (one matrix product for starts x k centres), the one of least inertia is kept, and the
inertia of every start is returned, so that the spread can be reported. After the first iterations few rows change their cluster:
the screen (`mad.metrics.kmeans_screen`) finds out which may, and only these are read again. Distances in float32 on centred
data, sums and the final inertia in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mad.metrics.kmeans_screen import Screen, Start
from mad.metrics.kmeans_starts import plus_plus
from mad.metrics.rows import CentredRows

STALE = 0.04
"""Share of a start's rows in doubt from which on comparing all of them anew is cheaper."""

TIGHT = 1e-2
"""Share of the variance that is left within the clusters, under which it is summed row by row."""


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
    chunk: int = 4096,
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
        ValueError: fewer rows than clusters, or a row is not finite.
    """
    if len(features) < k:
        raise ValueError(f"{len(features)} rows cannot make {k} clusters")
    data = CentredRows(features, device, chunk)
    limit = tolerance * data.variance
    drawn = plus_plus(data, k, starts, torch.Generator().manual_seed(seed)).to(device)
    every = [Start(centres) for centres in drawn]
    screen = Screen(data)
    active = every
    for _ in range(max_iterations):
        stale = []
        for start in active:
            labels, doubtful = screen.compare(start)
            if len(doubtful) > STALE * len(data):
                stale.append(start)
            else:
                _settle(data, start, labels, doubtful)
        _compare(data, stale, screen)
        active = [start for start in active if _move(data, start) > limit and start.changed]
        if not active:
            break
    _compare(data, every)
    # sum |x - c|^2 = sum |x|^2 - 2 c . sum x + n |c|^2, unless that is the small difference of large numbers.
    total = data.variance * features.size
    within = [start.count @ (start.centres**2).sum(1) - 2 * (start.centres * start.total).sum() for start in every]
    inertias = [total + float(less) for less in within]
    if min(inertias) < TIGHT * total:
        inertias = [_inertia(data, start) for start in every]
    best = every[int(np.argmin(inertias))]
    return Clusters(
        labels=best.labels.long().cpu().numpy(),
        centres=(best.centres.cpu() + data.mean).numpy(),
        inertia=_inertia(data, best),
        inertias=np.array(inertias),
    )


def _inertia(data: CentredRows, start: Start) -> float:
    """Sum of squared distances of the rows to the centres of their clusters, one by one."""
    labels = start.labels.long()
    return sum(float(((block.double() - start.centres[labels[rows]]) ** 2).sum()) for rows, block in data)


def _compare(data: CentredRows, starts: list[Start], screen: Screen | None = None) -> None:
    """Give every row the nearest centre of each start, comparing all of them in all dimensions."""
    if not starts:
        return
    centres = torch.stack([start.centres for start in starts])
    num, k, dim = centres.shape
    flat, lengths = centres.flatten(0, 1).float(), (centres**2).sum(2).float()
    labels = torch.empty(num, len(data), dtype=torch.int16, device=data.device)
    total = torch.zeros(num * k, dim, dtype=torch.float64, device=data.device)
    count = torch.zeros(num * k, dtype=torch.float64, device=data.device)
    for rows, block in data:
        products = (block @ flat.T).view(-1, num, k)
        nearest = torch.add(lengths, products, alpha=-2).min(2).indices  # [m, s]
        member = torch.nn.functional.one_hot(nearest, k).to(block.dtype).flatten(1)  # [m, s k]
        total += member.T @ block
        count += member.sum(0)
        labels[:, rows] = nearest.T.to(torch.int16)
        if screen is not None:
            for place, start in enumerate(starts):
                screen.hold(start, rows, products[:, place])
    for start, found, sums, number in zip(starts, labels, total.view(num, k, dim), count.view(num, k), strict=True):
        start.changed = not torch.equal(start.labels, found)
        start.labels, start.total, start.count = found, sums, number


def _settle(data: CentredRows, start: Start, labels: Tensor, doubtful: Tensor) -> None:
    """Give rows [n] the labels of the screen, those in doubt [m] their nearest centre; move changed rows from sum to sum."""
    centres = start.centres.float()
    for part in doubtful.split(data.size):
        products = data.take(part) @ centres.T
        labels[part] = torch.add((start.centres**2).sum(1).float(), products, alpha=-2).argmin(1).to(torch.int16)
    moved = (labels != start.labels).nonzero()[:, 0]
    for part in moved.split(data.size):
        rows, ones = data.take(part).double(), torch.ones(len(part), dtype=torch.float64, device=data.device)
        for sign, code in ((1, labels[part].long()), (-1, start.labels[part].long())):
            start.total.index_add_(0, code, rows, alpha=sign)
            start.count.index_add_(0, code, ones, alpha=sign)
    start.labels, start.changed = labels, len(moved) > 0


def _move(data: CentredRows, start: Start) -> float:
    """Move a start's centres to the means of their clusters, that of an empty one to the farthest row; squared movement."""
    centres = start.total / start.count.clamp(min=1)[:, None]
    empty = (start.count == 0).nonzero()[:, 0]
    if len(empty):
        labels = start.labels.long()
        distance = torch.cat([((block - start.centres[labels[rows]]) ** 2).sum(1) for rows, block in data])
        centres[empty] = data.take(distance.topk(len(empty)).indices).double()
    shift = float(((centres - start.centres) ** 2).sum())
    start.centres = centres
    return shift
