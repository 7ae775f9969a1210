"""RankMe: the effective rank of a set of embeddings (Garrido et al. 2023, arXiv 2210.02885, eq. 1-2)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from mad.metrics.rows import refuse_not_finite

SMALLEST = 1e-9
"""Share of the largest eigenvalue of a Gram matrix: of smaller ones float64 leaves too few digits."""


def rankme(embeddings: npt.ArrayLike, *, epsilon: float = 1e-7) -> float:
    """Exponential of the entropy of the normalised singular values of `embeddings` [N, D], which are not centred.

        p_k = sigma_k / sum_j sigma_j + epsilon        RankMe = exp(-sum_k p_k log p_k)

    Between 1 (all rows parallel) and min(N, D). Computed in float64, to 1e-7 of the value or better.

    Raises:
        ValueError: not a matrix, empty, or not finite.
    """
    matrix = np.asarray(embeddings, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"rankme needs a matrix [N, D] with N, D >= 1, not one of shape {matrix.shape}")
    refuse_not_finite(matrix)
    sigma = _singular_values(matrix)
    p = sigma / max(sigma.sum(), np.finfo(np.float64).tiny) + epsilon
    return float(np.exp(-(p * np.log(p)).sum()))


def _singular_values(matrix: NDArray[np.float64]) -> NDArray:
    """From the eigenvalues of the smaller Gram matrix, a third of the time, where their rounding cannot be seen; else by SVD."""
    wide = matrix.shape[0] < matrix.shape[1]
    values = np.linalg.eigvalsh(matrix @ matrix.T if wide else matrix.T @ matrix)  # ascending
    if values[0] > SMALLEST * values[-1]:
        return np.sqrt(values)
    return np.linalg.svd(matrix, compute_uv=False)
