"""Davies-Bouldin index (Davies & Bouldin 1979), two passes in float64 over chunks of rows; lower is better."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mad.metrics.rows import chunks, refuse_not_finite


def davies_bouldin(features: NDArray, labels: NDArray, chunk: int = 512) -> float:
    """Mean over clusters of the worst (s_i + s_j) / d_ij: s = mean distance to the centroid, d = distance of centroids.

    Equals scikit-learn's `davies_bouldin_score`, without its copies.

    Args:
        features: [n, d].
        labels: [n], any integers; of clusters or of classes, as the caller states.
        chunk: rows held in float64 at once; few, so that they stay in the cache.

    Returns:
        The index, or NaN with fewer than two labels. Centroids that coincide do not count as neighbours (as scikit-learn).

    Raises:
        ValueError: a row is not finite.
    """
    names, codes = np.unique(np.asarray(labels), return_inverse=True)
    if len(names) < 2:
        return float("nan")
    codes_t = torch.from_numpy(codes.astype(np.int64))
    counts = torch.bincount(codes_t, minlength=len(names)).double()
    centroids = torch.zeros(len(names), features.shape[1], dtype=torch.float64)
    for rows in chunks(len(codes), chunk):
        centroids.index_add_(0, codes_t[rows], _double(features[rows]))
    if not torch.isfinite(centroids).all():
        refuse_not_finite(features)
    centroids /= counts[:, None]
    scatter = torch.zeros(len(names), dtype=torch.float64)
    for rows in chunks(len(codes), chunk):
        offsets = _double(features[rows]).sub_(centroids[codes_t[rows]])
        scatter.index_add_(0, codes_t[rows], offsets.norm(dim=1))
    scatter /= counts
    distances = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    if torch.allclose(scatter, torch.zeros((), dtype=torch.float64)) or torch.allclose(
        distances, torch.zeros((), dtype=torch.float64)
    ):
        return 0.0
    distances[distances == 0] = torch.inf
    return float(((scatter[:, None] + scatter[None, :]) / distances).max(dim=1).values.mean())


def _double(rows: NDArray) -> torch.Tensor:
    """A copy in float64."""
    return torch.from_numpy(np.array(rows, np.float64))
