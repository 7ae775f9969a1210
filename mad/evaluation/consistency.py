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
from mad.evaluation.data import Embedded, NotApplicableError, class_counts, kind_of, plain
from mad.metrics.cosine import PairSums, pair_sums
from mad.metrics.pca import fit_pca
from mad.metrics.retrieval import retrieval_at_1

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
    "interval": "patients are resampled; pairs of two patients weigh by both draws, pairs within one by its draw",
}


def evaluate_consistency(data: Embedded, config: EvaluationConfig, *, seed: int) -> dict[str, Any]:
    """All of Table 4 for one encoder.

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
    patients = plain_buckets.num_patients
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
        "cosine": plain_buckets.report(),
        "centred": measure(shared, shared).report(),
        "centred_each": measure(means[0], means[1]).report(),
        "retrieval": _retrieval(parents, children, parent_of, slide[parent_rows], slide[child_rows]),
        "bootstrap": patient_intervals(
            plain_buckets.statistics,
            patients,
            resamples=config.bootstrap_resamples,
            min_patients=config.min_patients,
            seed=seed,
        ),
    }
    return plain(result)


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
        slides = weights[:, self.patient]  # [r, S]
        pos = _ratio(
            slides @ np.einsum("satb->s", self.aligned_sum),
            slides @ np.einsum("satb->s", self.aligned_count).astype(float),
        )
        means = {}
        for name, mask in (("same", self.same_class), ("diff", ~self.same_class)):
            total, count = (np.einsum("satb,ab->st", part, mask) for part in (self.other_sum, self.other_count))
            means[name] = _ratio(self._weighted(slides, total), self._weighted(slides, count.astype(float)))
        return {
            "s_pos": pos,
            "s_neg_same": means["same"],
            "s_neg_diff": means["diff"],
            "delta_hier": pos - means["same"],
            "delta_sem": means["same"] - means["diff"],
        }

    def _weighted(self, slides: Floats, table: Floats) -> Floats:
        """Sum of a [S, S] table, pairs of two patients weighed by both, pairs within a patient by that patient once."""
        across = np.einsum("rs,st,rt->r", slides, np.where(self.within, 0.0, table), slides, optimize=True)
        return across + slides @ np.where(self.within, table, 0.0).sum(1)

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
        pos = _ratio(np.einsum("satb->a", self.aligned_sum), np.einsum("satb->a", self.aligned_count))
        means = []
        for mask in (self.same_class, ~self.same_class):
            total, count = (
                np.einsum("satb,st,ab->a", part, slides, mask) for part in (self.other_sum, self.other_count)
            )
            means.append(_ratio(total, count))
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


def _retrieval(
    parents: NDArray, children: NDArray, parent_of: NDArray, parent_slide: NDArray, child_slide: NDArray
) -> dict[str, Any]:
    """Retrieval@1 within slides, both ways, with the chance level of the same tiles; slides of one parent are left out."""
    results: dict[str, list[Floats]] = {"child_to_parent": [], "parent_to_child": []}
    own = np.arange(len(parents))
    for slide in np.unique(parent_slide):
        mine, theirs = np.flatnonzero(parent_slide == slide), np.flatnonzero(child_slide == slide)
        if len(mine) < 2:
            continue
        results["child_to_parent"].append(
            np.stack(retrieval_at_1(children[theirs], parents[mine], parent_of[theirs], own[mine]))
        )
        results["parent_to_child"].append(
            np.stack(retrieval_at_1(parents[mine], children[theirs], own[mine], parent_of[theirs]))
        )
    report = {}
    for way, parts in results.items():
        hits, chance = np.concatenate(parts, axis=1).mean(1) if parts else (None, None)
        report[way] = {"at_1": hits, "chance": chance, "queries": sum(part.shape[1] for part in parts)}
    return report


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


def _ratio(total: Floats, count: NDArray) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, total / count, np.nan)


def _first(codes: NDArray, values: NDArray, num: int) -> NDArray:
    """A value per code, where all rows of a code share one."""
    found, index = np.unique(codes, return_index=True)
    assert len(found) == num
    return values[index]
