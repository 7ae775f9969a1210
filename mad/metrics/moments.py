"""Mean and covariance of a set of rows, in float64, over chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean [d] and covariance [d, d] (divided by n) of a set of embeddings."""

    mean: Floats
    covariance: Floats


def moments(features: NDArray, chunk: int = 8192) -> Moments:
    """Mean and covariance of features [n, d], n >= 1; the two-pass form, which large means do not spoil."""
    mean = features.mean(0, dtype=np.float64)
    covariance = np.zeros((features.shape[1],) * 2)
    for start in range(0, len(features), chunk):
        rows = np.asarray(features[start : start + chunk], np.float64) - mean
        covariance += rows.T @ rows
    return Moments(mean=mean, covariance=covariance / len(features))
