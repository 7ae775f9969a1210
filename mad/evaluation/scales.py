"""Does a mere offset explain the gap between magnifications, and what does a probe of any scale know of any other?

Beyond the MAD paper: `match_moments` and `coral` carry fine embeddings onto the distribution of the coarse ones without a
label, so that Table 5 can be read again after the simplest corrections (CORAL: Sun, Feng & Saenko 2016). `scale_matrix` is
the train-magnification x test-magnification matrix, of which Table 5 shows one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.bootstrap import patient_intervals
from mad.evaluation.by_patient import matrices_by_patient
from mad.evaluation.data import Embedded, plain
from mad.evaluation.probe import Probe, cohort_probe
from mad.metrics.confusion import class_iou, macro
from mad.metrics.moments import Moments

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Affine:
    """x -> (x - source_mean) linear + target_mean."""

    source_mean: Floats
    linear: Floats
    """[d, d], or [d] for one factor per dimension."""
    target_mean: Floats

    def __call__(self, features: NDArray, chunk: int = 8192) -> NDArray[np.float32]:
        """Map features [n, d]."""
        mapped = np.empty(features.shape, np.float32)
        for start in range(0, len(features), chunk):
            rows = np.asarray(features[start : start + chunk], np.float64) - self.source_mean
            mapped[start : start + chunk] = (
                rows * self.linear if self.linear.ndim == 1 else rows @ self.linear
            ) + self.target_mean
        return mapped


def match_moments(source: Moments, target: Moments) -> Affine:
    """Give every dimension the mean and standard deviation of the target; a constant dimension only its mean."""
    spread, wanted = np.sqrt(np.diag(source.covariance)), np.sqrt(np.diag(target.covariance))
    factor = np.where(spread > 1e-6, wanted / np.where(spread > 1e-6, spread, 1), 1.0)
    return Affine(source_mean=source.mean, linear=factor, target_mean=target.mean)


def coral(source: Moments, target: Moments, ridge: float = 1e-2) -> Affine:
    """Whiten by the source, colour by the target: x (C_s + r_s I)^(-1/2) (C_t + r_t I)^(1/2), and the target's mean.

    Args:
        source: of the embeddings to be mapped.
        target: of those that the probe was trained on.
        ridge: r_s and r_t as a share of each side's mean variance (the original adds I, whatever the scale).
    """

    def widened(covariance: Floats) -> Floats:
        return covariance + ridge * max(np.trace(covariance) / len(covariance), 1e-12) * np.eye(len(covariance))

    linear = _power(widened(source.covariance), -0.5) @ _power(widened(target.covariance), 0.5)
    return Affine(source_mean=source.mean, linear=linear, target_mean=target.mean)


def crosses_scales(data: Embedded) -> bool:
    """Whether a probe of one magnification can be tested on another: both have labelled tiles, to train and to test."""
    magnification = data.tiles["magnification"].to_numpy(float)
    trained, tested = (np.unique(magnification[data.rows(split)]) for split in ("train", "test"))
    return bool((trained[:, None] != tested).any())


def scale_matrix(
    data: Embedded,
    config: EvaluationConfig,
    *,
    fitted: dict[float, Probe] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Mean IoU of the sound probe trained on one magnification and tested on each.

    `fitted` holds sound probes that were already trained, by their magnification; `seed` is of the bootstrap.
    Test tiles are all labelled test tiles of a magnification; null where a magnification has none to train or test on.

    Returns:
        `matrix`: trained -> tested -> mean IoU, as in {"10x": {"2.5x": …, "10x": …}}; `matrix_bootstrap`: tested -> intervals by
        the magnification that was trained on; `matrix_chance`: tested -> `chance_iou`.
    """
    ladder = [float(m) for m in np.unique(data.tiles["magnification"].to_numpy(float))]
    tests = {m: data.rows("test", m) for m in ladder}
    matrix: dict[str, dict[str, float | None]] = {}
    by_patient: dict[str, dict[str, NDArray]] = {f"{m:g}x": {} for m in ladder}  # tested -> trained -> [P, 1, C, C]
    for trained in ladder:
        train, val = data.rows("train", trained), data.rows("val", trained)
        row: dict[str, float | None] = dict.fromkeys((f"{m:g}x" for m in ladder), None)
        if len(train):
            probe = (fitted or {}).get(trained) or cohort_probe(data, train, val, config, device)[0]
            for tested, rows in tests.items():
                if len(rows):
                    predicted = probe.predict(data.features[rows], device=device)
                    names, patient = np.unique(data.patients[rows], return_inverse=True)
                    sums = matrices_by_patient(patient, len(names), data.codes[rows], predicted, len(data.classes))
                    by_patient[f"{tested:g}x"][f"{trained:g}x"] = sums
                    row[f"{tested:g}x"] = plain(float(macro(class_iou(sums.sum((0, 1))))))
        matrix[f"{trained:g}x"] = row
    return {
        "matrix": matrix,
        "matrix_bootstrap": {m: _intervals(sums, config, seed) for m, sums in by_patient.items()},
        "matrix_chance": {f"{m:g}x": chance_iou(data.codes[rows]) for m, rows in tests.items()},
    }


def chance_iou(truth: NDArray) -> float | None:
    """Mean IoU of a guess that names each of the classes of the truth [n] with the same probability; null without tiles.

    From the expected confusion matrix: of n_a tiles of class a n_a / K are called b, whichever b of the K classes.
    """
    _, counts = np.unique(truth, return_counts=True)
    return float(macro(class_iou(np.outer(counts, np.full(len(counts), 1 / len(counts)))))) if len(counts) else None


def _intervals(sums: dict[str, NDArray], config: EvaluationConfig, seed: int) -> dict[str, Any]:
    """Intervals of the mean IoU of confusion matrices [P, 1, C, C] by the magnification that was trained on."""

    def statistic(weights: Floats) -> dict[str, Floats]:
        return {name: macro(class_iou(np.tensordot(weights, part[:, 0], axes=1))) for name, part in sums.items()}

    return patient_intervals(
        statistic,
        max((len(part) for part in sums.values()), default=0),
        resamples=config.bootstrap_resamples,
        min_patients=config.min_patients,
        seed=seed,
    )


def _power(symmetric: Floats, exponent: float) -> Floats:
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * values.clip(1e-12) ** exponent) @ vectors.T
