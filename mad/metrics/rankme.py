"""RankMe: the effective rank of a set of embeddings (Garrido et al. 2023, arXiv 2210.02885, eq. 1-2)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mad.metrics.rows import refuse_not_finite


def rankme(embeddings: npt.ArrayLike, *, epsilon: float = 1e-7) -> float:
    """Exponential of the entropy of the normalised singular values of `embeddings` [N, D], which are not centred.

        p_k = sigma_k / sum_j sigma_j + epsilon        RankMe = exp(-sum_k p_k log p_k)

    Between 1 (all rows parallel) and min(N, D). Computed in float64.

    Raises:
        ValueError: not a matrix, empty, or not finite.
    """
    matrix = np.asarray(embeddings, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"rankme needs a matrix [N, D] with N, D >= 1, not one of shape {matrix.shape}")
    refuse_not_finite(matrix)
    sigma = np.linalg.svd(matrix, compute_uv=False)
    p = sigma / max(sigma.sum(), np.finfo(np.float64).tiny) + epsilon
    return float(np.exp(-(p * np.log(p)).sum()))
