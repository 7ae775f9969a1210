"""Table 4 of the MAD paper: is a parent closer to its own children than to other tiles, of its class and of others?

S_pos is the mean cosine of aligned parent and child; S_neg_same and S_neg_diff are means over ALL non-aligned pairs of the
same and of different classes, exact, without sampling. delta_hier = S_pos - S_neg_same, delta_sem = S_neg_same - S_neg_diff.
Beside the paper's numbers: the negatives of the same slide and of other patients apart, class averages, variants without
the shared offset of an embedding, retrieval among the tiles of one slide, and intervals over the test patients; and all of this
again for grandparents and grandchildren (2.5x and 40x), which are joined by way of the magnification between them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.by_patient import Sums
from mad.evaluation.data import Embedded, NotApplicableError, kind_of, plain
from mad.evaluation.label_free import ranks, slide_rows
from mad.evaluation.pair_means import measure, pairs_of

RULES = {
    "tiles": "test pairs; parents and children without a label are left out (where nothing is labelled: all, as one class)",
    "positive": "an aligned pair is always a positive: a child that bears another class than its parent is no negative of it",
    "negatives": "all non-aligned pairs of a parent and a child of the test split; `same_slide`: of one slide; "
    "`other_patient`: of two patients",
    "pair_average": "every pair weighs the same (the paper's columns)",
    "class_average": "mean over the classes of the parent of each class's own mean",
    "centred": "cosines after one shared mean is subtracted: the midpoint of the parents' and the children's mean embedding",
    "centred_each": "cosines after each magnification's own mean is subtracted",
    "retrieval": "child -> the parents of its slide, parent -> the children of its slide: is an own one the nearest (at_1), among "
    "the five nearest (at_5); ties count by expectation; chance: as many drawn at random",
    "transitivity": "the same of grandparents and the grandchildren inside them that are children of Table 4's pairs; no run was "
    "trained on these two magnifications as a pair unless its own settings say so",
    "rankme": "effective rank of the embeddings of the same parents and of the same children, not centred",
    "slides": "each test slide alone, whatever the classes of its tiles",
    "interval": "patients are resampled; pairs of two patients weigh by both draws, pairs within one by its draw",
}


def evaluate_consistency(data: Embedded, config: EvaluationConfig, *, seed: int) -> dict[str, Any]:
    """All of Table 4 for one encoder; under `by_patient`, as arrays, the sums that `mad.evaluation.by_patient` reads.

    Raises:
        NotApplicableError: no pairs of the wanted transition in the test split.
    """
    table, labelled = test_pairs(data, config.transition)
    pairs = pairs_of(data, table, labelled=labelled)
    patients = np.unique(pairs.patient_of_slide)
    report, sums, by_slide = measure(pairs, patients, config, seed=seed)
    slides = slide_rows(
        pairs.slides, by_slide["cosine"], by_slide["retrieval"], pairs.parents, pairs.children,
        pairs.parent_slide, pairs.child_slide, seed=seed,
    )  # fmt: skip
    grand, grand_sums = _transitivity(data, table, labelled, patients, config, seed=seed)
    result = {
        "rules": RULES,
        "classes": pairs.classes,
        "transition": kind_of(*config.transition),
        "labelled": labelled,
        **report,
        "rankme": ranks(pairs.parents, pairs.children, seed=seed),
        "slides": slides,
        "transitivity": grand,
    }
    return plain(result) | {"by_patient": {"patients": patients, **sums, **grand_sums}}


def _transitivity(
    data: Embedded, table: pd.DataFrame, labelled: bool, patients: Any, config: EvaluationConfig, *, seed: int
) -> tuple[dict[str, Any], Sums]:
    """What `measure` reports of the grandparents of a table of pairs, and its sums, their names after "transitivity "."""
    found = grandparents(data, table, labelled)
    if found is None:
        coarse = config.transition[0]
        return {
            "status": "not applicable",
            "reason": f"no parent of the test pairs is a child at {coarse:g}x of another pair",
        }, {}
    transition, chain = found
    report, sums, _ = measure(pairs_of(data, chain, labelled=labelled), patients, config, seed=seed)
    sums = {f"transitivity {name}": values for name, values in sums.items()}
    return {"status": "ok", "reason": None, "transition": transition} | report, sums


def grandparents(data: Embedded, table: pd.DataFrame, labelled: bool) -> tuple[str, pd.DataFrame] | None:
    """Pairs (parent, child) of the parents' parents and the children, from the coarsest magnification that has any.

    Args:
        data: the tiles.
        table: test pairs (parent, child).
        labelled: whether a grandparent needs a label.

    Returns:
        Name of the transition ("2.5x-40x") and the pairs; None where no parent is a child itself.
    """
    magnification = data.tiles["magnification"].to_numpy(float)
    above = data.pairs[["parent", "child"]].rename(columns={"parent": "grandparent", "child": "parent"})
    chain = table[["parent", "child"]].merge(above.drop_duplicates(), on="parent")
    chain = chain[(data.tiles["split"].to_numpy()[chain["grandparent"]] == "test")]
    if labelled:
        chain = chain[data.codes[chain["grandparent"]] >= 0]
    if not len(chain):
        return None
    scale = magnification[chain["grandparent"]]
    chain = chain[scale == scale.min()]
    pairs = pd.DataFrame({"parent": chain["grandparent"].to_numpy(), "child": chain["child"].to_numpy()})
    return kind_of(float(scale.min()), float(magnification[pairs["child"].iloc[0]])), pairs


def test_pairs(data: Embedded, transition: tuple[float, float]) -> tuple[pd.DataFrame, bool]:
    """Test pairs of a transition whose both tiles are labelled, or all of them where no label exists; and which it is."""
    kind = kind_of(*transition)
    pairs = data.pairs[data.pairs["kind"] == kind]
    pairs = pairs[data.tiles["split"].to_numpy()[pairs["parent"]] == "test"]
    if not len(pairs):
        raise NotApplicableError(f"the test split has no {kind} pairs")
    known = (data.codes[pairs["parent"]] >= 0) & (data.codes[pairs["child"]] >= 0)
    return (pairs[known], True) if known.any() else (pairs, False)
