"""The tiles of a results folder from Python: a mapping from tile id to pixels.

    from mad.tiles.store import TileStore
    tiles = TileStore("results")
    pixels = tiles["S01_L1_0_2_13"]  # uint8 [h, w, 3]

Shard tables are read when they are needed, one slide's for a tile of that slide; pixels are read by offset and checked
against their SHA-256. Knows no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from mad.files import MadError, Pathlike, read_parquet
from mad.tiles.pyramid import parse_tile_id
from mad.tiles.shards import decode, read_member


class UnknownTileError(MadError, KeyError):
    """The shards hold no such tile. A `KeyError` too, so that `tiles.get(id)` and the like work."""

    __str__ = Exception.__str__


class TileStore(Mapping[str, np.ndarray]):
    """The readable tiles of `shard/*.parquet`: `tiles[id]` RGB uint8 [h, w, 3], each id once, in the order of `table`."""

    def __init__(self, results: Pathlike, slides: Iterable[str] | None = None) -> None:
        """
        Args:
            results: the folder that `results` in the configuration names.
            slides: the slides to offer; None offers those of the cohort that have a shard table, and not what an earlier
                cohort left in the folder.

        Raises:
            MadError: there is no shard table, or none of one of `slides`.
        """
        self._folder = Path(results) / "shard"
        found = sorted(path.stem for path in self._folder.glob("*.parquet"))
        cohort = Path(results) / "cohort" / "slides.parquet"
        known = set(read_parquet(cohort, ["slide_id"])["slide_id"]) if cohort.exists() else set(found)
        self.slides = list(slides) if slides is not None else [slide for slide in found if slide in known]
        if not (found and self.slides):
            raise MadError(f"{self._folder}: no shard table; cut shards first: `snakemake --cores 2 shard`")
        if absent := [slide for slide in self.slides if slide not in found]:
            raise MadError(f"{self._folder}: no shard table of {absent[0]!r}{_nearest(absent[0], found)}")
        self._tables: dict[str, tuple[pd.DataFrame, dict[str, int]]] = {}

    @cached_property
    def table(self) -> pd.DataFrame:
        """The shard tables' readable rows (docs/data-contracts.md), to filter with pandas; a tile has a row per sample."""
        return pd.concat([self._load(slide)[0] for slide in self.slides], ignore_index=True)

    def __getitem__(self, tile_id: str) -> np.ndarray:
        """
        Raises:
            UnknownTileError: no shard holds the tile; the nearest id is named.
            MadError: its tar is missing, or its bytes are not those that were written.
        """
        row = self._row(tile_id)
        return decode(read_member(self._folder, row["shard"], int(row["offset"]), int(row["size"]), row["sha256"]))

    def read(self, tile_ids: Iterable[str]) -> np.ndarray:
        """Pixels of several tiles: uint8 [n, h, w, 3].

        Raises:
            MadError: as `tiles[id]`, or there are none to stack.
        """
        images = [self[tile_id] for tile_id in tile_ids]
        if not images:
            raise MadError("read: no tile ids were given")
        return np.stack(images)

    def pair(self, parent_id: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """A pair sample: the parent's pixels, and those of its children in row-major order.

        Raises:
            UnknownTileError: the shards hold no pair of this parent.
        """
        table, _ = self._load(self._slide(parent_id))
        sample = table[(table["sample_id"] == parent_id) & (table["role"] != "standalone")].sort_values("position")
        if sample.empty:
            parents = table.loc[table["role"] == "parent", "tile_id"]
            raise UnknownTileError(f"the shards hold no pair of {parent_id!r}{_nearest(parent_id, parents)}")
        parent, *children = (self[tile_id] for tile_id in sample["tile_id"])  # the parent's position is -1
        return parent, children

    def __iter__(self) -> Iterator[str]:
        return iter(self.table["tile_id"].drop_duplicates())

    def __len__(self) -> int:
        return int(self.table["tile_id"].nunique())

    def __contains__(self, tile_id: object) -> bool:
        try:
            self._row(str(tile_id))
        except UnknownTileError:
            return False
        return True

    def _load(self, slide: str) -> tuple[pd.DataFrame, dict[str, int]]:
        """A slide's readable rows, and a row of each tile."""
        if slide not in self._tables:
            table = read_parquet(self._folder / f"{slide}.parquet")
            table = table[table["status"] == "ok"].reset_index(drop=True)
            self._tables[slide] = table, {tile_id: row for row, tile_id in reversed(list(enumerate(table["tile_id"])))}
        return self._tables[slide]

    def _row(self, tile_id: str) -> pd.Series:
        table, places = self._load(self._slide(tile_id))
        if tile_id not in places:
            raise UnknownTileError(f"the shards hold no tile {tile_id!r}{_nearest(tile_id, places)}")
        return table.iloc[places[tile_id]]

    def _slide(self, tile_id: str) -> str:
        try:
            slide, _ = parse_tile_id(tile_id)
        except ValueError as error:
            raise UnknownTileError(str(error)) from None
        if slide not in self.slides:
            raise UnknownTileError(f"the shards hold no slide {slide!r}{_nearest(slide, self.slides)}")
        return slide


def _nearest(name: str, names: Iterable[str]) -> str:
    """Something to append to an error: the nearest of `names`."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=1, cutoff=0)
    return f"; did you mean {near[0]!r}?" if near else ""
