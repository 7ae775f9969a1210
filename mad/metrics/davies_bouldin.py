"""Davies-Bouldin index (Davies & Bouldin 1979), two passes in float64 over chunks of rows; lower is better."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mad.metrics.rows import as_double, chunks, refuse_not_finite


def davies_bouldin(
    features: NDArray, labels: NDArray, chunk: int = 512, *, device: str | torch.device = "cpu"
) -> float:
    """Mean over clusters of the worst (s_i + s_j) / d_ij: s = mean distance to the centroid, d = distance of centroids.

    Equals scikit-learn's `davies_bouldin_score`, without its copies.

    Args:
        features: [n, d].
        labels: [n], any integers; of clusters or of classes, as the caller states.
        chunk: rows held in float64 at once; few, so that they stay in the cache.
        device: where sums and distances are computed.

    Returns:
        The index, or NaN with fewer than two labels. Centroids that coincide do not count as neighbours (as scikit-learn).

    Raises:
        ValueError: a row is not finite.
    """
    names, codes, sizes = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    if len(names) < 2:
        return float("nan")
    codes_t = torch.from_numpy(codes.astype(np.int64)).to(device)
    counts = torch.from_numpy(sizes).to(device).double()
    centroids = torch.zeros(len(names), features.shape[1], dtype=torch.float64, device=device)
    for rows in chunks(len(codes), chunk):
        centroids.index_add_(0, codes_t[rows], as_double(features[rows], device))
    if not torch.isfinite(centroids).all():
        refuse_not_finite(features)
    centroids /= counts[:, None]
    scatter = torch.zeros(len(names), dtype=torch.float64, device=device)
    for rows in chunks(len(codes), chunk):
        offsets = as_double(features[rows], device).sub_(centroids[codes_t[rows]])
        scatter.index_add_(0, codes_t[rows], offsets.norm(dim=1))
    scatter /= counts
    distances = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    if torch.allclose(scatter, nothing) or torch.allclose(distances, nothing):
        return 0.0
    distances[distances == 0] = torch.inf
    return float(((scatter[:, None] + scatter[None, :]) / distances).max(dim=1).values.mean())
