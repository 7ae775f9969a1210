"""Selection of pairs and standalone tiles under class caps: deterministic, stable, no I/O (MAD paper, Table 2).

Tiles are ranked by a hash of (seed, tile id): a tile's rank depends on nothing else, so adding a slide adds its tiles to
the ranking and reshuffles nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pandas as pd

from mad.config.model import CohortConfig
from mad.tiles.pyramid import Ladder

COLUMNS = ["tile_id", "kind", "role", "sample_id", "position", "split", "label", "rank"]
UNLABELLED = "Unlabelled"


def hash_rank(tile_ids: pd.Series, seed: int) -> np.ndarray:
    """A number in [0, 2^63) per tile id, from BLAKE2b keyed by the seed: int64 [n]."""
    key = str(seed).encode()
    ranks = [int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8, key=key).digest(), "big") >> 1 for t in tile_ids]
    return np.array(ranks, np.int64)


def block_split(position: np.ndarray, count: int, fractions: Mapping[str, float], guard: int) -> np.ndarray:
    """Split per coarsest tile by its row or column: contiguous blocks in the order train, val, test.

    Args:
        position: row or column of each coarsest tile.
        count: rows or columns that lie wholly inside the slide.
        fractions: share of each split; `guard` rows or columns between two splits belong to none (None).
    """
    used = [name for name in ("train", "val", "test") if fractions[name] > 0]
    free = count - guard * (len(used) - 1)
    ends = np.floor(np.cumsum([fractions[name] for name in used]) * free + 0.5).astype(int)
    out = np.full(len(position), None, object)
    start = 0
    for number, name in enumerate(used):
        shift = number * guard
        out[(position >= start + shift) & (position < ends[number] + shift)] = name
        start = ends[number]
    return out


def tile_splits(table: pd.DataFrame, cohort: CohortConfig, split: str | None) -> np.ndarray:
    """The split of every tile of a slide: its patient's, or with `split_by: block` (`split` None) that of its block.

    Args:
        table: columns i, j, status and parent_id of the slide's tile table, whole.

    Returns:
        "train", "val", "test" or None per tile; tiles in the guard between two blocks have none.
    """
    if split is not None or table.empty:
        return np.full(len(table), split, object)
    whole = table[(table["status"] != "edge") & table["parent_id"].isna()]
    rows, columns = (whole if len(whole) else table)[["i", "j"]].max() + 1
    axis = {"x": "j", "y": "i", "auto": "j" if columns >= rows else "i"}[cohort.block_axis]
    count = int(columns if axis == "j" else rows)
    return block_split(table[axis].to_numpy(np.int64), count, cohort.split.model_dump(), cohort.block_guard)


def candidates(
    table: pd.DataFrame, ladder: Ladder, *, seed: int, background: str | None, background_pairs: bool
) -> pd.DataFrame:
    """What may be selected from one slide's tile table: one row per possible sample, with its rank.

    A pair needs a parent with enough tissue and all of its children inside the slide (a child may be blank); parents of
    class `background` make pairs only with `background_pairs`. A standalone tile has enough tissue, or is background.
    `table` needs the columns of a tile table and `split`; tiles without a split are left out.
    """
    table = table[table["split"].notna()]
    level = table["tile_id"].str.extract(r"_L(\d+)_[\d_]+$")[0].astype("int64")
    label = table["label"].fillna(UNLABELLED)
    ok = table["status"] == "ok"
    is_background = label == (background or "")
    inside = table["status"] != "edge"
    children = table[inside].groupby("parent_id").size()
    parts = []
    for number in range(len(ladder)):
        here = level == number
        alone = here & (ok | (inside & is_background))
        parts.append(table[alone].assign(kind=ladder.name(number), label=label[alone]))
        if number < len(ladder) - 1:
            full = table["tile_id"].map(children).fillna(0) == ladder.steps[number] ** 2
            pair = here & ok & full & (background_pairs | ~is_background)
            parts.append(table[pair].assign(kind=ladder.transition(number), label=label[pair]))
    found = pd.concat(parts, ignore_index=True)[["tile_id", "kind", "split", "label"]]
    return found.assign(rank=hash_rank(found["tile_id"], seed))


def under_caps(
    found: pd.DataFrame, caps: Mapping[str, int | None], max_unlabelled: int | None, test_share: float
) -> pd.DataFrame:
    """The best-ranked candidates of the whole cohort, at most `caps[kind]` per kind, class and split.

    A kind that `caps` does not name, or names with None, has no cap. `val` and `test` have `test_share` times the cap.
    """
    found = found.sort_values(["kind", "split", "label", "rank", "tile_id"], ignore_index=True)
    place = found.groupby(["kind", "split", "label"]).cumcount()
    cap = (
        found["kind"]
        .map({kind: np.inf if cap is None else cap for kind, cap in caps.items()})
        .fillna(np.inf)
        .astype(float)
    )
    cap = cap.where(found["label"] != UNLABELLED, np.inf if max_unlabelled is None else max_unlabelled)
    cap = cap.where(found["split"] == "train", np.ceil((cap * test_share).round(9)))
    return found[place < cap]


def expand(selected: pd.DataFrame, table: pd.DataFrame, ladder: Ladder) -> pd.DataFrame:
    """One row per tile of each selected sample of a slide: a pair's parent and its children in row-major order.

    Returns:
        COLUMNS, sorted by kind, split and the tile table's own order; `sample_id` is the parent's (or the tile's own) id,
        `position` the child's number, -1 for parents and standalone tiles; `label` is the sample's.
    """
    order = pd.Series(np.arange(len(table)), index=table["tile_id"])
    transitions = {ladder.transition(number) for number in range(len(ladder) - 1)}
    heads = selected.assign(sample_id=selected["tile_id"], position=-1)
    is_pair = heads["kind"].isin(transitions)
    heads["role"] = np.where(is_pair, "parent", "standalone")
    family = table.loc[table["status"] != "edge", ["tile_id", "parent_id"]].rename(columns={"tile_id": "child_id"})
    children = heads[is_pair].merge(family, left_on="tile_id", right_on="parent_id", how="inner")
    children["position"] = children["child_id"].str.rsplit("_", n=1).str[-1].astype("int64")
    children = children.assign(tile_id=children["child_id"], role="child")
    rows = pd.concat([heads[COLUMNS], children[COLUMNS]], ignore_index=True)
    rows["order"] = rows["sample_id"].map(order)
    rows = rows.sort_values(["kind", "split", "order", "position"], ignore_index=True)[COLUMNS]
    text = dict.fromkeys(("tile_id", "kind", "role", "sample_id", "split", "label"), "string")
    return rows.astype({**text, "position": "int16", "rank": "int64"})
