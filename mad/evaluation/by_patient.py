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

from mad.metrics.confusion import class_dice, class_iou, drop_truth, macro

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
        columns = {
            "s_pos": pos,
            "s_neg_same": same,
            "delta_hier": pos - same,
            "s_neg_diff": diff,
            "delta_sem": same - diff,
        }
        found |= {f"{average} {name}": values for name, values in columns.items()}
    return found


def consistency_statistics(sums: Sums, weights: Floats) -> dict[str, Floats]:
    """Table 4 in every space and retrieval@1 with its chance level, named by their place in `consistency.json`."""
    found = {
        f"{space} {name}": values
        for space in SPACES
        for name, values in cosine_statistics(sums, weights, space).items()
    }
    for way in WAYS:
        hits, chance, queries = (weights @ part for part in sums[f"retrieval {way}"])
        found |= {f"retrieval {way} at_1": ratio(hits, queries), f"retrieval {way} chance": ratio(chance, queries)}
    return found


def transfer_statistics(sums: Sums, weights: Floats) -> dict[str, Floats]:
    """Table 5 of every probe, named by its place in `transfer.json`.

    Args:
        sums: `{probe} coarse` and `{probe} fine` [P, runs, C, C], confusion matrices; `{probe} agree` [P, runs] of `children`
            [P]; `background` [], the code of that class or -1. A probe whose fine embeddings were carried over
            (`{probe}_matched`, `{probe}_coral`) shares the coarse side of its `{probe}`.
        weights: [r, P].
    """
    background = int(sums["background"])
    found: dict[str, Floats] = {}
    for probe in [name.removesuffix(" fine") for name in sums if name.endswith(" fine")]:
        coarse, fine = sums[f"{probe.split('_')[0]} coarse"], sums[f"{probe} fine"]
        for variant, code in {"with_background": None, "without_background": background}.items():
            if code != -1:
                scores = iou_statistics(drop_truth(coarse, code), drop_truth(fine, code), weights)
                found |= {f"{probe} {variant} {name}": values for name, values in scores.items()}
        agree = ratio(weights @ sums[f"{probe} agree"], (weights @ sums["children"])[:, None])
        found[f"{probe} agreement"] = agree.mean(1)
    return found


def iou_statistics(coarse: NDArray, fine: NDArray, weights: Floats) -> dict[str, Floats]:
    """Mean IoU on both sides, mean over runs, and consistency of these means, of confusion matrices [P, runs, C, C]."""
    iou = [macro(macro(class_iou(np.tensordot(weights, part, axes=1)))) for part in (coarse, fine)]
    return {"coarse mean_iou": iou[0], "fine mean_iou": iou[1], "consistency": consistency(*iou)}


def classification_statistics(sums: Sums, weights: Floats) -> dict[str, Floats]:
    """Macro F1 of k-NN, mean over runs, of confusion matrices `knn` [P, runs, C, C]."""
    return {"knn macro_f1": macro(macro(class_dice(np.tensordot(weights, sums["knn"], axes=1))))}


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


def ratio(total: Floats, count: NDArray) -> Floats:
    """total / count; NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, total / count, np.nan)
