"""Mean cosine similarities over ALL parent-child pairs, exactly and without sampling (MAD paper, Table 4).

For unit vectors the sum over all pairs is one inner product of sums, sum_ij p_i . c_j = (sum_i p_i) . (sum_j c_j). Sums per
slide and class in float64 therefore give every mean of Table 4 in O(n d): pairs of one slide or of one patient are those within
a group, pairs of other patients all that are left. Aligned pairs are subtracted: the negatives are left.
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
    """Of G groups of slides and C classes what the sums over all their pairs follow from; an aligned pair is of one slide."""

    parents: Floats
    """Sums of unit vectors [G, C, d], and"""
    children: Floats
    parent_count: NDArray[np.int64]
    """their numbers [G, C], and"""
    child_count: NDArray[np.int64]
    aligned_sum: Floats
    """Cosines of the aligned pairs [G, C, C], by the class of the parent and of the child, and"""
    aligned_count: NDArray[np.int64]
    """their number."""

    def pooled(self, group: NDArray, num_groups: int) -> PairSums:
        """The same of `num_groups` groups of the groups, `group` [G] their codes."""
        return PairSums(**{name: pool(part, group, num_groups) for name, part in vars(self).items()})

    def others(self) -> tuple[Floats, NDArray[np.int64]]:
        """Sum of cosines and number of the pairs within each group that are not aligned [G, C, C]."""
        total = np.matmul(self.parents, self.children.transpose(0, 2, 1)) - self.aligned_sum
        return total, self.parent_count[:, :, None] * self.child_count[:, None, :] - self.aligned_count


def pool(part: NDArray, group: NDArray, num_groups: int) -> NDArray:
    """Sums of the rows of each group, [G, …] -> [num_groups, …]."""
    pooled = np.zeros((num_groups, *part.shape[1:]), part.dtype)
    np.add.at(pooled, group, part)
    return pooled


def pair_sums(
    parents: NDArray,
    children: NDArray,
    parent_of: NDArray,
    slides: tuple[NDArray, NDArray],
    num_slides: int,
    codes: tuple[NDArray, NDArray] | None = None,
    num_classes: int = 1,
    *,
    centres: tuple[NDArray | None, NDArray | None] = (None, None),
    chunk: int = 1024,
) -> PairSums:
    """Sums by slide and class; time and memory grow with tiles and slides, not with their pairs.

    Args:
        parents: embeddings [p, d].
        children: embeddings [c, d].
        parent_of: row of `parents` that child j is aligned with [c].
        slides: of the parents [p] and of the children [c], codes 0 … num_slides - 1.
        num_slides: S.
        codes: classes of the parents and of the children, 0 … num_classes - 1; None: all one class.
        num_classes: C.
        centres: [d], subtracted from the parents and from the children before they are normalised.
        chunk: rows held in float64 at once.

    Raises:
        ValueError: a row is not finite, or a child is of another slide than its parent.
    """
    parent_of = np.asarray(parent_of, np.int64)
    parent_slide, child_slide = (np.asarray(part, np.int64) for part in slides)
    if (strange := parent_slide[parent_of] != child_slide).any():
        raise ValueError(f"child {int(strange.argmax())} is of another slide than its parent")
    parent_code, child_code = codes or (np.zeros_like(parent_slide), np.zeros_like(child_slide))
    groups = parent_slide * num_classes + parent_code, child_slide * num_classes + child_code
    num_groups, shape = num_slides * num_classes, (num_slides, num_classes)
    total = [
        group_sums(rows, group, num_groups, centre=centre, chunk=chunk).reshape(*shape, -1)
        for rows, group, centre in zip((parents, children), groups, centres, strict=True)
    ]
    aligned = aligned_cosines(
        parents, children, parent_of, parent_centre=centres[0], child_centre=centres[1], chunk=chunk
    )
    cell, cells = groups[0][parent_of] * num_classes + child_code, num_groups * num_classes
    return PairSums(
        parents=total[0],
        children=total[1],
        parent_count=np.bincount(groups[0], minlength=num_groups).reshape(shape),
        child_count=np.bincount(groups[1], minlength=num_groups).reshape(shape),
        aligned_sum=np.bincount(cell, aligned, minlength=cells).astype(np.float64).reshape(*shape, -1),
        aligned_count=np.bincount(cell, minlength=cells).reshape(*shape, -1),
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
