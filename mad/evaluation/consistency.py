"""Table 4 of the MAD paper: is a parent closer to its own children than to other tiles, of its class and of others?

S_pos is the mean cosine of aligned parent and child; S_neg_same and S_neg_diff are means over ALL non-aligned pairs of the
same and of different classes, exact, without sampling. delta_hier = S_pos - S_neg_same, delta_sem = S_neg_same - S_neg_diff.
Beside the paper's numbers: the negatives of the same slide and of other patients apart, class averages, variants without
the shared offset of an embedding, retrieval among the tiles of one slide, and intervals over the test patients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.bootstrap import patient_intervals
from mad.evaluation.by_patient import SPACES, WAYS, Sums, cosine_statistics, ratio
from mad.evaluation.data import Embedded, NotApplicableError, class_counts, kind_of, plain
from mad.evaluation.label_free import ranks, retrieval_report, retrieval_sums, slide_rows
from mad.metrics.cosine import PairSums, pair_sums
from mad.metrics.pca import fit_pca

Floats = NDArray[np.float64]

RULES = {
    "tiles": "test pairs; parents and children without a label are left out (where nothing is labelled: all, as one class)",
    "positive": "an aligned pair is always a positive: a child that bears another class than its parent is no negative of it",
    "negatives": "all non-aligned pairs of a parent and a child of the test split; `same_slide`: of one slide; "
    "`other_patient`: of two patients",
    "pair_average": "every pair weighs the same (the paper's columns)",
    "class_average": "mean over the classes of the parent of each class's own mean",
    "centred": "cosines after one shared mean is subtracted: the midpoint of the parents' and the children's mean embedding",
    "centred_each": "cosines after each magnification's own mean is subtracted",
    "retrieval": "child -> the parents of its slide, parent -> the children of its slide; ties count by expectation",
    "rankme": "effective rank of the embeddings of the same parents and of the same children, not centred",
    "slides": "each test slide alone, whatever the classes of its tiles",
    "interval": "patients are resampled; pairs of two patients weigh by both draws, pairs within one by its draw",
}


def evaluate_consistency(data: Embedded, config: EvaluationConfig, *, seed: int) -> dict[str, Any]:
    """All of Table 4 for one encoder; under `by_patient`, as arrays, the sums that `mad.evaluation.by_patient` reads.

    Raises:
        NotApplicableError: no pairs of the wanted transition in the test split.
    """
    pairs, labelled = test_pairs(data, config.transition)
    parent_rows, parent_of = np.unique(pairs["parent"].to_numpy(), return_inverse=True)
    child_rows = pairs["child"].to_numpy()
    parents, children = data.features[parent_rows], data.features[child_rows]
    num_classes = len(data.classes) if labelled else 1
    codes = data.codes if labelled else np.zeros(len(data.tiles), np.int64)
    slide = np.unique(data.tiles["slide_id"].to_numpy(str), return_inverse=True)[1]
    used = np.unique(slide[parent_rows])
    slide_names = np.unique(data.tiles["slide_id"].to_numpy(str))[used]
    slide = np.searchsorted(used, slide)  # codes of the slides that have pairs; others are not asked for
    patient_of_slide = _first(slide[parent_rows], data.patients[parent_rows], len(used))
    groups = [slide[rows] * num_classes + codes[rows] for rows in (parent_rows, child_rows)]
    means = [parents.mean(0, dtype=np.float64), children.mean(0, dtype=np.float64)]
    shared = (means[0] + means[1]) / 2

    def measure(parent_centre: Floats | None, child_centre: Floats | None) -> Buckets:
        sums = pair_sums(
            parents, children, parent_of, groups[0], groups[1], len(used) * num_classes,
            parent_centre=parent_centre, child_centre=child_centre,
        )  # fmt: skip
        return Buckets(sums, len(used), num_classes, patient_of_slide)

    plain_buckets = measure(None, None)
    centres = {"centred": (shared, shared), "centred_each": (means[0], means[1])}
    reports, by_patient = {}, {"patients": np.unique(patient_of_slide)}
    for space in SPACES:  # one at a time: [slides x classes]^2 numbers each
        buckets = measure(*centres[space]) if space in centres else plain_buckets
        reports[space] = buckets.report()
        by_patient |= {f"{space} {name}": values for name, values in buckets.by_patient().items()}
    patients = plain_buckets.num_patients
    slides = slide[parent_rows], slide[child_rows]
    retrieval = retrieval_sums(parents, children, parent_of, *slides, len(used))
    result = {
        "rules": RULES,
        "classes": data.classes if labelled else [],
        "transition": kind_of(*config.transition),
        "labelled": labelled,
        "counts": {
            "parents": len(parent_rows),
            "children": len(child_rows),
            "slides": len(used),
            "patients": patients,
            "parents_by_class": class_counts(codes[parent_rows], data.classes) if labelled else None,
            "children_by_class": class_counts(codes[child_rows], data.classes) if labelled else None,
            "children_of_another_class": int((codes[parent_rows][parent_of] != codes[child_rows]).sum())
            if labelled
            else None,
        },
        **reports,
        "retrieval": retrieval_report(retrieval),
        "rankme": ranks(parents, children, seed=seed),
        "slides": slide_rows(slide_names, plain_buckets.by_slide(), retrieval, parents, children, *slides, seed=seed),
        "bootstrap": patient_intervals(
            plain_buckets.statistics,
            patients,
            resamples=config.bootstrap_resamples,
            min_patients=config.min_patients,
            seed=seed,
        ),
    }
    for way in WAYS:
        by_patient[f"retrieval {way}"] = np.stack([plain_buckets.pool(part) for part in retrieval[way]])
    return plain(result) | {"by_patient": by_patient}


def test_pairs(data: Embedded, transition: tuple[float, float]) -> tuple[pd.DataFrame, bool]:
    """Test pairs of a transition whose both tiles are labelled, or all of them where no label exists; and which it is."""
    kind = kind_of(*transition)
    pairs = data.pairs[data.pairs["kind"] == kind]
    pairs = pairs[data.tiles["split"].to_numpy()[pairs["parent"]] == "test"]
    if not len(pairs):
        raise NotApplicableError(f"the test split has no {kind} pairs")
    known = (data.codes[pairs["parent"]] >= 0) & (data.codes[pairs["child"]] >= 0)
    return (pairs[known], True) if known.any() else (pairs, False)


class Buckets:
    """Sums over pairs by (slide, class) of the parent x (slide, class) of the child, read out as the rows of Table 4."""

    def __init__(self, sums: PairSums, num_slides: int, num_classes: int, patient_of_slide: NDArray):
        shape = (num_slides, num_classes, num_slides, num_classes)
        self.aligned_sum, self.aligned_count = sums.aligned_sum.reshape(shape), sums.aligned_count.reshape(shape)
        self.other_sum, self.other_count = sums.other_sum.reshape(shape), sums.other_count.reshape(shape)
        names, self.patient = np.unique(patient_of_slide, return_inverse=True)
        self.num_patients = len(names)
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

    def statistics(self, weights: Floats) -> dict[str, Floats]:
        """Pair averages under patient weights [r, P] -> [r]."""
        sums = {f"cosine {name}": values for name, values in self.by_patient().items()}
        found = cosine_statistics(sums, weights).items()
        return {name.split(" ")[1]: values for name, values in found if name.startswith("pair_average ")}

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


def projection(data: Embedded, config: EvaluationConfig, *, seed: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Figure 3: the first two principal components of all test tiles of the transition, for a draw of its pairs.

    Returns:
        Table (tile_id, parent_id, role, label, x, y) of `figure_parents` parents, spread evenly over the classes, with all
        of their children; and what was fitted on.
    """
    pairs, labelled = test_pairs(data, config.transition)
    parent_rows, child_rows = np.unique(pairs["parent"]), pairs["child"].to_numpy()
    pca = fit_pca(data.features[np.concatenate([parent_rows, child_rows])], 2)
    generator = np.random.default_rng(seed)
    codes = data.codes[parent_rows] if labelled else np.zeros(len(parent_rows), np.int64)
    shuffled = generator.permutation(len(parent_rows))
    turn = pd.Series(codes[shuffled]).groupby(codes[shuffled]).cumcount().to_numpy()  # n-th of its class
    drawn = parent_rows[shuffled[np.argsort(turn, kind="stable")][: config.figure_parents]]
    shown = pairs[pairs["parent"].isin(drawn)]
    rows = np.concatenate([np.sort(drawn), shown["child"].to_numpy()])
    ids = data.tiles["tile_id"].to_numpy()
    places = pca.project(data.features[rows])
    if places.shape[1] < 2:
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    table = pd.DataFrame(
        {
            "tile_id": ids[rows],
            "parent_id": np.concatenate([np.full(len(drawn), None), ids[shown["parent"].to_numpy()]]),
            "role": ["parent"] * len(drawn) + ["child"] * len(shown),
            "label": data.tiles["label"].to_numpy()[rows],
            "x": places[:, 0],
            "y": places[:, 1],
        }
    )
    explained = [float(share) for share in pca.explained] + [0.0] * (2 - len(pca.explained))
    return table, {"explained": explained, "tiles": len(parent_rows) + len(child_rows), "parents_drawn": len(drawn)}


def _deltas(pos: float | None, same: float | None, diff: float | None) -> dict[str, float | int | None]:
    return {
        "s_pos": pos,
        "s_neg_same": same,
        "delta_hier": None if pos is None or same is None else pos - same,
        "s_neg_diff": diff,
        "delta_sem": None if same is None or diff is None else same - diff,
    }


def _mean(total: float, count: float) -> float | None:
    return float(total / count) if count else None


def _first(codes: NDArray, values: NDArray, num: int) -> NDArray:
    """A value per code, where all rows of a code share one."""
    found, index = np.unique(codes, return_index=True)
    assert len(found) == num
    return values[index]
