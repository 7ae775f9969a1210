"""Patients in folds: grouped, stratified, repeated; who is where depends on a hash of (seed, patient), not on any order.

No patient is ever on two sides of a split. Validation patients, on which heads stop and penalties are chosen, are taken out of
the training patients of each split; test patients choose nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mad.files import MadError


@dataclass(frozen=True, kw_only=True)
class Split:
    """The patients of one training and its test."""

    repeat: int
    fold: int
    fit: frozenset[str]
    val: frozenset[str]
    test: frozenset[str]


def patient_folds(strata: Mapping[str, str], *, folds: int, repeats: int, seed: int) -> list[Split]:
    """Every split of a repeated k-fold cross-validation.

    Patients of a stratum are dealt out in the order of their hash, each stratum going on where the last one ended: folds
    differ by at most one patient, within every stratum and in all. Of each stratum's training patients one in `folds`
    (rounded up) validates.

    Args:
        strata: patient -> stratum (`class_strata`, `value_strata`).
        folds: k.
        repeats: divisions; each deals anew.
        seed: of the hash.

    Returns:
        repeats x folds splits.
    """
    members: dict[str, list[str]] = {}
    for patient, stratum in strata.items():
        members.setdefault(stratum, []).append(patient)
    found = []
    for repeat in range(repeats):
        dealt: dict[str, int] = {}
        for stratum in sorted(members):
            start = len(dealt)
            for place, patient in enumerate(_shuffled(members[stratum], seed, repeat, "fold")):
                dealt[patient] = (start + place) % folds
        for fold in range(folds):
            val: set[str] = set()
            for stratum in sorted(members):
                training = [patient for patient in members[stratum] if dealt[patient] != fold]
                wanted = -(-len(training) // folds) if len(training) > 1 else 0
                val |= set(_shuffled(training, seed, repeat, f"val {fold}")[:wanted])
            test = frozenset(patient for patient, place in dealt.items() if place == fold)
            fit = frozenset(strata) - test - val
            found.append(Split(repeat=repeat, fold=fold, fit=fit, val=frozenset(val), test=test))
    return found


def class_strata(patients: Sequence[str], labels: Sequence[str], *, folds: int, what: str) -> dict[str, str]:
    """Patient -> its class (or its classes, where its slides have several).

    Args:
        patients: whose slide, one entry per slide.
        labels: its class.
        folds: number of folds that need a patient of every class.
        what: the target, for messages.

    Raises:
        MadError: fewer than two classes, or a class with fewer patients than folds.
    """
    owned: dict[str, set[str]] = {}
    for patient, label in zip(patients, labels, strict=True):
        owned.setdefault(patient, set()).add(label)
    counts = {label: sum(label in has for has in owned.values()) for label in sorted(set(labels))}
    if len(counts) < 2:
        raise MadError(f"{what}: has {len(counts)} class(es), {sorted(counts)}; a classification needs two or more")
    if short := {label: n for label, n in counts.items() if n < folds}:
        raise MadError(
            f"{what}: {folds} folds need {folds} patients of every class, but it has {short} (of {len(owned)} patients); "
            "lower biomarkers.folds, merge classes in the cohort sheet, or add patients"
        )
    return {patient: " + ".join(sorted(has)) for patient, has in owned.items()}


def value_strata(patients: Sequence[str], values: Sequence[float], *, folds: int, what: str) -> dict[str, str]:
    """Patient -> its stratum among the sorted values: neighbours in groups of `folds`, so that every fold has each level.

    Raises:
        MadError: fewer than twice as many patients as folds.
    """
    owned: dict[str, list[float]] = {}
    for patient, value in zip(patients, values, strict=True):
        owned.setdefault(patient, []).append(value)
    if len(owned) < 2 * folds:
        raise MadError(
            f"{what}: {folds} folds need {2 * folds} patients, but {len(owned)} have a value; lower biomarkers.folds or "
            "add patients"
        )
    order = sorted(owned, key=lambda patient: (sum(owned[patient]) / len(owned[patient]), patient))
    return {patient: f"{place // folds:06d}" for place, patient in enumerate(order)}


def _shuffled(patients: Sequence[str], seed: int, repeat: int, purpose: str) -> list[str]:
    """Patients in the order of a hash of (seed, repeat, purpose, patient)."""

    def key(patient: str) -> bytes:
        return hashlib.blake2b(f"{seed}\t{repeat}\t{purpose}\t{patient}".encode(), digest_size=16).digest()

    return sorted(patients, key=key)
