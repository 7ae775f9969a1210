"""What an embedding tells of its own magnification, without a label: a linear probe from embedding to magnification, and RankMe.

Beyond the MAD paper. An encoder that sees the same tissue alike at every scale leaves little to read the scale from: the lower
the probe's balanced accuracy, the less of its space is spent on magnification (chance: one over the number of magnifications).
Low is no merit by itself: a collapsed encoder reaches chance. So the effective rank of every magnification stands beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.bootstrap import patient_intervals
from mad.evaluation.by_patient import class_recall, matrices_by_patient, matrix_statistics
from mad.evaluation.data import Embedded, NotApplicableError, plain
from mad.evaluation.label_free import rank_of
from mad.evaluation.probe import choose_sound_probe
from mad.metrics.confusion import accuracy, macro

RULES = {
    "tiles": "tiles of every magnification, labelled or not; trained on the train split, scored on the test split",
    "decodability": "logistic regression from embedding to magnification, standardised by the training tiles, full batch, L2 "
    "strength by validation patients; every magnification trains with as many tiles as the scarcest, drawn by the seed: the "
    "number of tiles gives nothing away. Balanced accuracy: lower is more scale-invariant; chance is 1 / number of magnifications",
    "rankme": "effective rank of the test tiles' embeddings at each magnification, not centred; it is bounded by the number of "
    "tiles and has no sums over patients, hence no interval",
    "interval": "test patients are resampled, the trained probe stays",
}
MOST_TILES = 20_000
"""Training tiles per magnification at most."""


def evaluate_magnification(
    data: Embedded, config: EvaluationConfig, *, seed: int, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """How well magnification is read linearly from an embedding, and RankMe by magnification.

    Raises:
        NotApplicableError: fewer than two magnifications have training and test tiles.
    """
    train, val, test = (_by_magnification(data, split) for split in ("train", "val", "test"))
    ladder = [m for m in train if m in test]
    if len(ladder) < 2:
        raise NotApplicableError(f"{len(ladder)} magnification(s) with training and test tiles, decoding needs two")
    generator = np.random.default_rng(seed)
    most = min(MOST_TILES, *(len(train[m]) for m in ladder))
    drawn = {m: np.sort(generator.choice(train[m], most, replace=False)) for m in ladder}
    (rows, codes), (val_rows, val_codes) = (_coded(by, ladder) for by in (drawn, val))
    probe, strength, chosen = choose_sound_probe(
        data.features[rows],
        codes,
        num_classes=len(ladder),
        strengths=config.sound_strengths,
        fallback=config.sound_strength,
        val_features=data.features[val_rows],
        val_labels=val_codes,
        device=device,
    )
    test_rows, truth = _coded(test, ladder)
    names, patient = np.unique(data.patients[test_rows], return_inverse=True)
    predicted = probe.predict(data.features[test_rows], device=device)
    sums = matrices_by_patient(patient, len(names), truth, predicted, len(ladder))
    pooled = sums.sum((0, 1))
    recall = class_recall(pooled)
    scales = [f"{m:g}x" for m in ladder]

    def statistic(weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        drawn = class_recall(np.tensordot(weights, sums[:, 0], axes=1))
        return matrix_statistics(sums, weights) | {f"recall {name}": drawn[:, n] for n, name in enumerate(scales)}

    report = {
        "rules": RULES,
        "magnifications": scales,
        "counts": {
            "train": dict.fromkeys(scales, most),
            "test": {name: len(test[m]) for name, m in zip(scales, ladder, strict=True)},
        },
        "n": {"tiles": len(test_rows)},
        "patients": {"train": data.num_patients(rows), "test": len(names)},
        "decodability": {
            "balanced_accuracy": float(macro(recall)),
            "accuracy": float(accuracy(pooled)),
            "chance": 1 / len(ladder),
            "recall": dict(zip(scales, recall, strict=True)),
            "confusion": pooled,
            "strength": strength,
            "chosen_by": chosen,
        },
        "rankme": {f"{m:g}x": rank_of(data.features[part], seed=seed) for m, part in test.items()},
        "bootstrap": patient_intervals(
            statistic,
            len(names),
            resamples=config.bootstrap_resamples,
            min_patients=config.min_patients,
            seed=seed,
        ),
    }
    return plain(report)  # type: ignore[no-any-return]


def _by_magnification(data: Embedded, split: str) -> dict[float, NDArray[np.int64]]:
    """Magnification -> rows of a split, labelled or not; those with tiles, coarsest first."""
    ladder = np.unique(data.tiles["magnification"].to_numpy(float))
    found = {float(m): data.rows(split, m, labelled=False) for m in ladder}
    return {m: rows for m, rows in found.items() if len(rows)}


def _coded(rows: dict[float, NDArray[np.int64]], ladder: list[float]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of all magnifications of the ladder, one after the other, and each one's place in the ladder."""
    parts = [rows.get(m, np.empty(0, np.int64)) for m in ladder]
    return np.concatenate(parts), np.repeat(np.arange(len(ladder)), [len(part) for part in parts])
