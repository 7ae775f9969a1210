"""Numbers of Tables 3-5 from sums per test patient, under any weights of the patients.

A protocol reports, beside its numbers, sums per patient that decide them (`by_patient`, docs/data-contracts.md). Every
function here takes such sums and weights [r, P], one row per resample, and gives the numbers [r]; weights of one give the
number that the protocol's JSON holds, and are a test. Pairs of two patients weigh by both patients' weights, pairs within a
patient by its own: where a bootstrap draws a patient twice, its two copies are no strangers to each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mad.metrics.confusion import accuracy, class_dice, class_iou, drop_truth, macro

Floats = NDArray[np.float64]
Sums = dict[str, NDArray[Any]]
"""Name -> array, by `patients`: the names [P] in the order of every other array's patients."""

SPACES = ("cosine", "centred", "centred_each")
AVERAGES = ("pair_average", "same_slide", "other_patient")
WAYS = ("child_to_parent", "parent_to_child")


def cosine_statistics(sums: Sums, weights: Floats, space: str = "cosine") -> dict[str, Floats]:
    """Columns of Table 4, as "AVERAGE COLUMN" -> [r].

    Args:
        sums: `{space} pos`, `{space} same_slide same` and `… diff` [2, P]; `{space} same` and `{space} diff` [2, P, P] by the
            parent's patient and the child's: a sum of cosines and the number of pairs; same and diff of the classes.
        weights: [r, P].
        space: which cosines.
    """
    pos = ratio(*(weights @ sums[f"{space} pos"][part] for part in (0, 1)))
    found: dict[str, Floats] = {}
    for average in AVERAGES:
        means = []
        for which in ("same", "diff"):
            if average == "same_slide":
                total, count = (weights @ sums[f"{space} same_slide {which}"][part] for part in (0, 1))
            else:
                inside = average == "pair_average"
                total, count = (couple(weights, sums[f"{space} {which}"][part], inside) for part in (0, 1))
            means.append(ratio(total, count))
        same, diff = means
        found |= {f"{average} {name}": values for name, values in deltas(pos, same, diff).items()}
    return found


def deltas(pos: Floats, same: Floats, diff: Floats) -> dict[str, Floats]:
    """The columns of Table 4."""
    return {
        "s_pos": pos,
        "s_neg_same": same,
        "delta_hier": pos - same,
        "s_neg_diff": diff,
        "delta_sem": same - diff,
    }


def consistency_statistics(sums: Sums, weights: Floats) -> dict[str, Floats]:
    """Table 4 in every space and retrieval with its chance level, named by their place in `consistency.json`; the same of
    grandparents and grandchildren where `sums` hold them, under `transitivity`."""
    found = pair_statistics(sums, weights)
    prefix = "transitivity "
    grand = {name.removeprefix(prefix): part for name, part in sums.items() if name.startswith(prefix)}
    return found | {
        prefix + name: values for name, values in (pair_statistics(grand, weights) if grand else {}).items()
    }


def pair_statistics(sums: Sums, weights: Floats) -> dict[str, Floats]:
    """Cosines in every space and retrieval, both ways, of one set of pairs.

    Args:
        sums: of `cosine_statistics` for each of `SPACES`; `retrieval {way}` [3, P], hits, chance's hits and queries, and
            `retrieval {way} at_5` [2, P], hits and chance's hits among the first five.
        weights: [r, P].
    """
    found = {
        f"{space} {name}": values
        for space in SPACES
        for name, values in cosine_statistics(sums, weights, space).items()
    }
    for way in WAYS:
        hits, chance, queries = (weights @ part for part in sums[f"retrieval {way}"])
        found |= {f"retrieval {way} at_1": ratio(hits, queries), f"retrieval {way} chance": ratio(chance, queries)}
        if f"retrieval {way} at_5" in sums:
            hits, chance = (weights @ part for part in sums[f"retrieval {way} at_5"])
            found[f"retrieval {way} at_5"] = ratio(hits, queries)
            found[f"retrieval {way} chance_at_5"] = ratio(chance, queries)
    return found


def transfer_statistics(sums: Sums, weights: Floats) -> dict[str, Floats]:
    """Table 5 of every probe, named by its place in `transfer.json`.

    Args:
        sums: `{probe} coarse` and `{probe} fine` [P, runs, C, C], confusion matrices; `{probe} agree` [P, runs] of `children`
            [P]; `background` [], the code of that class or -1. A probe whose fine embeddings were carried over
            (`{probe}_matched`, `{probe}_coral`) shares the coarse side of its `{probe}`.
        weights: [r, P].
    """
    background, paired = int(sums["background"]), bool(sums["children"].any())
    found: dict[str, Floats] = {}
    for probe in [name.removesuffix(" fine") for name in sums if name.endswith(" fine")]:
        coarse, fine = sums[f"{probe.split('_')[0]} coarse"], sums[f"{probe} fine"]
        for variant, code in {"with_background": None, "without_background": background}.items():
            if code != -1:
                scores = iou_statistics(drop_truth(coarse, code), drop_truth(fine, code), weights, paired=paired)
                found |= {f"{probe} {variant} {name}": values for name, values in scores.items()}
        agree = ratio(weights @ sums[f"{probe} agree"], (weights @ sums["children"])[:, None])
        found[f"{probe} agreement"] = agree.mean(1)
    return found


def iou_statistics(coarse: NDArray, fine: NDArray, weights: Floats, *, paired: bool = True) -> dict[str, Floats]:
    """Scores on both sides, mean over runs, and consistency of the mean IoU, of confusion matrices [P, runs, C, C].

    Consistency is NaN unless the fine tiles are children of the coarse ones (`paired`).
    """
    found: dict[str, Floats] = {}
    for side, part in (("coarse", coarse), ("fine", fine)):
        pooled = np.tensordot(weights, part, axes=1)  # [r, runs, C, C]
        found[f"{side} mean_iou"] = macro(macro(class_iou(pooled)))
        found[f"{side} mean_dice"] = macro(macro(class_dice(pooled)))
        found[f"{side} accuracy"] = macro(accuracy(pooled))
    ratios = consistency(found["coarse mean_iou"], found["fine mean_iou"])
    return found | {"consistency": ratios if paired else np.full_like(ratios, np.nan)}


CLASSIFIERS = {"linear": "linear", "knn": "knn", "knn whole_bank": "whole_bank", "sound": "sound"}
"""Place in `classification.json` -> array of sums."""


def classification_statistics(sums: Sums, weights: Floats) -> dict[str, Floats]:
    """Table 3's scores of every classifier, mean over runs, of confusion matrices [P, runs, C, C] by `CLASSIFIERS`."""
    found: dict[str, Floats] = {}
    for place, name in CLASSIFIERS.items():
        if name in sums:
            found |= {f"{place} {key}": values for key, values in matrix_statistics(sums[name], weights).items()}
    return found


def matrix_statistics(matrices: NDArray, weights: Floats) -> dict[str, Floats]:
    """Macro F1, accuracy and balanced accuracy, mean over runs, of confusion matrices [P, runs, C, C]."""
    pooled = np.tensordot(weights, matrices, axes=1)
    return {
        "macro_f1": macro(macro(class_dice(pooled))),
        "accuracy": macro(accuracy(pooled)),
        "balanced_accuracy": macro(macro(class_recall(pooled))),
    }


def class_statistics(matrices: NDArray, weights: Floats, classes: list[str], dice: str = "dice") -> dict[str, Floats]:
    """ "iou CLASS", "dice CLASS" (or whatever `dice` calls it), mean over runs, of confusion matrices [P, runs, C, C]."""
    pooled = np.tensordot(weights, matrices, axes=1)
    found: dict[str, Floats] = {}
    for key, values in (("iou", class_iou(pooled)), (dice, class_dice(pooled))):
        found |= {f"{key} {name}": macro(values[..., code]) for code, name in enumerate(classes)}
    return found


def class_recall(matrix: NDArray) -> Floats:
    """Share of each class's tiles that are found [..., C]; NaN for a class that the truth lacks. Its mean is balanced accuracy."""
    matrix = np.asarray(matrix, np.float64)
    return ratio(np.diagonal(matrix, axis1=-2, axis2=-1), matrix.sum(-1))


STATISTICS = {
    "consistency": consistency_statistics,
    "transfer": transfer_statistics,
    "classification": classification_statistics,
}


def consistency(coarse_iou: Any, fine_iou: Any) -> Floats:
    """Consistency in per cent, 100 * mIoU(fine) / mIoU(coarse); NaN where the coarse score is 0 (MAD paper, Table 5)."""
    coarse_iou, fine_iou = np.asarray(coarse_iou, np.float64), np.asarray(fine_iou, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(coarse_iou > 0, 100 * fine_iou / coarse_iou, np.nan)


def couple(weights: Floats, table: Floats, inside: bool = True) -> Floats:
    """Sum of a [P, P] table: pairs of two patients weighed by both, pairs within a patient (`inside`) by that patient once."""
    across = table.copy()
    np.fill_diagonal(across, 0)
    total = np.einsum("rp,rp->r", weights @ across, weights)
    return total + weights @ np.diagonal(table) if inside else total


def matrices_by_patient(
    patient: NDArray, num_patients: int, truth: NDArray, predicted: NDArray, num_classes: int
) -> NDArray:
    """Confusion matrices [P, runs, C, C] of truth [n] and predictions [runs, n] of patients' tiles, `patient` [n] their codes."""
    found = np.zeros((num_patients, len(predicted), num_classes, num_classes), np.int64)
    for run, guess in enumerate(predicted):
        cell = (patient.astype(np.int64) * num_classes + truth) * num_classes + guess
        found[:, run] = np.bincount(cell, minlength=num_patients * num_classes**2).reshape(-1, num_classes, num_classes)
    return found


def ratio(total: Floats, count: NDArray) -> Floats:
    """total / count; NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, total / count, np.nan)
