"""Selection of pairs and standalone tiles under class caps: deterministic, stable, no I/O (MAD paper, Table 2).

Tiles are ranked by a hash of (seed, tile id): a tile's rank depends on nothing else, so adding a slide adds its tiles to
the ranking and reshuffles nobody. A cap is a limit of rank: the cohort passes once, slide by slide, to find the limits
(`Limits.add`), and then each slide's selection follows from its own tiles and the limits (`Limits.select`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from mad.config.model import CohortConfig
from mad.tiles.pyramid import Ladder

COLUMNS = ["tile_id", "kind", "role", "sample_id", "position", "split", "label", "rank"]
GROUP = ["kind", "split", "label"]
UNLABELLED = "Unlabelled"
NO_LIMIT = np.iinfo(np.int64).max


def hash_rank(tile_ids: Iterable[str], seed: int) -> np.ndarray:
    """A number in [0, 2^63) per tile id, from BLAKE2b keyed by the seed: int64 [n]."""
    keyed = hashlib.blake2b(digest_size=8, key=str(seed).encode())
    digests = []
    for tile_id in tile_ids:
        one = keyed.copy()  # the key is hashed once, not once per tile
        one.update(tile_id.encode())
        digests.append(one.digest())
    return (np.frombuffer(b"".join(digests), ">u8") >> np.uint64(1)).astype(np.int64)


def block_split(position: np.ndarray, count: int, fractions: Mapping[str, float], guard: int) -> np.ndarray:
    """Split per coarsest tile by its row or column: contiguous blocks in the order train, val, test.

    Args:
        position: row or column of each coarsest tile; one that the border cuts off goes with the last whole one, and so do the
            finer tiles inside it that are whole.
        count: rows or columns that lie wholly inside the slide.
        fractions: share of each split; `guard` rows or columns between two splits belong to none (None).
    """
    used = [name for name in ("train", "val", "test") if fractions[name] > 0]
    position = np.minimum(position, count - 1)
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
    axis, count = _block_axis(int(rows), int(columns), cohort)
    return block_split(table[axis].to_numpy(np.int64), count, cohort.split.model_dump(), cohort.block_guard)


def block_shares(rows: int, columns: int, cohort: CohortConfig) -> dict[str, float]:
    """The share of a slide of `rows` x `columns` whole coarsest tiles that `split_by: block` gives each split, without guards."""
    _, count = _block_axis(rows, columns, cohort)
    fractions = cohort.split.model_dump()
    split = block_split(np.arange(count), count, fractions, cohort.block_guard)
    return {name: float((split == name).mean()) for name in fractions}


def _block_axis(rows: int, columns: int, cohort: CohortConfig) -> tuple[str, int]:
    """What a slide is cut along, "i" (from row to row) or "j", and how many whole coarsest tiles it has there."""
    axis = {"x": "j", "y": "i", "auto": "j" if columns >= rows else "i"}[cohort.block_axis]
    return axis, columns if axis == "j" else rows


def tile_levels(table: pd.DataFrame) -> np.ndarray:
    """Place of every tile on the ladder, 0 the coarsest: as many as it has digits beyond (i, j)."""
    return (table["k"].notna().to_numpy().astype(np.int64)) + table["m"].notna().to_numpy()


def first_children(table: pd.DataFrame, ladder: Ladder) -> np.ndarray:
    """Row of the first child of each tile whose s² children all lie inside the slide, -1 of every other: int64 [n].

    `table` is a whole tile table in its own order, by (level, i, j, k, m): the other children follow the first.
    """
    level = tile_levels(table)
    inside = (table["status"] != "edge").to_numpy()
    digits = [table[name].fillna(0).to_numpy(np.int64) for name in ("i", "j", "k", "m")]
    first = np.full(len(table), -1, np.int64)
    for number, step in enumerate(ladder.steps):
        # One integer per tile of this level, and per tile of the next one that of its parent.
        code = np.ravel_multi_index(digits[: 2 + number], [int(d.max(initial=0)) + 1 for d in digits[: 2 + number]])
        child = np.flatnonzero((level == number + 1) & inside)
        parent, start, count = np.unique(code[child], return_index=True, return_counts=True)
        full = count == step**2
        here = np.flatnonzero(level == number)
        place = np.searchsorted(parent[full], code[here])
        known = place < full.sum()
        known[known] = parent[full][place[known]] == code[here][known]
        first[here[known]] = child[start[full]][place[known]]
    return first


def candidates(
    table: pd.DataFrame, ladder: Ladder, *, seed: int, background: str | None, background_pairs: bool
) -> pd.DataFrame:
    """What may be selected from one slide's tile table: one row per possible sample, with its rank.

    A pair needs a parent with enough tissue and all of its children inside the slide (a child may be blank); parents of
    class `background` make pairs only with `background_pairs`. A standalone tile has enough tissue, or is background; it
    may be part of a pair as well, since the paper draws standalone tiles "independently". Tiles without a split are left
    out.

    Args:
        table: columns tile_id, i, j, k, m, label, status and split of the slide's tile table, whole and in its order.

    Returns:
        Columns row (of `table`), first (row of the first child; -1 for standalone tiles), kind, split, label and rank.
    """
    level, first = tile_levels(table), first_children(table, ladder)
    label = table["label"].fillna(UNLABELLED).astype("category")
    ok, inside = (table["status"] == "ok").to_numpy(), (table["status"] != "edge").to_numpy()
    is_background = (label == (background or "")).to_numpy()
    usable = table["split"].notna().to_numpy()
    alone = usable & (ok | (inside & is_background))
    pair = usable & ok & (first >= 0) & (background_pairs | ~is_background)
    either = np.flatnonzero(alone | pair)
    rank = np.zeros(len(table), np.int64)
    rank[either] = hash_rank(table["tile_id"].iloc[either].tolist(), seed)
    kinds = [ladder.name(n) for n in range(len(ladder))] + [ladder.transition(n) for n in range(len(ladder) - 1)]
    row = np.concatenate([np.flatnonzero(alone), np.flatnonzero(pair)])
    kind = level[row] + np.repeat([0, len(ladder)], [alone.sum(), pair.sum()])
    return pd.DataFrame(
        {
            "row": row.astype(np.int32),
            "first": np.where(kind < len(ladder), -1, first[row]).astype(np.int32),
            "kind": pd.Categorical.from_codes(kind, kinds).reorder_categories(sorted(kinds)),
            "split": table["split"].astype("category").array[row],
            "label": label.array[row],
            "rank": rank[row],
        }
    )


@dataclass
class Best:
    """The `cap` smallest of the ranks that were added."""

    cap: int
    ranks: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    limit: int = NO_LIMIT
    """No rank above it is among them."""

    def add(self, ranks: np.ndarray) -> None:
        """Take the ranks in; memory stays within twice the cap and one slide's."""
        self.ranks = np.concatenate([self.ranks, ranks[ranks <= self.limit]])
        if len(self.ranks) > 2 * self.cap:
            self.prune()

    def prune(self) -> None:
        """Drop what is beyond the cap."""
        if len(self.ranks) > self.cap:
            self.ranks = np.partition(self.ranks, self.cap)[: self.cap]
            self.limit = int(self.ranks.max(initial=-1))


@dataclass(frozen=True)
class Caps:
    """How many samples of one kind, split and class the cohort gives."""

    kinds: Mapping[str, int | Mapping[str, int | None] | None]
    """Per kind, or per kind and class; one that is not named, or is None, has no cap."""
    unlabelled: int | None = None
    """Of class UNLABELLED, whatever the kind."""
    test_share: float = 1.0
    """Caps of val and test as a multiple of the training's."""

    def cap(self, kind: str, split: str, label: str) -> int | None:
        """The cap of one group, None for none."""
        cap = self.kinds.get(kind)
        if label == UNLABELLED:
            cap = self.unlabelled
        elif isinstance(cap, Mapping):
            cap = cap.get(label)
        return cap if cap is None or split == "train" else int(np.ceil(round(cap * self.test_share, 9)))


@dataclass
class Limits:
    """The largest rank that each (kind, split, class) still takes: what `add` has seen of the cohort decides.

    Two tiles of the same rank (never seen: ranks have 63 bits) are both taken where they fall on a limit.
    """

    caps: Caps
    best: dict[tuple[str, str, str], Best] = field(default_factory=dict)

    def add(self, found: pd.DataFrame) -> pd.DataFrame:
        """Take in one slide's `candidates`; returns those that may still be selected when the cohort is through."""
        return self._within(found, Best.add)

    def select(self, found: pd.DataFrame) -> pd.DataFrame:
        """The selected ones among a slide's candidates, once every slide of the cohort has been added."""
        return self._within(found, lambda best, _: best.prune())

    def _within(self, found: pd.DataFrame, step: Callable[[Best, np.ndarray], None]) -> pd.DataFrame:
        """The candidates within the limits, each limit after its `step`."""
        rank, keep = found["rank"].to_numpy(), np.ones(len(found), bool)
        for group, rows in found.groupby(GROUP, observed=True).indices.items():
            if group not in self.best and (cap := self.caps.cap(*group)) is not None:
                self.best[group] = Best(cap)
            if best := self.best.get(group):
                step(best, rank[rows])
                keep[rows] = rank[rows] <= best.limit
        return found[keep]


def expand(selected: pd.DataFrame, tile_ids: pd.Series, ladder: Ladder) -> pd.DataFrame:
    """One row per tile of each selected sample of a slide: a pair's parent and its children in row-major order.

    Args:
        selected: rows of the slide's `candidates`.
        tile_ids: of the slide's tile table, in its order.

    Returns:
        COLUMNS, sorted by kind, split and the tile table's own order; `sample_id` is the parent's (or the tile's own) id,
        `position` the child's number, -1 for parents and standalone tiles; `label` is the sample's.
    """
    children = {ladder.transition(number): step**2 for number, step in enumerate(ladder.steps)}
    heads = selected.sort_values([*GROUP[:2], "row"]).astype(dict.fromkeys(GROUP, "string"))
    num_children = heads["kind"].map(children).fillna(0).to_numpy(np.int64)
    rows = heads.iloc[np.repeat(np.arange(len(heads)), num_children + 1)].reset_index(drop=True)
    start = np.cumsum(num_children + 1) - num_children
    position = np.arange(len(rows)) - np.repeat(start, num_children + 1)
    own, child = rows["row"].to_numpy(np.int64), rows["first"].to_numpy(np.int64) + position
    head = np.where(rows["first"] < 0, "standalone", "parent")
    table = rows.assign(
        tile_id=tile_ids.take(np.where(position < 0, own, child)).array,
        role=pd.array(np.where(position < 0, head, "child"), "string"),
        sample_id=tile_ids.take(own).array,
        position=position.astype(np.int16),
    )
    return table[COLUMNS]
