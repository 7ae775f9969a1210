"""Table 3 of the MAD paper, lower part: do clusters found without labels agree with the tissue classes?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.bootstrap import patient_intervals
from mad.evaluation.by_patient import matrices_by_patient
from mad.evaluation.data import Embedded, NotApplicableError, plain, spread
from mad.metrics.davies_bouldin import davies_bouldin
from mad.metrics.kmeans import kmeans
from mad.metrics.mutual_information import adjusted_mutual_information

RULES = {
    "tiles": "labelled test tiles of every magnification, pooled (`global`); `by_magnification` clusters each alone",
    "kmeans": "k = number of classes, greedy k-means++, all tiles, embeddings as they are; a run keeps its start of least inertia",
    "ami": "adjusted mutual information of clusters and classes, arithmetic averaging",
    "dbi": "Davies-Bouldin index of the clusters; `dbi_classes` is that of the true classes",
    "unit": "the same on L2-normalised embeddings, one run",
    "interval": "of AMI: test patients are resampled, the clusters stay. DBI has none: its centroids and all distances to them "
    "change with every resample; its spread over the runs stands beside it",
}


def evaluate_clustering(
    data: Embedded, config: EvaluationConfig, *, seed: int, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """AMI, with patient intervals, and DBI of K-Means on the test tiles.

    Raises:
        NotApplicableError: fewer labelled test tiles than clusters.
    """
    test = data.rows("test")
    k = len(data.classes)
    if len(test) < max(k, 2):
        raise NotApplicableError(f"{len(test)} labelled test tiles for {k} clusters")
    seeds = [seed + run for run in range(config.runs)]
    features = data.features[test]

    def cluster(vectors: NDArray, rows: NDArray[np.int64], runs: list[int]) -> dict[str, Any]:
        return cluster_scores(
            vectors, data.codes[rows], k, data.patients[rows], config, seeds=runs, resample_seed=seed, device=device
        )

    by_magnification = {}
    for magnification in np.unique(data.tiles["magnification"].to_numpy(float)[test]):
        rows = data.rows("test", magnification)
        if len(rows) >= k:
            by_magnification[f"{magnification:g}x"] = cluster(data.features[rows], rows, seeds[:1])
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(norms > 0, norms, 1)
    return {
        "rules": RULES,
        "classes": data.classes,
        "k": k,
        "starts": config.kmeans_starts,
        "seeds": seeds,
        "counts": {"test": data.counts(test)},
        "n": {"tiles": len(test)},
        "patients": {"test": data.num_patients(test)},
        "global": cluster(features, test, seeds),
        "dbi_classes": plain(davies_bouldin(features, data.codes[test], device=device)),
        "by_magnification": by_magnification,
        "unit": cluster(unit, test, seeds[:1]),
    }


def cluster_scores(
    features: NDArray,
    codes: NDArray[np.int64],
    k: int,
    patients: NDArray,
    config: EvaluationConfig,
    *,
    seeds: list[int],
    resample_seed: int,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """AMI, DBI and inertia over K-Means runs, the spread of inertia over all starts (relative to the best), and intervals of AMI.

    Args:
        features: [n, d].
        codes: class codes [n].
        k: clusters, and number of classes.
        patients: whose each tile is [n].
        config: for the starts and the bootstrap.
        seeds: of the runs.
        resample_seed: of the bootstrap.
        device: of the distances, K-Means' and DBI's.
    """
    found = [kmeans(features, k, starts=config.kmeans_starts, seed=seed, device=device) for seed in seeds]
    names, patient = np.unique(patients, return_inverse=True)
    tables = matrices_by_patient(patient, len(names), codes, np.stack([c.labels for c in found]), k)  # [P, runs, C, k]

    def statistic(weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        drawn = np.tensordot(weights, tables, axes=1)
        return {"ami": np.mean([adjusted_mutual_information(drawn[:, run]) for run in range(len(found))], axis=0)}

    best = min(clusters.inertia for clusters in found)
    every = np.concatenate([clusters.inertias for clusters in found])
    return {
        "ami": spread(adjusted_mutual_information(tables.sum(0))),
        "dbi": spread([davies_bouldin(features, c.labels, device=device) for c in found]),
        "inertia": spread([clusters.inertia for clusters in found]),
        "worst_start": float(every.max() / best - 1) if best > 0 else 0.0,
        "bootstrap": patient_intervals(
            statistic,
            len(names),
            resamples=config.bootstrap_resamples,
            min_patients=config.min_patients,
            seed=resample_seed,
        ),
    }
