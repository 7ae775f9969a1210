"""Scores of a class map against the true one: pixel-level confusion from tiles, boundary F-score, fragments.

A map is an integer raster [rows, columns] with one cell per tile; -1 is outside of what is scored.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label
from scipy.spatial import cKDTree

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def cell_numbers(starts: NDArray, side: float) -> Ints:
    """Number of each tile's cell along one axis [n], the first being 0, from where tiles start, in pixels.

    Tiles start at rounded pixels, `side` being rounded too: cells are counted from one start to the next, so that the error of
    rounding does not add up over a slide.
    """
    known, place = np.unique(np.asarray(starts, np.float64), return_inverse=True)
    steps = np.rint(np.diff(known) / side).astype(np.int64)
    return np.concatenate([[0], np.cumsum(steps)])[place]  # type: ignore[no-any-return]


def pixel_confusion(shares: NDArray, predicted: NDArray, num_classes: int) -> Floats:
    """Confusion in units of a tile's area when every pixel of a tile gets the tile's prediction.

    A tile that is 70 % gray and 20 % white matter adds 0.7 and 0.2 to the column of its prediction, so that tiles on a border
    cost what they are wrong by, and unannotated pixels nothing.

    Args:
        shares: of a tile's area that each class covers [n, C].
        predicted: class codes [n].
        num_classes: C.

    Returns:
        Areas [C, C], rows are the truth.
    """
    shares, predicted = np.asarray(shares, np.float64), np.asarray(predicted, np.int64)
    return shares.T @ np.eye(num_classes)[predicted]


def boundary_f(truth: Ints, predicted: Ints, tolerance: float = 1.0) -> float:
    """F-score of the predicted boundaries (Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?").

    A boundary is a cell edge between two scored cells of different classes. Precision is the share of predicted edges with a
    true one within `tolerance` cells (midpoint to midpoint), recall the share of true edges with a predicted one;
    F = 2 P R / (P + R).

    Returns:
        F, 1 where neither map has a boundary, 0 where one alone has.
    """
    scored = (truth >= 0) & (predicted >= 0)
    true_edges, guessed = (_edges(np.where(scored, raster, -1)) for raster in (truth, predicted))
    if not len(true_edges) or not len(guessed):
        return float(len(true_edges) == len(guessed))
    precision = (cKDTree(true_edges).query(guessed)[0] <= tolerance).mean()
    recall = (cKDTree(guessed).query(true_edges)[0] <= tolerance).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _edges(raster: Ints) -> Floats:
    """Midpoints [e, 2] of the edges between neighbouring cells of two classes, neither of them -1."""
    found = []
    for axis in (0, 1):
        before, after = (
            np.take(raster, range(raster.shape[axis] - 1), axis),
            np.take(raster, range(1, raster.shape[axis]), axis),
        )
        places = np.argwhere((before != after) & (before >= 0) & (after >= 0)).astype(np.float64)
        places[:, axis] += 0.5
        found.append(places)
    return np.concatenate(found)


def fragments(raster: Ints) -> int:
    """Number of connected regions of one class (4 neighbours); cells of -1 belong to none."""
    return sum(int(label(raster == code)[1]) for code in np.unique(raster[raster >= 0]))
