"""Leave one site (or scanner) out: does a probe know the tissue of a laboratory that it has never seen?

Beyond the MAD paper. For every value of the cohort sheet's columns `site` and `scanner` the sound probe is trained on the training
patients of all others and tested on the test patients of this one; beside it the probe that trained on this one too, tested on the
same tiles. The gap between the two is what leaving out costs, fewer training tiles included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.bootstrap import patient_intervals
from mad.evaluation.by_patient import class_statistics, matrices_by_patient, matrix_statistics
from mad.evaluation.data import SHEET_COLUMNS, Embedded, NotApplicableError, plain
from mad.evaluation.probe import Probe, cohort_probe
from mad.metrics.confusion import macro

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]
KINDS = ("left_out", "seen")
SCORES = ("macro_f1", "accuracy", "balanced_accuracy")
RULES = {
    "tiles": "labelled tiles of every magnification, pooled, of slides whose site (or scanner) the sheet names",
    "left_out": "trained on the train split of all other sites, tested on the test split of this one",
    "seen": "trained on the train split of all sites, this one too, and tested on the same tiles",
    "probe": "logistic regression on embeddings standardised by the training tiles, full batch, L2 strength by the validation "
    "patients of the sites trained on; evaluate.sound_strength, of left_out and of seen, where the other sites have none",
    "patients": "no patient on two sides: tiles of a tested patient never train, also where the patient has slides of other sites "
    "or the split is by block",
    "mean": "over the sites that have a number, each of which counts the same; drop = seen - left_out",
    "interval": "the test patients of a site (of the mean: of all sites) are resampled, the trained probes stay",
}


def evaluate_sites(
    data: Embedded, config: EvaluationConfig, *, seed: int, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Macro F1 and accuracies of every site and every scanner that was left out.

    Returns:
        JSON-able: `columns`: "site" and "scanner" -> `status` ("ok", "not applicable"), `reason`, `groups` (name -> `left_out` and
        `seen` with scores and intervals, or a `reason`), their means `left_out`, `seen` and `drop` with intervals, and `unnamed`:
        tiles whose slide names none.

    Raises:
        NotApplicableError: neither column names two sites with labelled tiles.
    """
    columns = {column: _column(data, column, config, seed=seed, device=device) for column in SHEET_COLUMNS}
    if all(part["status"] != "ok" for part in columns.values()):
        raise NotApplicableError("; ".join(part["reason"] for part in columns.values()))
    return plain({"rules": RULES, "classes": data.classes, "columns": columns})  # type: ignore[no-any-return]


def _column(
    data: Embedded, column: str, config: EvaluationConfig, *, seed: int, device: str | torch.device
) -> dict[str, Any]:
    """All groups of one column of the cohort sheet."""
    nowhere = np.full(len(data.tiles), "")
    named = data.tiles[column].astype("string").fillna("").to_numpy(str) if column in data.tiles else nowhere
    labelled = {split: data.rows(split) for split in ("train", "val", "test")}
    rows = {split: part[named[part] != ""] for split, part in labelled.items()}
    names = np.unique(named[np.concatenate(list(rows.values()))])
    if len(names) < 2:
        which = f"{str(names[0])!r} alone" if len(names) else "none"
        return {"status": "not applicable", "reason": f"the cohort sheet names {which} as {column} of labelled slides"}
    groups: dict[str, Any] = {}
    tested: list[dict[str, Tested]] = []
    everyone: Fitted | None = None
    for name in names:
        test = rows["test"][named[rows["test"]] == name]
        apart = {split: part[~np.isin(data.patients[part], data.patients[test])] for split, part in rows.items()}
        others = {split: part[named[part] != name] for split, part in apart.items()}
        if not len(test) or not len(others["train"]):
            missing = "training tiles of others" if len(test) else "test tiles of its own"
            groups[str(name)] = {"reason": f"no labelled {missing}", "left_out": None, "seen": None}
            continue
        if not np.isin(data.codes[others["val"]], data.codes[others["train"]]).any():
            apart["val"] = others["val"] = others["val"][:0]  # or `drop` would count two ways of finding a strength
        whole = all(
            len(apart[split]) == len(rows[split]) for split in ("train", "val")
        )  # then the same for every group
        seen = everyone if whole and everyone else _fit(data, apart, config, device)
        everyone = seen if whole else everyone
        probes = {"left_out": _fit(data, others, config, device), "seen": seen}
        tested.append({kind: _test(data, fitted, test, device) for kind, fitted in probes.items()})
        groups[str(name)] = {
            "reason": None,
            "counts": {"test": data.counts(test)},
            "tiles": len(test),
            "patients": data.num_patients(test),
            **{kind: _report(data, probes[kind], tested[-1][kind], config, seed) for kind in KINDS},
        }
    if not tested:
        return {
            "status": "not applicable",
            "reason": f"no {column} has labelled test tiles and training tiles of others",
        }
    patients = np.unique(np.concatenate([part["seen"].patients for part in tested]))

    def statistic(weights: Floats) -> dict[str, Floats]:
        return _means(tested, patients, weights)

    alone = {name: float(value[0]) for name, value in statistic(np.ones((1, len(patients)))).items()}
    return {
        "status": "ok",
        "reason": None,
        "unnamed": int((named == "").sum()),
        "groups": groups,
        **{kind: {key: alone[f"{kind} {key}"] for key in SCORES} for kind in (*KINDS, "drop")},
        "bootstrap": _intervals(statistic, len(patients), config, seed),
    }


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A probe and what it was trained on."""

    probe: Probe
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tested:
    """Predictions of a probe: names of the patients [P] and their confusion matrices [P, 1, C, C]."""

    patients: NDArray[Any]
    sums: NDArray[np.int64]


def _fit(data: Embedded, rows: dict[str, Rows], config: EvaluationConfig, device: str | torch.device) -> Fitted:
    train, val = rows["train"], rows["val"]
    probe, strength, chosen = cohort_probe(data, train, val, config, device)
    if not len(val):
        chosen = "fixed: the other sites have no labelled validation tiles of the classes trained on"
    facts = {"train_tiles": len(train), "train_patients": data.num_patients(train)}
    return Fitted(probe=probe, facts=facts | {"strength": strength, "chosen_by": chosen})


def _test(data: Embedded, fitted: Fitted, test: Rows, device: str | torch.device) -> Tested:
    patients, code = np.unique(data.patients[test], return_inverse=True)
    predicted = fitted.probe.predict(data.features[test], device=device)
    sums = matrices_by_patient(code, len(patients), data.codes[test], predicted, len(data.classes))
    return Tested(patients=patients, sums=sums)


def _report(data: Embedded, fitted: Fitted, tested: Tested, config: EvaluationConfig, seed: int) -> dict[str, Any]:
    """Scores with intervals, of one probe on one group."""

    def statistic(weights: Floats) -> dict[str, Floats]:
        by_class = class_statistics(tested.sums, weights, data.classes, dice="f1")
        return matrix_statistics(tested.sums, weights) | by_class

    alone = {name: float(value[0]) for name, value in statistic(np.ones((1, len(tested.patients)))).items()}
    return {
        **{key: alone[key] for key in SCORES},
        "f1": {name: alone[f"f1 {name}"] for name in data.classes},
        "confusion": tested.sums.sum((0, 1)),
        **fitted.facts,
        "bootstrap": _intervals(statistic, len(tested.patients), config, seed),
    }


def _means(tested: list[dict[str, Tested]], patients: NDArray, weights: Floats) -> dict[str, Floats]:
    """ "left_out KEY", "seen KEY" and "drop KEY": means over the groups [r] under weights of all their patients [r, P]."""
    found: dict[str, Floats] = {}
    for key in SCORES:
        by_kind = {}
        for kind in KINDS:
            scores = [
                matrix_statistics(part[kind].sums, weights[:, np.searchsorted(patients, part[kind].patients)])[key]
                for part in tested
            ]
            by_kind[kind] = np.stack(scores, axis=-1)  # [r, groups]
            found[f"{kind} {key}"] = macro(by_kind[kind])
        found[f"drop {key}"] = macro(by_kind["seen"] - by_kind["left_out"])
    return found


def _intervals(statistic: Any, num_patients: int, config: EvaluationConfig, seed: int) -> dict[str, Any]:
    return patient_intervals(
        statistic,
        num_patients,
        resamples=config.bootstrap_resamples,
        min_patients=config.min_patients,
        seed=seed,
    )
