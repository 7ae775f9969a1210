"""Do held-out patients' parents find their children, and does a classifier of one magnification know the other? Few figures, quick.

For choices, hence for the validation patients; the test patients belong to the protocols of stage `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mad.evaluation.data import Embedded
from mad.evaluation.label_free import ranks, retrieval_report, retrieval_sums
from mad.metrics.confusion import class_dice, confusion_matrix, macro
from mad.metrics.cosine import pair_sums
from mad.metrics.knn import knn_predict

Rows = NDArray[np.int64]
Embed = Callable[[Rows], NDArray]
"""Embeddings [n, d] of rows [n] of `Embedded.tiles`."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Aligned pairs of one transition and split, as rows of `Embedded.tiles`."""

    kind: str
    parents: Rows
    """[p], each once."""
    children: Rows
    """[c]"""
    parent_of: Rows
    """[c], places in `parents`."""
    slide: Rows
    """[rows of the tiles], slide codes 0 … S - 1 of the slides that have pairs."""


def held_out_pairs(data: Embedded, split: str, *, most: int = 2000, seed: int = 0) -> HeldOut | None:
    """The pairs of the finest transition that has some in this split, of a draw of `most` parents where there are more."""
    pairs = data.pairs[data.tiles["split"].to_numpy()[data.pairs["parent"]] == split]
    if not len(pairs):
        return None
    kind = max(pairs["kind"].unique(), key=lambda name: float(str(name).split("x-")[0]))
    pairs = pairs[pairs["kind"] == kind]
    parents = np.unique(pairs["parent"].to_numpy(np.int64))
    if len(parents) > most:
        parents = np.sort(np.random.default_rng(seed).choice(parents, most, replace=False))
        pairs = pairs[pairs["parent"].isin(parents)]
    names, slide = np.unique(data.tiles["slide_id"].to_numpy(str), return_inverse=True)
    used = np.unique(slide[parents])
    code = np.full(len(names), -1)
    code[used] = np.arange(len(used))
    return HeldOut(
        kind=str(kind),
        parents=parents,
        children=pairs["child"].to_numpy(np.int64),
        parent_of=np.searchsorted(parents, pairs["parent"].to_numpy()),
        slide=code[slide],
    )


def pair_figures(held: HeldOut, embed: Embed, *, seed: int = 0) -> dict[str, Any]:
    """Figures of the pairs, each within its slide, without labels.

    Returns:
        `pair_cosine_gap`: mean cosine of a parent with its own children minus that with the other children of its slide;
        `child_to_parent` and `parent_to_child`: retrieval@1, and `…_chance`; `rankme_coarse` and `rankme_fine`; the number of
        `parents`. What does not exist is NaN or None.
    """
    parents, children = embed(held.parents), embed(held.children)
    slides = held.slide[held.parents], held.slide[held.children]
    count = int(slides[0].max()) + 1
    sums = pair_sums(parents, children, held.parent_of, slides, count)
    own = sums.aligned_sum.sum() / max(sums.aligned_count.sum(), 1)
    total, others = (part.sum() for part in sums.others())
    found = retrieval_report(retrieval_sums(parents, children, held.parent_of, *slides, count))
    rank = ranks(parents, children, seed=seed)
    return {
        "pair_cosine_gap": float(own - total / others) if others else None,
        **{way: rates["at_1"] for way, rates in found.items()},
        **{f"{way}_chance": rates["chance"] for way, rates in found.items()},
        **{f"rankme_{side}": value for side, value in rank.items()},
        "parents": len(parents),
    }


def transfer_figures(
    data: Embedded, kind: str, split: str, embed: Embed, *, most: int = 5000, seed: int = 0
) -> dict[str, float | None]:
    """Macro F1 of 20-NN classification of a split's tiles by training tiles: within each magnification, and coarse to fine.

    Returns:
        `knn_coarse`, `knn_fine` and `knn_coarse_to_fine`; None where labels are missing. At most `most` tiles of each kind are
        drawn.
    """
    coarse, fine = (float(name.removesuffix("x")) for name in kind.split("-"))

    def draw(side: str, magnification: float) -> Rows:
        rows = data.rows(side, magnification)
        return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False)) if len(rows) > most else rows

    rows = {(side, at): draw(side, at) for side in ("train", split) for at in (coarse, fine)}
    vectors = {key: embed(part) for key, part in rows.items()}

    def score(bank: tuple[str, float], asked: tuple[str, float]) -> float | None:
        if not len(rows[bank]) or not len(rows[asked]):
            return None
        classes = len(data.classes)
        predicted = knn_predict(vectors[bank], data.codes[rows[bank]], vectors[asked], num_classes=classes)[0]
        return float(macro(class_dice(confusion_matrix(data.codes[rows[asked]], predicted, classes))))

    return {
        "knn_coarse": score(("train", coarse), (split, coarse)),
        "knn_fine": score(("train", fine), (split, fine)),
        "knn_coarse_to_fine": score(("train", coarse), (split, fine)),
    }
