"""What the shards offer to training: the index of one split's pairs and standalone tiles, and the pixels behind a row.

Read from `shard/{slide}.parquet`; members of the tars are read by offset, so that any sample can be had at any time.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from mad.config.kinds import STANDALONE
from mad.files import MadError, Pathlike
from mad.tiles.shards import decode
from mad.training.views import Image

COLUMNS = ["tile_id", "kind", "role", "sample_id", "position", "split", "magnification"]
COLUMNS += ["shard", "offset", "size", "sha256", "status"]
MAX_OPEN_TARS = 256


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

    `rows` has one line per tar member (columns of the shard table, and `slide`), `pairs` is keyed by transition ("10x-40x")
    from coarse to fine, `standalone` holds rows. `digest` identifies the content: ids, places in the grid and pixel digests.
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
        ids = self.rows["tile_id"].to_numpy()
        places = pd.Index(ids[fine.parents]).get_indexer(ids[coarse.children.ravel()]).reshape(coarse.children.shape)
        places = np.where(coarse.children >= 0, places, -1).astype(np.int64)
        usable = (places >= 0).sum(axis=1) >= min_children
        children = np.where(places >= 0, coarse.children, -1)
        return Triples(coarse.parents[usable], children[usable], places[usable], f"{middle}-{last}")

    def slide_digests(self) -> dict[str, str]:
        """What `digest` is of all, of each slide."""
        return {str(slide): _digest(rows) for slide, rows in self.rows.groupby("slide")}

    def magnification_counts(self) -> dict[str, int]:
        """Distinct tiles per magnification, keyed as "10x"."""
        tiles = self.rows.drop_duplicates("tile_id")["magnification"].value_counts().sort_index()
        return {f"{float(magnification):g}x": int(count) for magnification, count in tiles.items()}  # type: ignore[arg-type]


def load_index(folder: Pathlike, split: str, min_children: int, slides: Iterable[str] | None = None) -> Index:
    """Index the tiles of `split`; pairs with fewer than `min_children` children are left out.

    Args:
        folder: of the shard tables.
        split: "train", "val" or "test".
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
    tables = [pd.read_parquet(path, columns=COLUMNS).assign(slide=path.stem) for path in paths]
    rows = pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
    rows = rows[(rows["split"] == split) & (rows["status"] == "ok")]
    rows = rows.sort_values(["kind", "sample_id", "position"], kind="stable", ignore_index=True)
    paired = rows[rows["role"] != "standalone"]
    transitions = sorted(paired["kind"].unique(), key=lambda kind: float(str(kind).split("x-")[0]))
    pairs = {kind: _pairs(paired[paired["kind"] == kind], min_children) for kind in transitions}
    standalone = np.flatnonzero((rows["role"] == "standalone").to_numpy()).astype(np.int64)
    return Index(folder, rows, pairs, standalone, _digest(rows))


def _pairs(rows: pd.DataFrame, min_children: int) -> Pairs:
    """Parents in order of sample id, each with its children by position."""
    parents = rows[rows["role"] == "parent"]
    children = rows[rows["role"] == "child"]
    place = pd.Series(np.arange(len(parents)), index=parents["sample_id"])
    known = children[children["sample_id"].isin(place.index)]
    table = np.full((len(parents), int(known["position"].max()) + 1 if len(known) else 1), -1, dtype=np.int64)
    table[place[known["sample_id"]].to_numpy(), known["position"].to_numpy()] = known.index.to_numpy()
    usable = (table >= 0).sum(axis=1) >= min_children
    return Pairs(parents.index.to_numpy(dtype=np.int64)[usable], table[usable])


def _digest(rows: pd.DataFrame) -> str:
    columns = rows[["kind", "sample_id", "position", "tile_id", "sha256"]].astype(str)
    text = columns["kind"].str.cat([columns[name] for name in columns.columns[1:]], sep="\t")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def readable(data: bytes | memoryview) -> Image | None:
    """The image [h, w, 3] that `data` encodes, or None where it encodes none."""
    try:
        return decode(data)
    except (RuntimeError, ValueError):  # of imagecodecs, of simplejpeg
        return None


def mend_tar(error: BaseException | None = None) -> str:
    """What mends a tar that could not be read."""
    return (
        "mend its permissions"
        if isinstance(error, PermissionError)
        else "cut this slide's shards again with `mad shard`"
    )


def not_a_tile(where: str, image: Image | None, tile_px: int) -> MadError:
    """What to raise for another image than the table's, an unreadable one or one of another size; `where` names tar and tile."""
    found = (
        "is no readable image, or not that of its table"
        if image is None
        else f"has {image.shape[1]} x {image.shape[0]} px"
    )
    return MadError(f"{where} {found} (tile_px is {tile_px}); {mend_tar()}")


class TileReader:
    """Decodes tiles by row of an index; keeps the tars open. Safe to use after a fork: reads carry their own position; for one
    thread.

    A tile's bytes are compared with the digest of its table when they are first read, as shards do not change under a run.
    They are read into one space for all: with new memory for each, and for its pixels, the heap grows and shrinks every time.
    """

    def __init__(self, index: Index, tile_px: int) -> None:
        self.tile_px = tile_px
        self._folder = index.folder
        self._ids = index.rows["tile_id"].to_numpy()
        tars, self._tars = pd.factorize(index.rows["shard"])
        offsets, sizes = (index.rows[name].to_numpy(dtype=np.int64) for name in ("offset", "size"))
        self._places = np.column_stack([tars, offsets, sizes])
        self._space = bytearray(sizes.max(initial=0))
        self._digests = index.rows["sha256"].to_numpy()
        self._positions = index.rows["position"].to_numpy()
        self._known = bytearray(len(index.rows))
        self._open: OrderedDict[int, int] = OrderedDict()

    def tile_id(self, row: int) -> str:
        """The id of the tile in `row`."""
        return str(self._ids[row])

    def position(self, row: int) -> int:
        """The place of the child in `row` under its parent, row-major; -1 for other tiles."""
        return int(self._positions[row])

    def read(self, row: int) -> Image:
        """The RGB pixels [tile_px, tile_px, 3] of the tile in `row`.

        Raises:
            MadError: the tar is missing, the bytes are not those of its table or no image, or the image's size differs.
        """
        tar, offset, size = self._places[row].tolist()
        space = memoryview(self._space)[:size]
        data = space[: os.preadv(self._descriptor(tar), [space], offset)]
        if not self._known[row]:
            self._known[row] = hashlib.sha256(data).hexdigest() == self._digests[row]
        image, tile_px = readable(data) if self._known[row] else None, self.tile_px
        if image is None or image.shape != (tile_px, tile_px, 3):
            where = f"{self._folder / str(self._tars[tar])}: tile {self.tile_id(row)} at byte {offset}"
            raise not_a_tile(where, image, tile_px)
        return image

    def _descriptor(self, tar: int) -> int:
        if tar in self._open:
            self._open.move_to_end(tar)
            return self._open[tar]
        path = self._folder / str(self._tars[tar])
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise MadError(f"{path}: {error.strerror}; {mend_tar(error)}") from None
        self._open[tar] = descriptor
        if len(self._open) > MAX_OPEN_TARS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        """Close every tar."""
        while self._open:
            os.close(self._open.popitem()[1])
