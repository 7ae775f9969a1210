"""Table 3 of the MAD paper, upper part: F1 per class of a linear probe and of k-NN, all magnifications pooled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.bootstrap import patient_draws, patient_intervals
from mad.evaluation.by_patient import (
    CLASSIFIERS,
    class_recall,
    class_statistics,
    classification_statistics,
    matrices_by_patient,
)
from mad.evaluation.data import Embedded, NotApplicableError, spread
from mad.evaluation.probe import cohort_probe, paper_probe
from mad.metrics.confusion import accuracy, class_dice, class_iou, macro
from mad.metrics.knn import knn_predict

RULES = {
    "tiles": "labelled tiles of every magnification, pooled; trained on the train split, scored on the test split",
    "linear": "single linear layer, cross-entropy, Adam, last step; a run varies the initial weights and the order of tiles",
    "knn": "cosine on L2-normalised embeddings, majority of the k nearest; among classes with equal votes the one whose "
    "nearest member is most similar. k-NN is deterministic: a run is a bootstrap sample of the training patients, "
    "`whole_bank` uses each patient once",
    "sound": "logistic regression on embeddings standardised by the training tiles, full batch, L2 strength by validation patients",
    "macro": "mean over the classes that the test truth holds; a class that only the test lacks is null",
    "balanced_accuracy": "mean over the classes of the share of a class's tiles that are found",
    "interval": "test patients are resampled, the trained classifiers stay; scores are averaged over runs within a resample",
}


def evaluate_classification(
    data: Embedded, config: EvaluationConfig, *, seed: int, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """F1 and IoU per class, macro F1 and accuracies on the test tiles, by both of the paper's classifiers and the sound probe.

    Under `by_patient`, as arrays, the sums that `mad.evaluation.by_patient` reads.

    Raises:
        NotApplicableError: no labelled training or test tiles.
    """
    train, val, test = (data.rows(split) for split in ("train", "val", "test"))
    if not len(train) or not len(test):
        raise NotApplicableError(f"{len(train)} labelled training tiles and {len(test)} labelled test tiles")
    num_classes = len(data.classes)
    labels, truth = data.codes[train], data.codes[test]
    bank, queries = data.part(train), data.part(test)
    seeds = [seed + run for run in range(config.runs)]
    probe = paper_probe(
        bank,
        labels,
        num_classes=num_classes,
        seeds=seeds,
        steps=config.probe_steps,
        lr=config.probe_lr,
        batch=config.probe_batch,
        device=device,
    )
    copies = _patient_copies(data.patients[train], config.runs, seed)
    knn = knn_predict(bank, labels, queries, k=config.knn_k, num_classes=num_classes, copies=copies, device=device)
    sound, strength, chosen = cohort_probe(data, train, val, config, device)
    names, patient = np.unique(data.patients[test], return_inverse=True)
    predicted = {
        "linear": probe.predict(queries, device=device),
        "knn": knn[1:],
        "whole_bank": knn[:1],
        "sound": sound.predict(queries, device=device),
    }
    sums = {
        name: matrices_by_patient(patient, len(names), truth, runs, num_classes) for name, runs in predicted.items()
    }
    found = {name: scores(matrices.sum(0), data.classes) for name, matrices in sums.items()}

    def statistic(weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        by_class = {
            f"{place} {key}": values
            for place, name in CLASSIFIERS.items()
            for key, values in class_statistics(sums[name], weights, data.classes, dice="f1").items()
        }
        return classification_statistics(sums, weights) | by_class

    magnification = data.tiles["magnification"].to_numpy(float)
    return {
        "by_patient": {"patients": names, **sums},
        "rules": RULES,
        "classes": data.classes,
        "runs": config.runs,
        "seeds": seeds,
        "k": config.knn_k,
        "probe": {"steps": config.probe_steps, "lr": config.probe_lr, "batch": config.probe_batch},
        "counts": {
            "train": data.counts(train),
            "val": data.counts(val),
            "test": data.counts(test),
            "test_by_magnification": {
                f"{m:g}x": int((magnification[test] == m).sum()) for m in np.unique(magnification[test])
            },
        },
        "n": {"tiles": len(test)},
        "patients": {"train": data.num_patients(train), "val": data.num_patients(val), "test": data.num_patients(test)},
        "absent_in_train": _absent(data.counts(train)),
        "absent_in_test": _absent(data.counts(test)),
        "linear": found["linear"],
        "knn": found["knn"] | {"whole_bank": found["whole_bank"]},
        "sound": found["sound"] | {"strength": strength, "chosen_by": chosen},
        "bootstrap": patient_intervals(
            statistic,
            len(names),
            resamples=config.bootstrap_resamples,
            min_patients=config.min_patients,
            seed=seed,
        ),
    }


def scores(matrices: NDArray[np.int64], classes: list[str]) -> dict[str, Any]:
    """F1 and IoU per class, macro F1 and accuracies of runs' confusion matrices [runs, C, C], each as mean, std and values."""
    f1, iou = class_dice(matrices), class_iou(matrices)
    return {
        "f1": {name: spread(f1[:, code]) for code, name in enumerate(classes)},
        "iou": {name: spread(iou[:, code]) for code, name in enumerate(classes)},
        "macro_f1": spread(macro(f1)),
        "accuracy": spread(accuracy(matrices)),
        "balanced_accuracy": spread(macro(class_recall(matrices))),
        "confusion": matrices.tolist(),
    }


def _patient_copies(patients: NDArray, runs: int, seed: int) -> NDArray[np.int64]:
    """How often each tile is in the bank [1 + runs, n]: once each, then by bootstrap samples of the patients."""
    names, code = np.unique(patients, return_inverse=True)
    draws = patient_draws(len(names), runs, seed)
    return np.concatenate([np.ones((1, len(patients)), np.int64), draws[:, code]])


def _absent(counts: dict[str, int]) -> list[str]:
    return [name for name, count in counts.items() if not count]
