"""Methods side by side over seeds, with intervals by a paired patient x seed bootstrap.

A group is one method as several encoders, trained from different seeds on one cohort. Its number is the mean over its
encoders. One resample draws, with replacement,

- P of the P test patients, once for all groups and encoders: a difference of two groups is of the same patients on both sides;
- n of the n encoders of each group, independently of the patients and of the other groups.

Every number is computed anew from the drawn patients' sums (`mad.evaluation.by_patient`) for each drawn encoder and averaged;
an interval holds the middle 95 % of the resamples. It answers: had other patients of this population been tested, and other
seeds been trained, where would the number lie? Patients and seeds are crossed, and drawing both is on the safe side (Owen 2007,
"The pigeonhole bootstrap"), but from n encoders the seeds' part of the variance comes out (n - 1) / n of its size: two thirds
with three. With one encoder the interval tells of patients alone.

Not resampled: training patients, tiles within a patient, runs of a probe (averaged), the means that centred cosines subtract.
RankMe has no sums over patients: spread over seeds only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from mad.evaluation.bootstrap import patient_draws, percentiles
from mad.evaluation.by_patient import STATISTICS, Sums
from mad.evaluation.data import plain, spread
from mad.files import MadError

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What `evaluate` wrote of one encoder."""

    name: str
    sums: dict[str, Sums]
    """Protocol -> its sums per test patient; a protocol that was not applicable lacks."""
    facts: dict[str, float | None] = field(default_factory=dict)
    """Numbers that no sums per patient decide."""


def compare(
    groups: dict[str, list[Measured]], baseline: str | None, *, resamples: int, min_patients: int, seed: int
) -> dict[str, Any]:
    """Every number of every group, and its difference to the baseline.

    Args:
        groups: method -> its encoders.
        baseline: a group, or None: no differences.
        resamples: of the bootstrap; 0 makes no interval.
        min_patients: under this many test patients no interval is given.
        seed: of the bootstrap; each group's draws of seeds depend on it and on the group's name alone.

    Returns:
        JSON-able: `groups` (encoders by name), `patients` and `reason` (why there is no interval) by protocol, and `metrics`:
        number -> `protocol` and per group `mean`, `std` (sample standard deviation over seeds), `values`, `interval`, and
        `difference` to the baseline (`mean`, `interval`). Null where a seed has no number.

    Raises:
        MadError: two encoders were tested on different patients.
    """
    report: dict[str, Any] = {
        "baseline": baseline,
        "groups": {group: [encoder.name for encoder in members] for group, members in groups.items()},
        "resamples": resamples,
        "seed": seed,
        "patients": {},
        "reason": {},
        "metrics": {},
    }
    seeds = {group: seed_draws(group, len(members), resamples, seed) for group, members in groups.items()}
    for protocol in STATISTICS:
        patients = _patients(groups, protocol)
        num = len(patients)
        reason = f"{num} test patient(s), an interval needs {min_patients}" if num < min_patients else None
        reason = reason or ("evaluate.bootstrap_resamples is 0" if resamples == 0 else None)
        report["patients"][protocol], report["reason"][protocol] = num, reason
        if num:
            draws = patient_draws(num, 0 if reason else resamples, seed)
            weights = np.concatenate([np.ones((1, num)), draws])
            drawn = {group: rows[: len(draws)] for group, rows in seeds.items()}
            for name, values in _measure(groups, protocol, weights).items():
                report["metrics"][name] = {"protocol": protocol, "groups": _rows(values, drawn, baseline)}
    for name in dict.fromkeys(name for members in groups.values() for each in members for name in each.facts):
        values = {
            group: np.array([[each.facts.get(name)] for each in members], float) for group, members in groups.items()
        }
        no_draws = {group: rows[:0] for group, rows in seeds.items()}
        report["metrics"][name] = {"protocol": None, "groups": _rows(values, no_draws, baseline)}
    return plain(report)


def seed_draws(group: str, num_seeds: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """How often each encoder of a group is drawn [resamples, num_seeds]; every row sums to num_seeds."""
    generator = np.random.default_rng([seed, crc32(group.encode())])
    return generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=resamples)


def slide_means(groups: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Slide -> group -> label-free number -> mean, standard deviation and values over seeds.

    Args:
        groups: method -> the `slides` of each of its encoders' `consistency.json`.
    """
    slides = dict.fromkeys(slide for members in groups.values() for rows in members for slide in rows)
    return {
        slide: {
            group: {
                " ".join(path): spread([_number(rows.get(slide), path) for rows in members]) for path in SLIDE_NUMBERS
            }
            for group, members in groups.items()
        }
        for slide in slides
    }


SLIDE_NUMBERS = (
    ("s_pos",), ("s_neg",), ("delta_hier",),
    ("retrieval", "child_to_parent", "at_1"), ("retrieval", "child_to_parent", "chance"),
    ("retrieval", "parent_to_child", "at_1"), ("retrieval", "parent_to_child", "chance"),
    ("rankme", "coarse"), ("rankme", "fine"),
)  # fmt: skip


def _number(row: Any, path: tuple[str, ...]) -> float:
    for key in path:
        row = None if row is None else row[key]
    return np.nan if row is None else row


def _patients(groups: dict[str, list[Measured]], protocol: str) -> list[str]:
    """The test patients that all encoders of a protocol share, [] where none has it."""
    first: tuple[str, list[str]] | None = None
    for encoder in (encoder for members in groups.values() for encoder in members):
        if protocol in encoder.sums:
            names = [str(name) for name in encoder.sums[protocol]["patients"]]
            first = first or (encoder.name, names)
            if names != first[1]:
                raise MadError(
                    f"evidence: encoders {first[0]!r} and {encoder.name!r} were tested on different patients ({protocol}: "
                    f"{sorted(set(names) ^ set(first[1]))}); run `mad evaluate` for both again"
                )
    return first[1] if first else []


def _measure(groups: dict[str, list[Measured]], protocol: str, weights: Floats) -> dict[str, dict[str, Floats]]:
    """Number -> group -> values [encoders, weights]; NaN for an encoder without it."""
    found = {
        group: [STATISTICS[protocol](each.sums[protocol], weights) if protocol in each.sums else {} for each in members]
        for group, members in groups.items()
    }
    names = dict.fromkeys(name for members in found.values() for values in members for name in values)
    nothing = np.full(len(weights), np.nan)
    return {
        name: {group: np.stack([each.get(name, nothing) for each in members]) for group, members in found.items()}
        for name in names
    }


def _rows(values: dict[str, Floats], drawn: dict[str, NDArray[np.int64]], baseline: str | None) -> dict[str, Any]:
    """Per group, of values [encoders, 1 + resamples] whose first column is the number itself, and draws [resamples, encoders]."""
    resampled = {group: (rows[:, 1:] * drawn[group].T).sum(0) / len(rows) for group, rows in values.items()}
    means = {group: float(rows[:, 0].mean()) for group, rows in values.items()}
    report = {}
    for group, rows in values.items():
        report[group] = spread(rows[:, 0]) | {"mean": means[group], "interval": percentiles(resampled[group])}
        if baseline is not None and group != baseline:
            report[group]["difference"] = {
                "mean": means[group] - means[baseline],
                "interval": percentiles(resampled[group] - resampled[baseline]),
            }
    return report
