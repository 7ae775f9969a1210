"""Sums over pairs by slide, patient and class, read out as the rows of Table 4 and under weights of the patients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mad.evaluation.by_patient import Sums, deltas, ratio
from mad.metrics.confusion import macro
from mad.metrics.cosine import PairSums, pool

Floats = NDArray[np.float64]
Table = tuple[NDArray, NDArray]
"""Sum of cosines and number of pairs [..., C, C], by the class of the parent and of the child."""


class Buckets:
    """Sums over pairs of slides and of patients, by class of parent and child, read out as the rows of Table 4.

    Nothing is kept by two slides. By two patients there are the sums of `by_patient` alone; other pairs of two patients are those
    of all minus those within each.
    """

    def __init__(self, sums: PairSums, patient_of_slide: NDArray, patients: NDArray):
        """`patients` [P], sorted, may hold some without a slide."""
        self.patient = np.searchsorted(patients, patient_of_slide)
        self.num_patients = len(patients)
        self.same_slide = sums.others()
        self.by_patients = sums.pooled(self.patient, self.num_patients)
        self.aligned = sums.aligned_sum, sums.aligned_count
        self.masks = class_masks(sums.parents.shape[1])

    def report(self) -> dict[str, Any]:
        everything = _over_groups(self.by_patients.pooled(np.zeros(self.num_patients, np.int64), 1).others())
        within = _over_groups(self.by_patients.others())
        tables = {
            "pair_average": everything,
            "same_slide": _over_groups(self.same_slide),
            "other_patient": (everything[0] - within[0], everything[1] - within[1]),
        }
        found: dict[str, Any] = {}
        for name, table in tables.items():
            by_class = "class_average" if name == "pair_average" else f"{name}_class_average"
            found |= {name: self._row(table), by_class: self._class_row(table)}
        return found

    def by_class(self) -> ClassSums:
        """Sums for `class_statistics`."""
        pos = np.stack([self.pool(part.sum(2)) for part in self.aligned])
        same, diff = (np.stack([self.pool(_where(part, mask)) for part in self.same_slide]) for mask in self.masks)
        return ClassSums(pos=pos, same_slide=(same, diff), patients=self.by_patients)

    def by_patient(self) -> Sums:
        """Sum of cosines and number of pairs, for `cosine_statistics`: of aligned pairs `pos` [2, P]; of the others by class
        within slides [2, P], and by the patients of parent and child [2, P, P]."""
        sums = {"pos": np.stack([self.pool(part.sum((1, 2))) for part in self.aligned])}
        for name, mask in zip(("same", "diff"), self.masks, strict=True):
            sums[name] = self._two_patients(mask)
            sums[f"same_slide {name}"] = np.stack([self.pool(_where(part, mask).sum(1)) for part in self.same_slide])
        return sums

    def by_slide(self) -> dict[str, Floats]:
        """Sum of cosines and number of pairs within each slide [2, S]: `aligned`, and `other` whatever the classes."""
        parts = {"aligned": self.aligned, "other": self.same_slide}
        return {name: np.stack([part.sum((1, 2)) for part in pair]) for name, pair in parts.items()}

    def pool(self, per_slide: NDArray) -> Floats:
        """Sums over the slides of each patient, [S, …] -> [P, …]."""
        return pool(np.asarray(per_slide, np.float64), self.patient, self.num_patients)

    def _two_patients(self, mask: NDArray[np.bool_]) -> Floats:
        """Of the pairs that are not aligned, of classes in `mask`, by patient of parent and child [2, P, P]."""
        sums, tables = self.by_patients, np.empty((2, self.num_patients, self.num_patients))
        aligned = sums.aligned_sum, sums.aligned_count
        for table, (parents, children), own in zip(tables, _sides(sums), aligned, strict=True):
            theirs = np.stack([children[:, row].sum(1) for row in mask], axis=1)
            np.matmul(parents.reshape(len(parents), -1), theirs.reshape(len(theirs), -1).T, out=table)
            table[np.diag_indices(self.num_patients)] -= _where(own, mask).sum(1)
        return tables

    def _row(self, table: Table) -> dict[str, float | int | None]:
        """Means over pairs; positives are always all aligned pairs."""
        (same, num_same), (diff, num_diff) = ([part[mask].sum() for part in table] for mask in self.masks)
        pos, num_pos = (part.sum() for part in self.aligned)
        return _deltas(_mean(pos, num_pos), _mean(same, num_same), _mean(diff, num_diff)) | {
            "num_pos": int(num_pos),
            "num_neg_same": int(num_same),
            "num_neg_diff": int(num_diff),
        }

    def _class_row(self, table: Table) -> dict[str, float | int | None]:
        """Means over the parents' classes."""
        pos = ratio(*(part.sum((0, 2)) for part in self.aligned))
        means = [ratio(*(_where(part, mask) for part in table)) for mask in self.masks]
        return _deltas(*(float(np.nanmean(v)) if np.isfinite(v).any() else None for v in (pos, *means)))


@dataclass(frozen=True, kw_only=True)
class ClassSums:
    """Sum of cosines and number of pairs of P patients, by the class of the parent."""

    pos: Floats
    """Aligned pairs [2, P, C]."""
    same_slide: tuple[Floats, Floats]
    """Others within slides [2, P, C], of the same class and of different ones."""
    patients: PairSums
    """What those within and between patients follow from."""


def _deltas(pos: float | None, same: float | None, diff: float | None) -> dict[str, float | int | None]:
    return {
        "s_pos": pos,
        "s_neg_same": same,
        "delta_hier": None if pos is None or same is None else pos - same,
        "s_neg_diff": diff,
        "delta_sem": None if same is None or diff is None else same - diff,
    }


def class_statistics(sums: ClassSums, weights: Floats) -> dict[str, Floats]:
    """The class averages of `Buckets.report` under patient weights [r, P], as "AVERAGE COLUMN" -> [r]; of `Buckets.by_class`."""

    def mean(part: Floats) -> Floats:
        return macro(ratio(*(weights @ one for one in part)))

    masks = class_masks(sums.patients.parents.shape[1])
    across = [_between(sums.patients, mask, weights) for mask in masks]
    within = [[weights @ _where(part, mask) for part in sums.patients.others()] for mask in masks]
    means = {
        "class_average": [
            macro(ratio(total + own, count + num_own))
            for (total, count), (own, num_own) in zip(across, within, strict=True)
        ],
        "same_slide_class_average": [mean(part) for part in sums.same_slide],
        "other_patient_class_average": [macro(ratio(*part)) for part in across],
    }
    pos = mean(sums.pos)
    found: dict[str, Floats] = {}
    for average, (same, diff) in means.items():
        found |= {f"{average} {column}": values for column, values in deltas(pos, same, diff).items()}
    return found


def class_masks(num_classes: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Parent and child of the same class, and of different ones [C, C]."""
    same = np.eye(num_classes, dtype=bool)
    return same, ~same


def _between(sums: PairSums, mask: NDArray[np.bool_], weights: Floats) -> tuple[Floats, Floats]:
    """Sum of cosines and number of the pairs of two patients whose classes are in `mask`, weighed by both, by class [r, C]."""
    tables = []
    for parents, children in _sides(sums):
        table = np.empty((len(weights), len(mask)))
        for code, row in enumerate(mask):
            mine, theirs = parents[:, code], children[:, row].sum(1)
            own = np.einsum("pd,pd->p", mine, theirs)  # pairs within a patient are none of these
            table[:, code] = np.einsum("rd,rd->r", weights @ mine, weights @ theirs) - weights**2 @ own
        tables.append(table)
    return tables[0], tables[1]


def _sides(sums: PairSums) -> tuple[tuple[NDArray, NDArray], tuple[NDArray, NDArray]]:
    """Vectors of parents and children whose inner products are sums of cosines [P, C, d], and numbers of pairs [P, C, 1]."""
    return (sums.parents, sums.children), (sums.parent_count[..., None], sums.child_count[..., None])


def _over_groups(table: Table) -> Table:
    return table[0].sum(0), table[1].sum(0)


def _where(part: NDArray, mask: NDArray[np.bool_]) -> NDArray:
    """Sums over the classes of the child that are in `mask`, [..., C, C] -> [..., C] by the class of the parent."""
    return (part * mask).sum(-1)


def _mean(total: float, count: float) -> float | None:
    return float(total / count) if count else None
