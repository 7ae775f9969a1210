"""What the shards offer to training: the index of one split's pairs and standalone tiles.

Read from `shard/{slide}.parquet`; members of the tars are read by offset, so that any sample can be had at any time. A cohort
has tens of millions of rows: no column holds Python objects, and nothing makes any of a whole column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mad.config.kinds import STANDALONE
from mad.files import MadError, Pathlike

TEXT, NAME = pa.large_string(), pa.dictionary(pa.int32(), pa.large_string())
NAMES = ["kind", "role", "split", "shard", "status", "slide"]
SCHEMA = pa.schema(
    {
        "tile_id": TEXT, "kind": NAME, "role": NAME, "sample_id": TEXT, "position": pa.int16(), "split": NAME,
        "magnification": pa.float64(), "shard": NAME, "offset": pa.int64(), "size": pa.int64(), "sha256": TEXT, "status": NAME,
        "slide": NAME,
    }
)  # fmt: skip
COLUMNS = SCHEMA.names[:-1]  # of a shard table
DIGESTED = ["kind", "sample_id", "position", "tile_id", "sha256"]
LINES = 1 << 16  # that are hashed at a time


@dataclass(frozen=True)
class Pairs:
    """The pairs of one transition: `parents` [N] and `children` [N, s²] are rows of the index, -1 for an unreadable child."""

    parents: npt.NDArray[np.int64]
    children: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Triples:
    """Parents whose children are parents themselves: `parents` [N] and `children` [N, s²] are rows of the index, -1 for a child
    without children; `places` [N, s²] says where these children stand as parents among the pairs of kind `fine`."""

    parents: npt.NDArray[np.int64]
    children: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    fine: str


@dataclass(frozen=True)
class Index:
    """The readable samples of one split.

    `rows` has one line per tar member (columns of the shard table, and `slide`); names are categories, ids lie in Arrow's memory.
    `pairs` is keyed by transition ("10x-40x") from coarse to fine, `standalone` holds rows. `digest` identifies the content:
    ids, places in the grid and pixel digests.
    """

    folder: Path
    rows: pd.DataFrame
    pairs: dict[str, Pairs]
    standalone: npt.NDArray[np.int64]
    digest: str

    def counts(self) -> dict[str, int]:
        """Samples per kind, in the order of `pairs`, standalone last; kinds without samples are left out."""
        found = {kind: len(pairs.parents) for kind, pairs in self.pairs.items()} | {STANDALONE: len(self.standalone)}
        return {kind: count for kind, count in found.items() if count}

    def triples(self, kind: str, min_children: int) -> Triples | None:
        """The parents of kind "2.5x-10x-40x" with at least `min_children` children that are parents of pairs "10x-40x".

        None where the index lacks one of the two transitions.
        """
        first, middle, last = kind.split("-")
        coarse, fine = self.pairs.get(f"{first}-{middle}"), self.pairs.get(f"{middle}-{last}")
        if coarse is None or fine is None:
            return None
        ids, known = pa.array(self.rows["tile_id"]), coarse.children >= 0
        places = np.full(known.shape, -1, dtype=np.int64)
        found = pc.index_in(ids.take(pa.array(coarse.children[known])), ids.take(pa.array(fine.parents)))
        places[known] = found.fill_null(-1).to_numpy()
        usable = (places >= 0).sum(axis=1) >= min_children
        children = np.where(places >= 0, coarse.children, -1)
        return Triples(coarse.parents[usable], children[usable], places[usable], f"{middle}-{last}")

    def slide_digests(self) -> dict[str, str]:
        """What `digest` is of all, of each slide."""
        rows, places = self.rows[DIGESTED], self.rows.groupby("slide", observed=True).indices
        return {str(slide): _digest(rows.iloc[places[slide]]) for slide in sorted(places)}

    def magnification_counts(self) -> dict[str, int]:
        """Distinct tiles per magnification, keyed as "10x"."""
        tiles = self.rows.groupby("magnification")["tile_id"].nunique()
        return {f"{float(magnification):g}x": int(count) for magnification, count in tiles.items()}  # type: ignore[arg-type]


def load_index(folder: Pathlike, split: str, min_children: int, slides: Iterable[str] | None = None) -> Index:
    """`load_indexes` of one split."""
    return load_indexes(folder, [split], min_children, slides)[split]


def load_indexes(
    folder: Pathlike, splits: Sequence[str], min_children: int, slides: Iterable[str] | None = None
) -> dict[str, Index]:
    """Index the tiles of each of `splits`; pairs with fewer than `min_children` children are left out.

    Args:
        folder: of the shard tables.
        splits: of "train", "val" and "test".
        min_children: children that a pair needs.
        slides: whose tables are read: those of the cohort, so that a slide that was taken off its sheet trains nothing.
            None reads every table of the folder.

    Raises:
        MadError: a shard table is missing, or there is none.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.parquet") if slides is None else (folder / f"{slide}.parquet" for slide in slides))
    if absent := [path.stem for path in paths if not path.exists()]:
        raise MadError(
            f"{folder}: no shard table of {', '.join(absent[:10])}; make it with `mad shard` before training"
        )
    if not paths:
        raise MadError(f"{folder}: no shard tables; make them with `mad shard` before training")
    parts: dict[str, list[pa.Table]] = {split: [SCHEMA.empty_table()] for split in splits}
    for path in paths:
        read = _read(path, splits)
        for split in splits:
            parts[split].append(read.filter(pc.field("split") == split).cast(SCHEMA))
    return {split: _index(folder, parts[split], min_children) for split in splits}


def _read(path: Path, splits: Sequence[str]) -> pa.Table:
    """The readable tiles of these splits; of tables without any, no more than the footer is read."""
    wanted = pc.field("split").isin(splits) & (pc.field("status") == "ok")
    rows = pq.read_table(path, columns=COLUMNS, filters=wanted, partitioning=None)
    return rows.append_column("slide", pa.repeat(path.stem, len(rows)))


def _index(folder: Path, parts: list[pa.Table], min_children: int) -> Index:
    """Of all rows, in order of kind, sample and position; `parts` is emptied, and no column is there twice for long."""
    table = pa.concat_tables(parts)
    parts.clear()
    columns = dict(zip(table.column_names, table.columns, strict=True))
    del table
    names = {name: _category(columns.pop(name)) for name in NAMES}
    sample = _ranks(columns["sample_id"].combine_chunks())
    order = np.lexsort((columns["position"].to_numpy(), sample, names["kind"].codes))
    rows = pd.DataFrame(
        {
            name: names.pop(name).take(order) if name in names else _taken(columns.pop(name), order)
            for name in SCHEMA.names
        },
        copy=False,
    )
    sample, position = sample[order], rows["position"].to_numpy()
    role = {name: (rows["role"] == name).to_numpy() for name in ("parent", "child", STANDALONE)}
    transitions = sorted(rows["kind"][~role[STANDALONE]].unique(), key=lambda kind: float(str(kind).split("x-")[0]))
    pairs = {}
    for kind in transitions:
        own = (rows["kind"] == kind).to_numpy()
        parents, children = (np.flatnonzero(own & role[name]) for name in ("parent", "child"))
        pairs[str(kind)] = _pairs(parents, children, sample, position, min_children)
    return Index(folder, rows, pairs, np.flatnonzero(role[STANDALONE]), _digest(rows))


def _category(column: pa.ChunkedArray) -> pd.Categorical:
    """Names, with their categories in order."""
    found = pd.Categorical(column.combine_chunks().to_pandas())
    return found.reorder_categories(sorted(found.categories))


def _ranks(texts: pa.LargeStringArray) -> npt.NDArray[np.int64]:
    """The place of each among the distinct ones in order."""
    encoded = texts.dictionary_encode()
    ranks = np.empty(len(encoded.dictionary), dtype=np.int64)
    ranks[pc.array_sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(ranks))
    return ranks[encoded.indices.to_numpy()]


def _taken(column: pa.ChunkedArray, order: npt.NDArray[np.int64]) -> Any:
    taken = column.combine_chunks().take(pa.array(order))
    return pd.arrays.ArrowStringArray(taken) if taken.type == TEXT else taken.to_numpy()


def _pairs(
    parents: npt.NDArray[np.int64],
    children: npt.NDArray[np.int64],
    sample: npt.NDArray[np.int64],
    position: npt.NDArray[np.int16],
    min_children: int,
) -> Pairs:
    """Parents in order of sample id, each with its children by position; `sample` and `position` are those of all rows."""
    place = np.full(sample.max(initial=0) + 1, -1, dtype=np.int64)
    place[sample[parents]] = np.arange(len(parents))
    children = children[place[sample[children]] >= 0]
    table = np.full((len(parents), int(position[children].max(initial=0)) + 1), -1, dtype=np.int64)
    table[place[sample[children]], position[children]] = children
    usable = (table >= 0).sum(axis=1) >= min_children
    return Pairs(parents[usable], table[usable])


def _digest(rows: pd.DataFrame) -> str:
    found = hashlib.sha256()
    for start in range(0, len(rows), LINES):
        part = rows.iloc[start : start + LINES]
        lines = pc.binary_join_element_wise(
            *(pa.array(part[name]).cast(TEXT) for name in DIGESTED), pa.scalar("\t", TEXT)
        )
        found.update(("\n" * bool(start) + "\n".join(lines.to_pylist())).encode())
    return found.hexdigest()[:16]
