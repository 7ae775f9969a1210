"""Table 3 of the MAD paper, lower part: do clusters found without labels agree with the tissue classes?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.data import Embedded, NotApplicableError, plain, spread
from mad.metrics.davies_bouldin import davies_bouldin
from mad.metrics.kmeans import kmeans

RULES = {
    "tiles": "labelled test tiles of every magnification, pooled (`global`); `by_magnification` clusters each alone",
    "kmeans": "k = number of classes, greedy k-means++, all tiles, embeddings as they are; a run keeps its start of least inertia",
    "ami": "adjusted mutual information of clusters and classes, arithmetic averaging",
    "dbi": "Davies-Bouldin index of the clusters; `dbi_classes` is that of the true classes",
    "unit": "the same on L2-normalised embeddings, one run",
}


def evaluate_clustering(
    data: Embedded, config: EvaluationConfig, *, seed: int, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """AMI and DBI of K-Means on the test tiles.

    Raises:
        NotApplicableError: fewer labelled test tiles than clusters.
    """
    test = data.rows("test")
    k = len(data.classes)
    if len(test) < max(k, 2):
        raise NotApplicableError(f"{len(test)} labelled test tiles for {k} clusters")
    seeds = [seed + run for run in range(config.runs)]
    features, codes = data.features[test], data.codes[test]
    by_magnification = {}
    for magnification in np.unique(data.tiles["magnification"].to_numpy(float)[test]):
        rows = data.rows("test", magnification)
        if len(rows) >= k:
            by_magnification[f"{magnification:g}x"] = cluster_scores(
                data.features[rows], data.codes[rows], k, seeds=seeds[:1], starts=config.kmeans_starts, device=device
            )
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(norms > 0, norms, 1)
    return {
        "rules": RULES,
        "classes": data.classes,
        "k": k,
        "starts": config.kmeans_starts,
        "seeds": seeds,
        "counts": {"test": data.counts(test)},
        "global": cluster_scores(features, codes, k, seeds=seeds, starts=config.kmeans_starts, device=device),
        "dbi_classes": plain(davies_bouldin(features, codes)),
        "by_magnification": by_magnification,
        "unit": cluster_scores(unit, codes, k, seeds=seeds[:1], starts=config.kmeans_starts, device=device),
    }


def cluster_scores(
    features: NDArray, codes: NDArray, k: int, *, seeds: list[int], starts: int, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """AMI, DBI and inertia over K-Means runs, and the spread of inertia over all starts (relative to the best)."""
    from sklearn.metrics import adjusted_mutual_info_score

    found = [kmeans(features, k, starts=starts, seed=seed, device=device) for seed in seeds]
    best = min(clusters.inertia for clusters in found)
    every = np.concatenate([clusters.inertias for clusters in found])
    return {
        "ami": spread([adjusted_mutual_info_score(codes, c.labels, average_method="arithmetic") for c in found]),
        "dbi": spread([davies_bouldin(features, c.labels) for c in found]),
        "inertia": spread([clusters.inertia for clusters in found]),
        "worst_start": float(every.max() / best - 1) if best > 0 else 0.0,
    }
