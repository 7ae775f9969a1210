"""Mean and covariance of a set of rows, in float64, over chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mad.metrics.rows import chunks, refuse_not_finite

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean [d] and covariance [d, d] (divided by n) of a set of embeddings."""

    mean: Floats
    covariance: Floats


def moments(features: NDArray, chunk: int = 2048) -> Moments:
    """Mean and covariance of features [n, d], n >= 1; the two-pass form, which large means do not spoil.

    Raises:
        ValueError: a row is not finite.
    """
    mean = np.zeros(features.shape[1])
    for part in chunks(len(features), chunk):
        mean += np.asarray(features[part]).sum(0, dtype=np.float64)
    if not np.isfinite(mean).all():
        refuse_not_finite(features)
    mean /= len(features)
    covariance = np.zeros((features.shape[1],) * 2)
    for part in chunks(len(features), chunk):
        rows = np.array(features[part], np.float64)
        rows -= mean
        covariance += rows.T @ rows
    return Moments(mean=mean, covariance=covariance / len(features))
