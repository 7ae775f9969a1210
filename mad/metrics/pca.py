"""Principal components from a float64 covariance, over chunks of rows (MAD paper, Figure 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mad.metrics.moments import Floats, moments


@dataclass(frozen=True, kw_only=True)
class Pca:
    """Principal axes of a set of rows."""

    mean: Floats
    """[d]"""
    components: Floats
    """[m, d], rows of norm 1, largest variance first; the entry of largest magnitude of each is positive."""
    explained: Floats
    """Share of the total variance along each component [m]; zeros where there is no variance."""

    def project(self, features: NDArray, chunk: int = 8192) -> Floats:
        """Coordinates [n, m] of features [n, d]."""
        blocks = [
            (np.asarray(features[start : start + chunk], np.float64) - self.mean) @ self.components.T
            for start in range(0, len(features), chunk)
        ]
        return np.concatenate(blocks) if blocks else np.empty((0, len(self.components)))


def fit_pca(
    features: NDArray, num_components: int = 2, *, chunk: int = 2048, device: str | torch.device = "cpu"
) -> Pca:
    """The leading `num_components` (at most d) principal axes of features [n, d]; the covariance is computed on the device.

    Raises:
        ValueError: fewer than two rows, or one that is not finite.
    """
    num_rows = len(features)
    if num_rows < 2:
        raise ValueError(f"principal components need two rows or more, got {num_rows}")
    found = moments(features, chunk, device=device)
    covariance = found.covariance * (num_rows / (num_rows - 1))
    variance, vectors = np.linalg.eigh(covariance)
    components = vectors[:, ::-1][:, :num_components].T
    peak = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], axis=1)
    total = np.trace(covariance)
    explained = variance[::-1][:num_components].clip(0) / total if total > 0 else np.zeros(len(components))
    return Pca(mean=found.mean, components=components * np.sign(peak), explained=explained)
