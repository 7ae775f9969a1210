"""Is a student at a coarse magnification as good as its teacher at the fine one? Non-inferiority on the same fields (XMAG's claim).

A field is a labelled parent of the transition's pairs whose children are all embedded. The student tells its class from the
embedding of the coarse tile, the reference from the mean of its own embeddings of the children; either gets the sound probe,
fitted on the fields of the training patients. With the reference's and the student's right answers on the test fields,

    difference = (right answers of the student - right answers of the reference) / fields

and its 95 % interval from resampled patients: "yes" where it lies above -margin, "no" where it lies below, else "undecided".
Where it is set against another student (an ablation against the whole), the difference to that one is of the same draws.

A percentile interval over P patients is too narrow for a test where P is small: it lacks sqrt(P / (P - 1)) of its width, and t
quantiles in the place of normal ones (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"). Intervals of the
differences are widened about the difference by both (`widened`). Of 4,000 simulated students exactly at the margin (40 fields a
patient), by rights 2.5 % each way, 2.9 % were told "yes" and 2.4 % "no" at 5 patients, 2.6 and 2.9 at 6, 3.2 and 2.3 at 10, 2.7 and
2.6 at 50; unwidened 8.1 and 8.1, 7.2 and 7.0, 5.1 and 5.0, 3.2 and 3.0. Where the patients' differences are skewed and their fields
unlike in number, 3.5 and 2.9 at 5 patients, 4.5 and 2.2 at 6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.bootstrap import Floats, patient_intervals
from mad.evaluation.by_patient import ratio
from mad.evaluation.data import Embedded, NotApplicableError, class_counts, kind_of, plain
from mad.evaluation.probe import choose_sound_probe

RULES = {
    "fields": "labelled parents of the transition's pairs with all of their children",
    "student": "embedding of the coarse tile",
    "reference": "mean of the reference's embeddings of the tile's children",
    "probe": "logistic regression on embeddings standardised by the training fields, full batch, L2 strength by validation fields",
    "difference": "accuracy of the student less that of the reference on the test fields",
    "intervals": "95 % over resampled patients: of an accuracy the percentiles; of a difference the percentiles, their distance "
    "from it widened by sqrt(P / (P - 1)) and t against normal quantiles for P patients",
    "against": "accuracy less that of another encoder at the coarse magnification, on the same fields and draws; trainings are not "
    "resampled",
    "verdict": "yes: the interval lies above -margin; no: below; undecided: neither, or no interval",
}

DIFFERENCES = {"difference": "reference", "less_against": "against"}
"""The student's, by the side that it is less."""


def evaluate_noninferiority(
    student: Embedded,
    reference: Embedded,
    config: EvaluationConfig,
    *,
    seed: int,
    device: str = "cpu",
    against: Embedded | None = None,
) -> dict[str, Any]:
    """Accuracies on the test fields that all have, the difference with its interval, and the verdict.

    Args:
        student: is asked about.
        reference: at the fine magnification.
        config: transition, margin, probe and bootstrap.
        seed: of the resampling.
        device: of the probes.
        against: another encoder at the coarse magnification; the student's difference to it is `less_against`.

    Raises:
        NotApplicableError: no training or no test field that the encoders share.
    """
    sides = {
        "student": coarse_fields(student, config.transition),
        "reference": fine_fields(reference, config.transition),
    }
    if against is not None:
        sides["against"] = coarse_fields(against, config.transition)
    shared = sorted(set.intersection(*(set(names) for names, _ in sides.values())))
    tiles = student.tiles.set_index("tile_id").loc[shared]
    splits, codes = tiles["split"].to_numpy(str), tiles["code"].to_numpy(np.int64)
    train, val, test = (np.flatnonzero(splits == split) for split in ("train", "val", "test"))
    if not len(train) or not len(test):
        raise NotApplicableError(f"{len(train)} labelled training fields and {len(test)} test fields")
    report: dict[str, Any] = {}
    right: dict[str, NDArray[np.bool_]] = {}
    for side, (names, features) in sides.items():
        place = {name: row for row, name in enumerate(names)}
        rows = features[[place[name] for name in shared]]
        probe, strength, chosen = choose_sound_probe(
            rows[train], codes[train], num_classes=len(student.classes), strengths=config.sound_strengths,
            fallback=config.sound_strength, val_features=rows[val], val_labels=codes[val], device=device,
        )  # fmt: skip
        right[side] = probe.predict(rows[test], device=device)[0] == codes[test]
        report[side] = {"accuracy": float(right[side].mean()), "strength": strength, "chosen_by": chosen}
    patients, code = np.unique(tiles["patient_id"].to_numpy(str)[test], return_inverse=True)
    sums = {side: np.bincount(code, weights=found) for side, found in right.items()}
    boot = patient_intervals(
        lambda weights: accuracies(sums, np.bincount(code), weights),
        len(patients), resamples=config.bootstrap_resamples, min_patients=config.min_patients, seed=seed,
    )  # fmt: skip
    intervals = boot["intervals"] or {}
    differences = {
        name: report["student"]["accuracy"] - report[other]["accuracy"]
        for name, other in DIFFERENCES.items()
        if other in report
    }
    for name, estimate in differences.items():
        if interval := intervals.get(name):
            intervals[name] = widened(interval, estimate, len(patients))
    rules = {name: rule for name, rule in RULES.items() if name != "against" or against is not None}
    return plain(
        {
            "rules": rules, "transition": kind_of(*config.transition), "margin": config.margin, **report,
            **differences, "verdict": verdict(intervals.get("difference"), config.margin), "bootstrap": boot,
            "counts": {split: class_counts(codes[splits == split], student.classes) for split in ("train", "val", "test")},
            "patients": {"test": len(patients)},
        }
    )  # fmt: skip


def accuracies(sums: dict[str, NDArray], fields: NDArray, weights: Floats) -> dict[str, Floats]:
    """Accuracy of each side and the student's differences [r] under weights of the patients [r, P], from sums per patient [P]."""
    found = {side: ratio(weights @ right, weights @ fields) for side, right in sums.items()}
    return found | {name: found["student"] - found[other] for name, other in DIFFERENCES.items() if other in found}


def widened(interval: list[float], estimate: float, num_patients: int) -> list[float]:
    """A 95 % percentile interval over `num_patients` (2 or more) for a test: by 1.58 at 5 patients, 1.44 at 6, 1.04 at 50."""
    factor = np.sqrt(num_patients / (num_patients - 1)) * stats.t.ppf(0.975, num_patients - 1) / stats.norm.ppf(0.975)
    return [float(estimate + factor * (edge - estimate)) for edge in interval]


def verdict(interval: list[float] | None, margin: float) -> str:
    """ "yes", "no" or "undecided"."""
    if interval is None:
        return "undecided"
    return "yes" if interval[0] > -margin else "no" if interval[1] < -margin else "undecided"


def coarse_fields(data: Embedded, transition: tuple[float, float]) -> tuple[list[str], NDArray[np.float32]]:
    """Ids of the fields and the embeddings of their coarse tiles [n, d]."""
    parents, _ = _families(data, transition)
    return data.tiles["tile_id"].to_numpy()[parents].tolist(), data.features[parents]


def fine_fields(data: Embedded, transition: tuple[float, float]) -> tuple[list[str], NDArray[np.float32]]:
    """Ids of the fields and the means of their children's embeddings [n, d]."""
    parents, children = _families(data, transition)
    means = np.stack([data.features[rows].mean(axis=0) for rows in children]) if len(parents) else data.features[:0]
    return data.tiles["tile_id"].to_numpy()[parents].tolist(), means


def _families(data: Embedded, transition: tuple[float, float]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of labelled parents [n] and of their s² children [n, s²], of whole pairs alone."""
    pairs, count = data.pairs[data.pairs["kind"] == kind_of(*transition)], round(transition[1] / transition[0]) ** 2
    pairs = pairs[data.codes[pairs["parent"]] >= 0].sort_values(["parent", "position"])
    whole = pairs[pairs.groupby("parent")["child"].transform("size") == count]
    children = whole["child"].to_numpy(np.int64).reshape(-1, count)
    return whole["parent"].to_numpy(np.int64)[::count], children
