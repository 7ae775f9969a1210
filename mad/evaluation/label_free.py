"""What needs no label: retrieval within slides, RankMe, and one row per slide, a smoke check of an encoder on new slides."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mad.evaluation.by_patient import ratio
from mad.metrics.rankme import rankme
from mad.metrics.retrieval import retrieval_at_1

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
    """Retrieval@1 within slides, both ways: hits, the hits that chance has, and queries of each slide [3, S].

    Slides of one parent ask nothing.
    """
    sums = {way: np.zeros((3, num_slides)) for way in ("child_to_parent", "parent_to_child")}
    own = np.arange(len(parents))
    for slide in np.unique(parent_slide):
        mine, theirs = np.flatnonzero(parent_slide == slide), np.flatnonzero(child_slide == slide)
        if len(mine) < 2:
            continue
        up = retrieval_at_1(children[theirs], parents[mine], parent_of[theirs], own[mine])
        down = retrieval_at_1(parents[mine], children[theirs], own[mine], parent_of[theirs])
        sums["child_to_parent"][:, slide] = up[0].sum(), up[1].sum(), len(theirs)
        sums["parent_to_child"][:, slide] = down[0].sum(), down[1].sum(), len(mine)
    return sums


def retrieval_report(sums: dict[str, Floats]) -> dict[str, Any]:
    """Rates of sums [3, S]; null where nothing was asked."""
    report = {}
    for way, (hits, chance, queries) in sums.items():
        total = int(queries.sum())
        rates = (float(hits.sum() / total), float(chance.sum() / total)) if total else (None, None)
        report[way] = {"at_1": rates[0], "chance": rates[1], "queries": total}
    return report


def ranks(parents: NDArray, children: NDArray, *, seed: int) -> dict[str, float]:
    """RankMe of each magnification, of a draw of `RANKME_TILES` where there are more."""
    found = {}
    for side, rows in (("coarse", parents), ("fine", children)):
        if len(rows) > RANKME_TILES:
            rows = rows[np.sort(np.random.default_rng(seed).choice(len(rows), RANKME_TILES, replace=False))]
        found[side] = rankme(rows)
    return found


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
