"""Mean cosine similarities over ALL parent-child pairs, exactly and without sampling (MAD paper, Table 4).

For unit vectors the sum over all pairs is one inner product of sums, sum_ij p_i . c_j = (sum_i p_i) . (sum_j c_j). Sums per
group (here: slide and class) in float64 therefore give every mean of Table 4 in O(n d), and keep apart the negatives of the
same slide, of the same patient and of other patients. Aligned pairs are subtracted from their group: the negatives are left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mad.metrics.rows import refuse_not_finite

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PairSums:
    """Sums and numbers of cosines by (group of the parent, group of the child), all [G, G]."""

    aligned_sum: Floats
    aligned_count: NDArray[np.int64]
    other_sum: Floats
    """Over the pairs that are not aligned."""
    other_count: NDArray[np.int64]


def pair_sums(
    parents: NDArray,
    children: NDArray,
    parent_of: NDArray,
    parent_group: NDArray,
    child_group: NDArray,
    num_groups: int,
    *,
    parent_centre: NDArray | None = None,
    child_centre: NDArray | None = None,
    chunk: int = 1024,
) -> PairSums:
    """Sum the cosine of every parent with every child.

    Args:
        parents: embeddings [p, d].
        children: embeddings [c, d].
        parent_of: row of `parents` that child j is aligned with [c].
        parent_group: [p] and
        child_group: [c], codes 0 … num_groups - 1.
        num_groups: G.
        parent_centre: [d], subtracted from the parents before they are normalised.
        child_centre: [d], likewise for the children.
        chunk: rows held in float64 at once.

    Raises:
        ValueError: a row is not finite.
    """
    parent_of = np.asarray(parent_of, np.int64)
    parent_total = group_sums(parents, parent_group, num_groups, centre=parent_centre, chunk=chunk)
    child_total = group_sums(children, child_group, num_groups, centre=child_centre, chunk=chunk)
    aligned = aligned_cosines(
        parents, children, parent_of, parent_centre=parent_centre, child_centre=child_centre, chunk=chunk
    )
    cell = np.asarray(parent_group, np.int64)[parent_of] * num_groups + np.asarray(child_group, np.int64)
    shape = (num_groups, num_groups)
    aligned_sum = np.bincount(cell, weights=aligned, minlength=num_groups**2).astype(np.float64).reshape(shape)
    aligned_count = np.bincount(cell, minlength=num_groups**2).reshape(shape)
    parent_num = np.bincount(np.asarray(parent_group, np.int64), minlength=num_groups)
    child_num = np.bincount(np.asarray(child_group, np.int64), minlength=num_groups)
    return PairSums(
        aligned_sum=aligned_sum,
        aligned_count=aligned_count,
        other_sum=parent_total @ child_total.T - aligned_sum,
        other_count=np.outer(parent_num, child_num) - aligned_count,
    )


def group_sums(
    features: NDArray, group: NDArray, num_groups: int, *, centre: NDArray | None = None, chunk: int = 1024
) -> Floats:
    """Sum of the unit vectors of each group [G, d], in float64.

    Raises:
        ValueError: a row is not finite.
    """
    codes = torch.from_numpy(np.asarray(group, np.int64))
    total = torch.zeros(num_groups, features.shape[1], dtype=torch.float64)
    for start in range(0, len(codes), chunk):
        rows = slice(start, start + chunk)
        total.index_add_(0, codes[rows], torch.from_numpy(unit(features[rows], centre)))
    if not torch.isfinite(total).all():
        refuse_not_finite(features)
    return total.numpy()


def aligned_cosines(
    parents: NDArray,
    children: NDArray,
    parent_of: NDArray,
    *,
    parent_centre: NDArray | None = None,
    child_centre: NDArray | None = None,
    chunk: int = 1024,
) -> Floats:
    """Cosine of every child with its own parent [c], in float64."""
    cosines = np.empty(len(parent_of))
    for start in range(0, len(parent_of), chunk):
        rows = slice(start, start + chunk)
        cosines[rows] = np.einsum(
            "nd,nd->n", unit(parents[parent_of[rows]], parent_centre), unit(children[rows], child_centre)
        )
    return cosines


def unit(features: NDArray, centre: NDArray | None = None) -> Floats:
    """Rows scaled to norm 1 in float64, after `centre` is subtracted; a row of zeros stays zero (cosine 0 with everything)."""
    rows = np.array(features, np.float64)
    if centre is not None:
        rows -= centre
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(norm > 0, norm, 1.0)
    return rows
