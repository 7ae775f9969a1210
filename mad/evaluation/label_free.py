"""What needs no label: retrieval within slides, RankMe, and one row per slide, a smoke check of an encoder on new slides."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mad.evaluation.by_patient import ratio
from mad.metrics.rankme import rankme
from mad.metrics.retrieval import retrieval_at

Floats = NDArray[np.float64]
RANKME_TILES = 25_600
"""Tiles that RankMe is computed on, where there are more (the paper's own number)."""


def retrieval_sums(
    parents: NDArray,
    children: NDArray,
    parent_of: NDArray,
    parent_slide: NDArray,
    child_slide: NDArray,
    num_slides: int,
) -> dict[str, Floats]:
    """Retrieval within slides, both ways: of each slide [5, S] the hits at 1, those that chance has, the queries, and the hits
    at 5 and chance's.

    Slides of one parent ask nothing.
    """
    sums = {way: np.zeros((5, num_slides)) for way in ("child_to_parent", "parent_to_child")}
    own = np.arange(len(parents))
    for slide in np.unique(parent_slide):
        mine, theirs = np.flatnonzero(parent_slide == slide), np.flatnonzero(child_slide == slide)
        if len(mine) < 2:
            continue
        up = retrieval_at(children[theirs], parents[mine], parent_of[theirs], own[mine])
        down = retrieval_at(parents[mine], children[theirs], own[mine], parent_of[theirs])
        for way, (hits, chance), queries in (("child_to_parent", up, theirs), ("parent_to_child", down, mine)):
            (at_1, at_5), (by_chance, by_chance_at_5) = hits.sum(1), chance.sum(1)
            sums[way][:, slide] = at_1, by_chance, len(queries), at_5, by_chance_at_5
    return sums


def retrieval_report(sums: dict[str, Floats]) -> dict[str, Any]:
    """Rates of sums [5, S]; null where nothing was asked."""
    report = {}
    for way, part in sums.items():
        at_1, chance, queries, at_5, chance_at_5 = part.sum(1)
        rates = {"at_1": at_1, "chance": chance, "at_5": at_5, "chance_at_5": chance_at_5}
        report[way] = {name: float(hits / queries) if queries else None for name, hits in rates.items()}
        report[way]["queries"] = int(queries)
    return report


def ranks(parents: NDArray, children: NDArray, *, seed: int) -> dict[str, float]:
    """RankMe of each side of the pairs."""
    return {"coarse": rank_of(parents, seed=seed), "fine": rank_of(children, seed=seed)}


def rank_of(features: NDArray, *, seed: int) -> float:
    """RankMe of features [n, d], of a draw of `RANKME_TILES` where there are more."""
    if len(features) > RANKME_TILES:
        features = features[np.sort(np.random.default_rng(seed).choice(len(features), RANKME_TILES, replace=False))]
    return rankme(features)


def slide_rows(
    names: NDArray,
    sums: dict[str, Floats],
    retrieval: dict[str, Floats],
    parents: NDArray,
    children: NDArray,
    parent_slide: NDArray,
    child_slide: NDArray,
    *,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Slide -> S_pos, S_neg and delta_hier among its own tiles whatever their class, retrieval@1, RankMe; NaN without pairs.

    Args:
        names: of the slides [S].
        sums: `aligned` and `other` pairs within each slide [2, S]: sum of cosines, number.
        retrieval: `retrieval_sums`.
        parents: [p, d].
        children: [c, d].
        parent_slide: [p].
        child_slide: [c].
        seed: of the draw for RankMe.
    """
    rows = {}
    for place, name in enumerate(names):
        s_pos, s_neg = (float(ratio(*sums[kind][:, place])) for kind in ("aligned", "other"))  # NaN without pairs
        mine, theirs = parents[parent_slide == place], children[child_slide == place]
        rows[str(name)] = {
            "parents": len(mine),
            "children": len(theirs),
            "s_pos": s_pos,
            "s_neg": s_neg,
            "delta_hier": s_pos - s_neg,
            "retrieval": retrieval_report({way: part[:, [place]] for way, part in retrieval.items()}),
            "rankme": ranks(mine, theirs, seed=seed),
        }
    return rows


def slide_lines(rows: dict[str, dict[str, Any]], most: int = 20) -> list[str]:
    """The first slides of `slide_rows` as text, of their JSON form: null for NaN."""

    def text(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    lines = []
    for name, row in list(rows.items())[:most]:
        up, down = (row["retrieval"][way] for way in ("child_to_parent", "parent_to_child"))
        lines.append(
            f"slide {name}, {row['parents']} parents: S_pos {text(row['s_pos'], '.3f')}, S_neg {text(row['s_neg'], '.3f')}, "
            f"delta_hier {text(row['delta_hier'], '.3f')}; retrieval@1 child to parent {text(up['at_1'], '.1%')}, parent to child "
            f"{text(down['at_1'], '.1%')}, chance {text(up['chance'], '.1%')}; RankMe {row['rankme']['coarse']:.1f} coarse, "
            f"{row['rankme']['fine']:.1f} fine"
        )
    return lines
