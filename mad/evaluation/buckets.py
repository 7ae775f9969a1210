"""Sums over all pairs by slide and class, read out as the rows of Table 4 and under weights of the patients."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mad.evaluation.by_patient import Sums, couple, deltas, ratio
from mad.metrics.confusion import macro
from mad.metrics.cosine import PairSums

Floats = NDArray[np.float64]


class Buckets:
    """Sums over pairs by (slide, class) of the parent x (slide, class) of the child, read out as the rows of Table 4."""

    def __init__(self, sums: PairSums, num_slides: int, num_classes: int, patient_of_slide: NDArray, patients: NDArray):
        """`patients` [P], sorted, may hold some without a slide."""
        shape = (num_slides, num_classes, num_slides, num_classes)
        self.aligned_sum, self.aligned_count = sums.aligned_sum.reshape(shape), sums.aligned_count.reshape(shape)
        self.other_sum, self.other_count = sums.other_sum.reshape(shape), sums.other_count.reshape(shape)
        self.patient = np.searchsorted(patients, patient_of_slide)
        self.num_patients = len(patients)
        self.within = self.patient[:, None] == self.patient[None, :]  # [S, S], slides of one patient
        self.same_slide = np.eye(num_slides, dtype=bool)
        self.same_class = np.eye(num_classes, dtype=bool)

    def report(self) -> dict[str, Any]:
        everything = np.ones_like(self.within)
        return {
            "pair_average": self._row(everything),
            "class_average": self._class_row(everything),
            "same_slide": self._row(self.same_slide),
            "same_slide_class_average": self._class_row(self.same_slide),
            "other_patient": self._row(~self.within),
            "other_patient_class_average": self._class_row(~self.within),
        }

    def by_class(self) -> Sums:
        """Sums for `class_statistics`, of the parents' classes: of aligned pairs `pos` [2, P, C]; of the others within slides
        `same_slide {same,diff}` [2, P, C], and by the patients of parent and child `{same,diff}` [2, C, P, P]."""
        sums = {"pos": [self.pool(np.einsum("satb->sa", part)) for part in (self.aligned_sum, self.aligned_count)]}
        for name, mask in (("same", self.same_class), ("diff", ~self.same_class)):
            parts = [np.einsum("satb,ab->ast", part, mask) for part in (self.other_sum, self.other_count)]
            sums[f"same_slide {name}"] = [self.pool(np.diagonal(part, axis1=1, axis2=2).T) for part in parts]
            sums[name] = [np.stack([self.pool(self.pool(one).T).T for one in part]) for part in parts]
        return {name: np.stack(parts) for name, parts in sums.items()}

    def by_patient(self) -> Sums:
        """Sum of cosines and number of pairs, for `cosine_statistics`: of aligned pairs `pos` [2, P]; of the others by class
        within slides [2, P], and by the patients of parent and child [2, P, P]."""
        sums = {"pos": [self.pool(np.einsum("satb->s", part)) for part in (self.aligned_sum, self.aligned_count)]}
        for name, mask in (("same", self.same_class), ("diff", ~self.same_class)):
            parts = [np.einsum("satb,ab->st", part, mask) for part in (self.other_sum, self.other_count)]
            sums[name] = [self.pool(self.pool(part).T).T for part in parts]
            sums[f"same_slide {name}"] = [self.pool(np.diagonal(part)) for part in parts]
        return {name: np.stack(parts) for name, parts in sums.items()}

    def by_slide(self) -> dict[str, Floats]:
        """Sum of cosines and number of pairs within each slide [2, S]: `aligned`, and `other` whatever the classes."""
        parts = {
            "aligned": (self.aligned_sum, self.aligned_count),
            "other": (self.other_sum, self.other_count),
        }
        return {name: np.stack([np.einsum("sasb->s", part) for part in pair]) for name, pair in parts.items()}

    def pool(self, per_slide: NDArray) -> Floats:
        """Sums over the slides of each patient, [S, …] -> [P, …]."""
        pooled = np.zeros((self.num_patients, *per_slide.shape[1:]))
        np.add.at(pooled, self.patient, per_slide)
        return pooled

    def _row(self, slides: NDArray[np.bool_]) -> dict[str, float | int | None]:
        """Means over pairs whose slides [S, S] are allowed; positives are always all aligned pairs."""
        pos = _mean(self.aligned_sum.sum(), self.aligned_count.sum())
        same = _mean(*self._sums(slides, self.same_class))
        diff = _mean(*self._sums(slides, ~self.same_class))
        return _deltas(pos, same, diff) | {
            "num_pos": int(self.aligned_count.sum()),
            "num_neg_same": int(self._sums(slides, self.same_class)[1]),
            "num_neg_diff": int(self._sums(slides, ~self.same_class)[1]),
        }

    def _class_row(self, slides: NDArray[np.bool_]) -> dict[str, float | int | None]:
        """Means over the parents' classes."""
        pos = ratio(np.einsum("satb->a", self.aligned_sum), np.einsum("satb->a", self.aligned_count))
        means = []
        for mask in (self.same_class, ~self.same_class):
            total, count = (
                np.einsum("satb,st,ab->a", part, slides, mask) for part in (self.other_sum, self.other_count)
            )
            means.append(ratio(total, count))
        return _deltas(*(float(np.nanmean(v)) if np.isfinite(v).any() else None for v in (pos, *means)))

    def _sums(self, slides: NDArray[np.bool_], classes: NDArray[np.bool_]) -> tuple[float, float]:
        total, count = (np.einsum("satb,st,ab->", part, slides, classes) for part in (self.other_sum, self.other_count))
        return float(total), float(count)


def _deltas(pos: float | None, same: float | None, diff: float | None) -> dict[str, float | int | None]:
    return {
        "s_pos": pos,
        "s_neg_same": same,
        "delta_hier": None if pos is None or same is None else pos - same,
        "s_neg_diff": diff,
        "delta_sem": None if same is None or diff is None else same - diff,
    }


def class_statistics(sums: Sums, weights: Floats) -> dict[str, Floats]:
    """The class averages of `Buckets.report` under patient weights [r, P], as "AVERAGE COLUMN" -> [r]; of `Buckets.by_class`."""

    def mean(name: str) -> Floats:
        return macro(ratio(*(weights @ part for part in sums[name])))

    def coupled(name: str, inside: bool) -> Floats:
        return macro(ratio(*(np.stack([couple(weights, one, inside) for one in part], axis=1) for part in sums[name])))

    pos, both = mean("pos"), ("same", "diff")
    means = {
        "class_average": [coupled(name, True) for name in both],
        "same_slide_class_average": [mean(f"same_slide {name}") for name in both],
        "other_patient_class_average": [coupled(name, False) for name in both],
    }
    found: dict[str, Floats] = {}
    for average, (same, diff) in means.items():
        found |= {f"{average} {column}": values for column, values in deltas(pos, same, diff).items()}
    return found


def _mean(total: float, count: float) -> float | None:
    return float(total / count) if count else None
