"""Scores of a tile-level confusion matrix: IoU, Dice (= F1), accuracy.

One matrix is pooled over all tiles of a test set, the scores are macro averages over the classes that occur in the truth.
Per class Dice = 2 IoU / (1 + IoU), a concave function, hence mean Dice <= 2 mean IoU / (1 + mean IoU) for every matrix: a
row of a table that breaks this bound is no average over one matrix.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def confusion_matrix(truth: NDArray, predicted: NDArray, num_classes: int) -> Ints:
    """Count tiles by (true class, predicted class).

    Args:
        truth: class codes [n], 0 … num_classes - 1.
        predicted: class codes [n].
        num_classes: C.

    Returns:
        Counts [C, C], rows are the truth.

    Raises:
        ValueError: the lengths differ or a code lies outside of the classes.
    """
    truth, predicted = np.asarray(truth, np.int64), np.asarray(predicted, np.int64)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise ValueError(f"truth {truth.shape} and predictions {predicted.shape} must be vectors of one length")
    for name, codes in (("truth", truth), ("predictions", predicted)):
        if codes.size and (codes.min() < 0 or codes.max() >= num_classes):
            raise ValueError(f"{name} hold codes {codes.min()} … {codes.max()} of only {num_classes} classes")
    return np.bincount(truth * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(matrix: NDArray) -> Floats:
    """Intersection over union per class [..., C] of matrices [..., C, C]; NaN for a class that the truth lacks."""
    hit, truth, predicted = _margins(matrix)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(truth > 0, hit / (truth + predicted - hit), np.nan)


def class_dice(matrix: NDArray) -> Floats:
    """Dice coefficient, which is the F1 score, per class [..., C]; NaN for a class that the truth lacks."""
    hit, truth, predicted = _margins(matrix)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(truth > 0, 2 * hit / (truth + predicted), np.nan)


def accuracy(matrix: NDArray) -> Floats:
    """Share of tiles on the diagonal [...]; NaN without tiles. Micro-averaged Dice is the same number."""
    hit, truth, _ = _margins(matrix)
    with np.errstate(invalid="ignore", divide="ignore"):
        return hit.sum(-1) / truth.sum(-1)


def macro(values: NDArray) -> Floats:
    """Mean over the last axis without NaN; NaN where nothing is left."""
    values = np.asarray(values, np.float64)
    present = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(present, values, 0.0).sum(-1) / present.sum(-1)


def drop_truth(matrix: NDArray, code: int | None) -> NDArray:
    """The matrices without the tiles whose true class is `code`; predicting that class stays an error."""
    if code is None:
        return np.asarray(matrix)
    kept = np.array(matrix)
    kept[..., code, :] = 0
    return kept


def _margins(matrix: NDArray) -> tuple[Floats, Floats, Floats]:
    matrix = np.asarray(matrix, np.float64)
    return np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(-1), matrix.sum(-2)
