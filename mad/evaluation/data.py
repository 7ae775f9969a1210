"""The embedded tiles of one encoder as the protocols see them: one row per tile, classes as codes, pairs as row numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from mad.evaluation.duplicates import Duplicates, find_duplicates
from mad.files import MadError
from mad.metrics.rows import RowSubset
from mad.training.free_memory import free_bytes

UNLABELLED = -1
SHEET_COLUMNS = ("site", "scanner")
"""Columns of the cohort sheet that tiles keep, where it has them."""


class NotApplicableError(Exception):
    """A protocol has no data to run on; the text says what is missing and goes into the JSON."""


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Tiles of a cohort with their embeddings by one encoder."""

    tiles: pd.DataFrame
    """tile_id slide_id patient_id magnification split label code; `code` indexes `classes`, -1 is unlabelled. Also site and
    scanner, where they are known."""
    features: NDArray[np.float32]
    """[n, d], row for row with `tiles`, all finite."""
    pairs: pd.DataFrame
    """kind parent child position: rows of `tiles`, one line per child of every pair."""
    classes: list[str]
    background: str | None = None
    split_by: str = "patient"
    dropped: dict[str, int] = field(default_factory=dict)
    """Tiles left out while reading, by reason."""
    duplicates: Duplicates | None = None
    """Tiles whose pixels are there twice; None where that was not looked for."""

    def rows(self, split: str, magnification: float | None = None, *, labelled: bool = True) -> NDArray[np.int64]:
        """Row numbers of a split, of one magnification or of all."""
        tiles = self.tiles
        wanted = (tiles["split"] == split).to_numpy()
        if magnification is not None:
            wanted = wanted & np.isclose(tiles["magnification"].to_numpy(float), magnification)
        if labelled:
            wanted = wanted & (self.codes >= 0)
        return np.flatnonzero(wanted)

    @property
    def standalone(self) -> NDArray[np.bool_]:
        """Which tiles are samples by themselves, be they in a pair too; of tiles from elsewhere, those that are in no pair."""
        if "standalone" in self.tiles:
            return self.tiles["standalone"].to_numpy(bool)
        return ~np.isin(np.arange(len(self.tiles)), self.pairs[["parent", "child"]].to_numpy())

    def part(self, rows: NDArray[np.int64]) -> RowSubset:
        """Features of some rows, without a copy of them: those of training may be nearly all."""
        return RowSubset(self.features, rows)

    @property
    def codes(self) -> NDArray[np.int64]:
        return self.tiles["code"].to_numpy(np.int64)

    @cached_property
    def patients(self) -> NDArray[Any]:
        """[n] their names; kept, as the strings of a large cohort take seconds to convert."""
        return self.tiles["patient_id"].to_numpy(str)

    @property
    def background_code(self) -> int | None:
        return self.classes.index(self.background) if self.background in self.classes else None

    def counts(self, rows: NDArray[np.int64]) -> dict[str, int]:
        """Tiles per class among rows, unlabelled ones left out."""
        return class_counts(self.codes[rows], self.classes)

    def num_patients(self, rows: NDArray[np.int64]) -> int:
        return len(np.unique(self.patients[rows]))


def kind_of(coarse: float, fine: float) -> str:
    """Name of a transition, as `kind` holds it: 10, 40 -> "10x-40x"."""
    return f"{coarse:g}x-{fine:g}x"


def class_counts(codes: NDArray, classes: Sequence[str]) -> dict[str, int]:
    """Number of codes of each class."""
    counts = np.bincount(codes[codes >= 0], minlength=len(classes))
    return {name: int(count) for name, count in zip(classes, counts, strict=True)}


def assemble(
    slides: pd.DataFrame,
    per_slide: Iterable[tuple[str, pd.DataFrame, pd.DataFrame, pd.DataFrame, Callable[[], NDArray]]],
    *,
    classes: list[str],
    background: str | None,
) -> Embedded:
    """Join the files of every slide into one `Embedded`.

    Args:
        slides: cohort table (slide_id, patient_id, split_by; site and scanner where it has them).
        per_slide: for each slide its id, the shard table, the tile table (tile_id, label), the table of embedded tiles
            (tile_id) and what opens their features [n, d], which are not held before they are read.
        classes: class names in order.
        background: the class that stands for glass.

    Raises:
        MadError: no embedded tile at all, more than fit into memory, an embedding that is not finite, a label that is no class, or
            a tile, a patient or (where slides are split by block) a coarsest tile with all that it holds on two sides.
    """
    patient_of = dict(zip(slides["slide_id"], slides["patient_id"].astype(str), strict=True))
    split_by = str(slides["split_by"].iloc[0]) if "split_by" in slides and len(slides) else "patient"
    tables, places, children, alone, digests = [], [], [], [], []
    dropped = {"without embedding": 0}
    for slide_id, shard, tile, rows, stored in per_slide:
        usable = shard[shard["status"] == "ok"] if "status" in shard else shard
        each = usable.drop_duplicates("tile_id")
        if {"sha256", "blur"} <= set(each):
            digests.append(each[["tile_id", "split", "sha256", "blur"]].assign(slide_id=slide_id))
        one = each[["tile_id", "magnification", "split"]].reset_index(drop=True)
        sides = usable.groupby("tile_id")["split"].nunique()
        if (sides > 1).any():
            raise MadError(
                f"slide {slide_id}: tile {sides.index[sides > 1][0]} is in two splits; run `mad sample` again"
            )
        one = one.merge(tile[["tile_id", "label"]], on="tile_id", how="left")
        place = one["tile_id"].map(dict(zip(rows["tile_id"], range(len(rows)), strict=True)))
        dropped["without embedding"] += int(place.isna().sum())
        one, place = one[place.notna()], place[place.notna()].astype(np.int64)
        tables.append(one.assign(slide_id=slide_id, patient_id=patient_of[slide_id]))
        places.append((stored, place.to_numpy()))
        children.append(usable.loc[usable["role"] == "child", ["kind", "sample_id", "tile_id", "position"]])
        alone.append(usable.loc[usable["role"] == "standalone", "tile_id"])
    if not tables or not sum(map(len, tables)):
        raise MadError("no embedded tile was found: run `mad shard` and `mad embed` first")
    duplicates = find_duplicates(pd.concat(digests, ignore_index=True)) if digests else None
    if duplicates and duplicates.excluded:
        kept = [~table["tile_id"].isin(duplicates.excluded).to_numpy() for table in tables]
        dropped["duplicate of another tile"] = sum(int((~rows).sum()) for rows in kept)
        tables = [table[rows] for table, rows in zip(tables, kept, strict=True)]
        places = [(stored, place[rows]) for (stored, place), rows in zip(places, kept, strict=True)]
    tiles = pd.concat(tables, ignore_index=True)
    for column in SHEET_COLUMNS:
        if column in slides:
            tiles[column] = tiles["slide_id"].map(dict(zip(slides["slide_id"], slides[column], strict=True)))
    tiles["split"] = tiles["split"].astype(object).fillna("none")
    unknown = sorted(set(tiles["label"].dropna()) - set(classes))
    if unknown:
        raise MadError(
            f"tile tables hold labels {unknown} that label.classes does not list: {classes}; run `mad tile` again"
        )
    tiles["code"] = (
        tiles["label"].map({name: code for code, name in enumerate(classes)}).fillna(UNLABELLED).astype(np.int64)
    )
    if split_by == "patient":
        _check_patients(tiles)
    else:
        _check_blocks(tiles)
    row_of = pd.Series(np.arange(len(tiles)), index=tiles["tile_id"])
    pairs = pd.concat(children, ignore_index=True)
    pairs = pairs.assign(parent=pairs["sample_id"].map(row_of), child=pairs["tile_id"].map(row_of))
    pairs = pairs.dropna(subset=["parent", "child"]).astype({"parent": np.int64, "child": np.int64})
    tiles["standalone"] = tiles["tile_id"].isin(pd.concat(alone))
    columns = [
        "tile_id",
        "slide_id",
        "patient_id",
        "magnification",
        "split",
        "label",
        "code",
        "standalone",
        *SHEET_COLUMNS,
    ]
    return Embedded(
        tiles=tiles[[column for column in columns if column in tiles]],
        features=_read(tables, places),
        pairs=pairs[["kind", "parent", "child", "position"]].reset_index(drop=True),
        classes=classes,
        background=background,
        split_by=split_by,
        dropped=dropped,
        duplicates=duplicates,
    )


def _check_finite(block: NDArray, tiles: pd.DataFrame) -> None:
    bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
    if len(bad):
        more = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
        slide, tile = tiles[["slide_id", "tile_id"]].iloc[bad[0]]
        raise MadError(
            f"slide {slide}: the embedding of tile {tile}{more} holds NaN or infinity; delete the slide's embeddings and run "
            "`mad embed` again"
        )


def _check_patients(tiles: pd.DataFrame) -> None:
    sides = tiles.groupby("patient_id")["split"].nunique()
    if (sides > 1).any():
        raise MadError(
            f"patient {sides.index[sides > 1][0]} has tiles in two splits although cohort.split_by is patient; "
            "run `mad cohort` and `mad sample` again"
        )


def _check_blocks(tiles: pd.DataFrame) -> None:
    """A tile, its parents and its children are on one side, pair or not: they show the same place."""
    block = tiles["slide_id"].astype(str) + " " + tiles["tile_id"].astype(str).str.extract(r"_L\d+_(\d+_\d+)")[0]
    sides = tiles.groupby(block)["split"].nunique()
    if (sides > 1).any():
        slide, place = str(sides.index[sides > 1][0]).split(" ")
        raise MadError(
            f"slide {slide}: the coarsest tile {place} and the tiles inside it are in two splits; run `mad sample` again"
        )


def _read(
    tables: list[pd.DataFrame], places: list[tuple[Callable[[], NDArray], NDArray[np.int64]]]
) -> NDArray[np.float32]:
    """The rows `place` of every slide's features, below one another: read straight into the array that holds them all."""
    shape = sum(map(len, tables)), places[0][0]().shape[1]
    _check_memory(*shape)
    features = np.empty(shape, np.float32)
    start = 0
    for table, (stored, place) in zip(tables, places, strict=True):
        block = features[start : start + len(place)]
        block[:] = stored()[place]
        _check_finite(block, table)
        start += len(place)
    return features


def _check_memory(num_tiles: int, dim: int) -> None:
    """Fail where the embeddings alone do not fit into memory: filled anyway, the process would be killed without a word."""
    needed, free = num_tiles * dim * 4, free_bytes(torch.device("cpu"))
    if free is not None and needed > free:
        raise MadError(
            f"the embeddings of {num_tiles} tiles, {dim} float32 numbers each, take {needed / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are free. Give the job more memory, half as much again as that, or let sample.max_pairs, "
            "sample.max_standalone and sample.max_unlabelled (of validation and test: sample.test_share) choose fewer tiles"
        )


def plain(value: Any) -> Any:
    """`value` as JSON knows it: arrays as lists, numpy numbers as Python's, NaN and infinity as None, keys as text."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def spread(values: Any) -> dict[str, Any]:
    """Mean and sample standard deviation over runs, with the values themselves; null where no run has a number."""
    numbers = np.asarray(values, np.float64)
    finite = numbers[np.isfinite(numbers)]
    mean = float(finite.mean()) if len(finite) else None
    std = float(finite.std(ddof=1)) if len(finite) > 1 else None
    return {"mean": mean, "std": std, "values": plain(numbers)}
