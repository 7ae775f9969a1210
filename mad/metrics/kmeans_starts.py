"""Greedy k-means++ (Arthur & Vassilvitskii 2007; as scikit-learn 2 + log k trials per centre), all starts at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mad.metrics.rows import CentredRows


def plus_plus(data: CentredRows, k: int, starts: int, generator: torch.Generator) -> Tensor:
    """Centres [s, k, d] float64, each drawn with a probability proportional to the squared distance to those before."""
    trials = 2 + int(math.log(k))
    every = torch.arange(starts)
    centres = torch.empty(starts, k, data.dim, dtype=torch.float64)
    first = torch.randint(len(data), (starts,), generator=generator)
    centres[:, 0] = data.take(first).double().cpu()
    nearest = torch.full((len(data), 1, starts), torch.inf)  # squared distance to the closest centre so far
    nearest, _ = _lower(data, nearest, centres[:, 0])
    for place in range(1, k):
        drawn = _draw(nearest[:, 0], trials, generator)  # [trials, s]
        candidates = data.take(drawn.flatten()).double().cpu()
        lowered, potential = _lower(data, nearest, candidates)
        chosen = potential.argmin(0)
        centres[:, place] = candidates.view(trials, starts, -1)[chosen, every]
        nearest = lowered[:, chosen, every][:, None]
    return centres


def _draw(nearest: Tensor, trials: int, generator: torch.Generator) -> Tensor:
    """Row indices [trials, s] with probability proportional to the squared distance [n, s]."""
    cumulative = nearest.double().cumsum(0)
    points = torch.rand(trials, nearest.shape[1], generator=generator, dtype=torch.float64) * cumulative[-1]
    return torch.searchsorted(cumulative.T.contiguous(), points.T.contiguous()).clamp(max=len(nearest) - 1).T


def _lower(data: CentredRows, nearest: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` [n, 1, s] lowered to the distances of one more centre per trial and start [trials s, d]: [n, trials, s], and
    its sum over the rows [trials, s]."""
    starts = nearest.shape[2]
    moved = centres.float().to(data.device)
    lengths = (moved**2).sum(1)
    lowered = torch.empty(len(data), len(moved) // starts, starts)
    potential = torch.zeros(lowered.shape[1:], dtype=torch.float64)
    for rows, block in data:
        distance = torch.addmm(data.squares[rows, None] + lengths, block, moved.T, alpha=-2).clamp_(min=0).cpu()
        torch.minimum(distance.view(-1, *lowered.shape[1:]), nearest[rows], out=lowered[rows])
        potential += lowered[rows].sum(0, dtype=torch.float64)
    return lowered, potential
