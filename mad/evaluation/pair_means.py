"""Everything that Table 4 tells of the aligned pairs of two magnifications: cosines, retrieval, intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.bootstrap import patient_intervals
from mad.evaluation.buckets import Buckets, ClassSums, class_statistics
from mad.evaluation.by_patient import SPACES, WAYS, Sums, pair_statistics
from mad.evaluation.data import Embedded, class_counts
from mad.evaluation.label_free import retrieval_report, retrieval_sums
from mad.metrics.cosine import pair_sums

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Aligned pairs of two magnifications: p parents and q children on S slides."""

    parents: NDArray[np.float32]
    """[p, d]"""
    children: NDArray[np.float32]
    """[q, d], each row with the parent `parents[parent_of]`."""
    parent_of: NDArray[np.int64]
    parent_slide: NDArray[np.int64]
    """[p], numbers of `slides`, and"""
    child_slide: NDArray[np.int64]
    """[q]."""
    parent_code: NDArray[np.int64]
    """[p], class codes; zeros where nothing is labelled, and"""
    child_code: NDArray[np.int64]
    """[q]."""
    classes: list[str]
    """Empty where nothing is labelled."""
    slides: NDArray[Any]
    """Names [S], and"""
    patient_of_slide: NDArray[Any]
    """[S] whose they are."""


def pairs_of(data: Embedded, table: pd.DataFrame, *, labelled: bool) -> Pairs:
    """The pairs of a table of rows (parent, child) of `data`; classes count where they are `labelled`."""
    parent_rows, parent_of = np.unique(table["parent"].to_numpy(), return_inverse=True)
    child_rows = table["child"].to_numpy()
    codes = data.codes if labelled else np.zeros(len(data.tiles), np.int64)
    name = data.tiles["slide_id"].to_numpy(str)
    slides, first, parent_slide = np.unique(name[parent_rows], return_index=True, return_inverse=True)
    return Pairs(
        parents=data.features[parent_rows],
        children=data.features[child_rows],
        parent_of=parent_of,
        parent_slide=parent_slide,
        child_slide=np.searchsorted(slides, name[child_rows]),
        parent_code=codes[parent_rows],
        child_code=codes[child_rows],
        classes=data.classes if labelled else [],
        slides=slides,
        patient_of_slide=data.patients[parent_rows][first],
    )


def measure(
    pairs: Pairs, patients: NDArray, config: EvaluationConfig, *, seed: int
) -> tuple[dict[str, Any], Sums, dict[str, Any]]:
    """All of Table 4 for some pairs.

    Args:
        pairs: of one transition.
        patients: names [P], sorted, that the sums are by; those of the pairs are among them.
        config: for the bootstrap.
        seed: of the bootstrap.

    Returns:
        `counts`, the rows in every space, `retrieval` and `bootstrap`; the sums of `by_patient.pair_statistics`; and the sums
        by slide, `cosine` [2, S] and `retrieval` [5, S].
    """
    num_slides, num_classes = len(pairs.slides), max(len(pairs.classes), 1)
    own = pairs.parents.mean(0, dtype=np.float64), pairs.children.mean(0, dtype=np.float64)
    shared = (own[0] + own[1]) / 2
    centres = {"cosine": (None, None), "centred": (shared, shared), "centred_each": own}
    report: dict[str, Any] = {"counts": _counts(pairs)}
    retrieval = retrieval_sums(
        pairs.parents, pairs.children, pairs.parent_of, pairs.parent_slide, pairs.child_slide, num_slides
    )
    by_slide: dict[str, Any] = {"retrieval": retrieval}
    by_patient: Sums = {}
    by_class: dict[str, ClassSums] = {}
    for space in SPACES:
        sums = pair_sums(
            pairs.parents, pairs.children, pairs.parent_of, (pairs.parent_slide, pairs.child_slide), num_slides,
            (pairs.parent_code, pairs.child_code), num_classes, centres=centres[space],
        )  # fmt: skip
        buckets = Buckets(sums, pairs.patient_of_slide, patients)
        report[space] = buckets.report()
        by_patient |= {f"{space} {name}": values for name, values in buckets.by_patient().items()}
        by_class[space] = buckets.by_class()
        if space == "cosine":
            by_slide[space] = buckets.by_slide()
    for way in WAYS:
        pooled = np.stack([buckets.pool(part) for part in retrieval[way]])
        by_patient |= {f"retrieval {way}": pooled[:3], f"retrieval {way} at_5": pooled[3:]}
    report["retrieval"] = retrieval_report(retrieval)

    def statistic(weights: Floats) -> dict[str, Floats]:
        found = pair_statistics(by_patient, weights)
        for space in SPACES:
            found |= {f"{space} {name}": values for name, values in class_statistics(by_class[space], weights).items()}
        paper = "cosine pair_average "
        return {name.removeprefix(paper): values for name, values in found.items() if name.startswith(paper)} | found

    report["bootstrap"] = patient_intervals(
        statistic,
        len(patients),
        tested=report["counts"]["patients"],
        resamples=config.bootstrap_resamples,
        min_patients=config.min_patients,
        seed=seed,
    )
    return report, by_patient, by_slide


def _counts(pairs: Pairs) -> dict[str, Any]:
    labelled = bool(pairs.classes)
    crossing = int((pairs.parent_code[pairs.parent_of] != pairs.child_code).sum())
    return {
        "parents": len(pairs.parents),
        "children": len(pairs.children),
        "slides": len(pairs.slides),
        "patients": len(np.unique(pairs.patient_of_slide)),
        "parents_by_class": class_counts(pairs.parent_code, pairs.classes) if labelled else None,
        "children_by_class": class_counts(pairs.child_code, pairs.classes) if labelled else None,
        "children_of_another_class": crossing if labelled else None,
    }
