"""Mean and covariance of a set of rows, in float64, over chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mad.metrics.rows import as_double, chunks, refuse_not_finite

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean [d] and covariance [d, d] (divided by n) of a set of embeddings."""

    mean: Floats
    covariance: Floats


def moments(features: NDArray, chunk: int = 2048, *, device: str | torch.device = "cpu") -> Moments:
    """Mean and covariance of features [n, d], n >= 1; the two-pass form, which large means do not spoil.

    Products are computed on the device, the mean on the CPU, where summing costs little beside reading.

    Raises:
        ValueError: a row is not finite.
    """
    mean = np.zeros(features.shape[1])
    for part in chunks(len(features), chunk):
        mean += np.asarray(features[part]).sum(0, dtype=np.float64)
    if not np.isfinite(mean).all():
        refuse_not_finite(features)
    mean /= len(features)
    centre = torch.from_numpy(mean).to(device)
    covariance = torch.zeros((features.shape[1],) * 2, dtype=torch.float64, device=device)
    for part in chunks(len(features), chunk):
        covariance += _squared(as_double(features[part], device).sub_(centre))
    return Moments(mean=mean, covariance=(covariance / len(features)).cpu().numpy())


def _squared(rows: torch.Tensor) -> torch.Tensor:
    """rows.T @ rows [d, d] of [n, d]; on the CPU by numpy, which sees that it is symmetric and computes half of it."""
    if rows.device.type != "cpu":
        return rows.T @ rows
    array = rows.numpy()
    return torch.from_numpy(array.T @ array)
