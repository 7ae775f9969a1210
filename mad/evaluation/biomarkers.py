"""Numbers of the slide-level evaluation, from out-of-fold predictions: accuracy, intervals, paired differences, tile counts.

`auroc` counts the (positive, negative) pairs of slides that one head has tested: scores of two heads are on two scales. The
pairs of all folds and repeats weigh alike. `auroc_pooled`, all out-of-fold scores of a repeat in one ranking, stands beside it.
With more than two classes either is the mean over classes, each against the rest. `r2` and `spearman` are over all slides of
a repeat, mean over repeats.

Intervals resample the patients (`mad.evaluation.bootstrap`), whose slides stay together; every aggregator is given the same
draws, and a difference is of the slides that both have predicted. Not resampled: folds and training, so an interval tells of
other patients tested by these heads, not of other trainings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from mad.config.biomarkers import BiomarkersConfig
from mad.evaluation.auroc import Floats, auroc, ones, pair_tables, r2, spearman
from mad.evaluation.bootstrap import patient_intervals
from mad.evaluation.data import plain, spread

MAIN = {"classification": "auroc", "regression": "r2"}
METRICS = {"classification": ("auroc", "auroc_pooled"), "regression": ("r2", "spearman")}
Statistic = Callable[[Floats], dict[str, Floats]]


def statistic(predictions: pd.DataFrame, classes: list[str] | None, patients: list[str]) -> Statistic:
    """The metrics [r] of predictions under weights [r, P].

    Args:
        predictions: slide_id, patient_id, repeat, fold, truth (code or value) and score_0, score_1, ... (of each class; or the
            value).
        classes: names in order of the codes; None: a regression.
        patients: the P patients of the weights, those of the predictions among them.
    """
    place = {patient: number for number, patient in enumerate(patients)}
    who = predictions["patient_id"].map(place).to_numpy(np.int64)
    truth, repeat = predictions["truth"].to_numpy(np.float64), predictions["repeat"].to_numpy(np.int64)
    if classes is None:
        value, repeats = predictions["score_0"].to_numpy(np.float64), np.unique(repeat)

        def of_values(weights: Floats) -> dict[str, Floats]:
            parts = [(truth[repeat == n], value[repeat == n], who[repeat == n]) for n in repeats]
            return {
                name: np.mean([metric(*part, weights) for part in parts], axis=0)
                for name, metric in (("r2", r2), ("spearman", spearman))
            }

        return of_values
    head = repeat * (predictions["fold"].max() + 1 if len(predictions) else 1) + predictions["fold"].to_numpy(np.int64)
    codes = range(len(classes)) if len(classes) > 2 else [1]
    tables = {
        name: np.stack(
            [
                pair_tables(truth == code, predictions[f"score_{code}"].to_numpy(np.float64), who, group, len(patients))
                for code in codes
            ]
        )
        for name, group in (("auroc", head), ("auroc_pooled", repeat))
    }
    return lambda weights: {name: auroc(table, weights) for name, table in tables.items()}


def summarise(
    predictions: pd.DataFrame, classes: list[str] | None, settings: BiomarkersConfig, *,
    resamples: int, min_patients: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Every number of one aggregator and target, by share of tiles.

    Args:
        predictions: as `statistic` takes them, with `share`, `tokens` and `tiles`.

    Returns:
        JSON-able: share ("1", "0.7", ...) -> `tokens` and `tiles` per slide (mean), and per metric `value`, `interval`, `repeats`
        and `folds` (mean, deviation and values).
    """
    patients = sorted(predictions["patient_id"].unique())
    found: dict[str, Any] = {}
    for share, part in predictions.groupby("share", sort=False):
        measure = statistic(part, classes, patients)
        boot = patient_intervals(measure, len(patients), resamples=resamples, min_patients=min_patients, seed=seed)
        by_repeat = [plain_numbers(one, classes, patients) for _, one in part.groupby("repeat")]
        by_fold = [plain_numbers(one, classes, patients) for _, one in part.groupby(["repeat", "fold"])]
        found[f"{share:g}"] = {
            **{name: float(part.drop_duplicates("slide_id")[name].mean()) for name in ("tokens", "tiles")},
            "metrics": {
                name: {
                    "value": plain(value[0]),
                    "interval": (boot["intervals"] or {}).get(name),
                    "repeats": spread([numbers[name] for numbers in by_repeat]),
                    "folds": spread([numbers[name] for numbers in by_fold]),
                }
                for name, value in measure(ones(len(patients))).items()
            },
            "reason": boot["reason"],
        }
    return found


def plain_numbers(predictions: pd.DataFrame, classes: list[str] | None, patients: list[str]) -> dict[str, float]:
    """The metrics of some predictions, every patient once."""
    return {
        name: float(value[0]) for name, value in statistic(predictions, classes, patients)(ones(len(patients))).items()
    }


def difference(
    one: pd.DataFrame, other: pd.DataFrame, classes: list[str] | None, *, resamples: int, min_patients: int, seed: int
) -> dict[str, Any]:
    """`one` less `other` on the slides that both predict: metric -> value and interval, and how many slides they are.

    None for value and interval where they have no slide in common.
    """
    both = set(one["slide_id"]) & set(other["slide_id"])
    if not both:
        names = METRICS["regression" if classes is None else "classification"]
        return {"slides": 0, "metrics": {name: {"value": None, "interval": None} for name in names}}
    sides = [side[side["slide_id"].isin(both)] for side in (one, other)]
    patients = sorted(sides[0]["patient_id"].unique())
    left, right = (statistic(side, classes, patients) for side in sides)

    def gap(weights: Floats) -> dict[str, Floats]:
        here, there = left(weights), right(weights)
        return {name: here[name] - there[name] for name in here}

    boot = patient_intervals(gap, len(patients), resamples=resamples, min_patients=min_patients, seed=seed)
    return {
        "slides": len(both),
        "metrics": {
            name: {"value": plain(value[0]), "interval": (boot["intervals"] or {}).get(name)}
            for name, value in gap(ones(len(patients))).items()
        },
    }
