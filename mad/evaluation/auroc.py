"""Slide-level scores: AUROC with ties, R2, Spearman's rank correlation, under any weights of the patients.

Like `mad.evaluation.by_patient`: every function gives the numbers [r] of weights [r, P], one row per resample, and weights of
one give the plain number. AUROC is the share of (positive, negative) pairs of slides that the scores order rightly, ties counting
half (Mann and Whitney). Which pairs count is the caller's: scores of two heads are on two scales, so a cross-validation
counts only pairs that one head has scored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mad.evaluation.by_patient import couple, ratio

Floats = NDArray[np.float64]


def pair_tables(
    positive: NDArray[np.bool_],
    scores: NDArray,
    patients: NDArray[np.int64],
    heads: NDArray[np.int64],
    num_patients: int,
) -> Floats:
    """Pairs won and pairs counted, by the positive slide's patient and the negative's.

    Args:
        positive: [n] bool, of each prediction.
        scores: [n], higher for positive.
        patients: [n] codes 0 .. P - 1.
        heads: [n] codes; only predictions of one head are compared.
        num_patients: P.

    Returns:
        [2, P, P]: wins (ties count half) and counts.
    """
    tables = np.zeros((2, num_patients, num_patients))
    for head in np.unique(heads):
        one, other = (np.flatnonzero((heads == head) & side) for side in (positive, ~positive))
        gap = scores[one][:, None] - scores[other][None]
        where = patients[one][:, None], patients[other][None]
        np.add.at(tables[0], where, (gap > 0) + 0.5 * (gap == 0))
        np.add.at(tables[1], where, 1.0)
    return tables


def auroc(tables: Floats, weights: Floats) -> Floats:
    """AUROC [r] of `pair_tables` [2, P, P], or macro AUROC of several of them [C, 2, P, P] (one versus the rest).

    A pair of two patients weighs by both, a pair within a patient by that patient. NaN where any class has no pair.
    """
    each = [
        ratio(couple(weights, won), couple(weights, counted)) for won, counted in tables.reshape(-1, *tables.shape[-3:])
    ]
    return np.mean(each, axis=0)


def r2(truth: Floats, predicted: Floats, patients: NDArray[np.int64], weights: Floats) -> Floats:
    """Share of variance explained [r], 1 - sum (y - p)^2 / sum (y - mean y)^2; NaN where all truths are equal."""
    w = weights[:, patients]
    mean = ratio(w @ truth, w.sum(1))
    total = (w * (truth[None] - mean[:, None]) ** 2).sum(1)
    scale = np.abs(truth).max(initial=0.0) ** 2 * w.sum(1)
    return 1 - ratio(w @ (truth - predicted) ** 2, np.where(total > 1e-12 * scale, total, 0.0))


def spearman(truth: Floats, predicted: Floats, patients: NDArray[np.int64], weights: Floats) -> Floats:
    """Spearman's rank correlation [r], tied values at their mean rank; NaN where either side is constant."""
    w = weights[:, patients]
    ranks = []
    for values in (truth, predicted):
        below = (values[:, None] < values[None]) + 0.5 * (values[:, None] == values[None])
        rank = w @ below
        ranks.append(rank - ratio((w * rank).sum(1), w.sum(1))[:, None])
    covariance = (w * ranks[0] * ranks[1]).sum(1)
    size = np.sqrt((w * ranks[0] ** 2).sum(1) * (w * ranks[1] ** 2).sum(1))
    return ratio(covariance, np.where(size > 1e-9 * w.sum(1), size, 0.0))


def ones(num_patients: int) -> Any:
    """The weights [1, P] that give the plain number."""
    return np.ones((1, num_patients))
