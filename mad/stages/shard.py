"""Stage `shard`: the selected tiles' native pixels in tars, and where each lies, as `shard/{slide}.parquet`.

Coarsest tile by coarsest tile, so that each compressed tile of the slide is decoded once and each tile encoded once. A
tile that cannot be decoded is `unreadable`; its sample, if it belongs to a pair, is left out whole, and the others of it are
`incomplete`.
"""

from __future__ import annotations

import gc
import hashlib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mad.config import Config
from mad.config.model import ShardConfig
from mad.files import (
    MadError,
    StorageError,
    digest,
    is_there,
    read_json,
    read_parquet,
    sha256_file,
    write_json,
    write_parquet,
)
from mad.progress import log, track
from mad.slides.readers import slide_stamp
from mad.slides.sheet import SlideRow, cohort_rows
from mad.tiles.aligned import AlignedSlide, Footprint, open_aligned
from mad.tiles.pyramid import Index, parse_tile_id
from mad.tiles.shards import ShardWriter, blur_score, encode

TYPES = {
    **dict.fromkeys(("tile_id", "kind", "role", "sample_id"), "string"),
    "position": "int16",
    **dict.fromkeys(("split", "shard", "sha256", "status"), "string"),
    **dict.fromkeys(("offset", "size"), "int64"),
    "magnification": "float64",
    "blur": "float32",
}
COLUMNS = [
    *("tile_id", "kind", "role", "sample_id", "position", "split"),
    *("magnification", "shard", "offset", "size", "sha256", "status", "blur"),
]


def run(config: Config, row: SlideRow) -> None:
    """Cut the selected tiles of one slide."""
    folder = Path(config.results) / "shard"
    selection = Path(config.results) / "sample" / f"{row.slide_id}.parquet"
    key = _key(config, row, selection)
    if _copy_if_fresh(folder, row.slide_id, key):
        log(f"shard {row.slide_id}: up to date")
        return
    selected = read_parquet(selection)
    try:
        table, tars = _cut(config, row, selected, folder / row.slide_id)
    except MadError as error:
        if config.on_bad_slide == "fail" or isinstance(error, StorageError):
            raise
        # Tars of an earlier run stay: they are whole again when the slide is back.
        log(f"shard {row.slide_id}: its {len(selected)} tiles cannot be read: {error}")
        write_parquet(folder / f"{row.slide_id}.parquet", _lost(config, selected)[COLUMNS].astype(TYPES))
        return
    (folder / row.slide_id / "index.json").unlink(missing_ok=True)
    _remove_strangers(folder / row.slide_id, set(table["shard"].dropna()))
    table = table[COLUMNS].astype(TYPES)
    write_parquet(folder / f"{row.slide_id}.parquet", table)
    write_parquet(folder / row.slide_id / "index.parquet", table)
    write_json(folder / row.slide_id / "index.json", {"key": key, "tars": tars})
    lost = num_unreadable(table)
    log(f"shard {row.slide_id}: {table['tile_id'].nunique()} tiles" + (f", {lost} of them unreadable" if lost else ""))


def _lost(config: Config, selected: pd.DataFrame) -> pd.DataFrame:
    """The table of a slide that cannot be opened any more."""
    levels = [len(parse_tile_id(name)[1]) - 2 for name in selected["tile_id"]]
    magnifications = [config.tile.magnifications[level] for level in levels]
    return selected[COLUMNS[:6]].assign(**_row("", None, None), magnification=magnifications)


def _key(config: Config, row: SlideRow, selection: Path) -> str:
    """Digest of all that a slide's shards depend on: the selection's bytes, the slide's, and how tiles are cut and stored."""
    cut = config.tile.model_dump(exclude={"tissue", "min_tissue"})
    return digest([sha256_file(selection), slide_stamp(row.path), row.mpp, cut, config.shard.model_dump()], length=64)


def _copy_if_fresh(folder: Path, slide_id: str, key: str) -> bool:
    """Put the shard table back, where the tars beside its copy were made from just this; the workflow has deleted it.

    One job selects for the whole cohort, so any change of it schedules every slide's shards again; those whose selection
    came out the same are not cut again. One with a tile that could not be read is: that its slide was mended need not show in
    size and time (`cp -p`).
    """
    stamp, copy = folder / slide_id / "index.json", folder / slide_id / "index.parquet"
    try:
        known, table = read_json(stamp), pd.read_parquet(copy)
    except (OSError, ValueError):  # never made, or damaged
        return False
    if (table["status"] != "ok").any() or known != {"key": key, "tars": _tars(folder / slide_id)}:
        return False
    write_parquet(folder / f"{slide_id}.parquet", table)
    return True


def _tars(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of each tar of a slide, by which damage is told (`mad shards verify`)."""
    return {tar.name: {"bytes": tar.stat().st_size, "sha256": sha256_file(tar)} for tar in sorted(folder.glob("*.tar"))}


def run_cohort(config: Config) -> None:
    """Write `shard/cohort.json`: tiles per kind and split over all slides, and one digest of every tile's bytes."""
    folder = Path(config.results) / "shard"
    columns = ["tile_id", "kind", "role", "split", "sha256", "status"]
    counts: Counter[tuple[str, str, str]] = Counter()
    content, unreadable, between = hashlib.sha256(), 0, b""
    for row in track(cohort_rows(config), "shard: cohort", unit="slides"):
        table = read_parquet(folder / f"{row.slide_id}.parquet", columns=columns)
        ok = table[table["status"] == "ok"]
        counts.update(ok.groupby(["split", "kind", "role"]).size().to_dict())
        unreadable += num_unreadable(table)
        if len(ok):
            content.update(between + "\n".join(ok["kind"] + ok["tile_id"] + ok["sha256"]).encode())
            between = b"\n"
    tiles = {" ".join(name): n for name, n in counts.items()}
    write_json(folder / "cohort.json", {"tiles": tiles, "unreadable": unreadable, "sha256": content.hexdigest()})


def num_unreadable(table: pd.DataFrame) -> int:
    """Tiles of shard tables that could not be read; one may stand in several rows."""
    return int(table.loc[table["status"] == "unreadable", "tile_id"].nunique())


Tars = dict[str, dict[str, Any]]


def _cut(config: Config, row: SlideRow, selected: pd.DataFrame, folder: Path) -> tuple[pd.DataFrame, Tars]:
    """Write the tars; returns the shard table in the order of `selected`, and each tar's size and digest.

    Raises:
        MadError: the slide cannot be opened, or not be read or written by the machine.
    """
    if selected.empty and is_there(row.path):
        return pd.DataFrame(columns=COLUMNS), {}
    with open_aligned(row.path, config.tile, row.mpp) as slide:
        return _write_tars(config, slide, selected, folder)


def _write_tars(config: Config, slide: AlignedSlide, selected: pd.DataFrame, folder: Path) -> tuple[pd.DataFrame, Tars]:
    ladder, options = slide.grid.ladder, config.shard
    column = {
        name: selected[name].to_numpy(object) for name in COLUMNS[:6]
    }  # pandas' strings go one by one ten times as slowly
    index = [parse_tile_id(name)[1] for name in column["tile_id"]]
    sample_of = list(zip(column["kind"], column["split"], column["sample_id"], strict=True))
    part = [_part(*entry, options.format) for entry in zip(column["role"], column["position"], strict=True)]
    order = sorted(range(len(selected)), key=lambda n: index[n][:2])
    footprints = [list(numbers) for _, numbers in groupby(order, key=lambda n: index[n][:2])]
    rows: list[dict[str, Any]] = [{}] * len(selected)
    with ExitStack() as stack:
        gc.freeze()  # else the collector looks through all imported modules again and again: 4 % of the time
        stack.callback(gc.unfreeze)
        writers = {
            (kind, split): stack.enter_context(ShardWriter(folder, f"{split}-{kind}", options.max_bytes))
            for kind, split in dict.fromkeys(name[:2] for name in sample_of)
        }
        for footprint in track(footprints, f"shard {folder.name}", unit="footprints"):
            encoded = _encoder(slide, index[footprint[0]], options)
            for (kind, split, sample_id), numbers in groupby(footprint, key=lambda n: sample_of[n]):
                sample = list(numbers)
                tiles = [encoded(index[n]) for n in sample]
                images = {part[n]: tile.data for n, tile in zip(sample, tiles, strict=True) if tile}
                whole = len(images) == len(sample)
                meta = {"tile_id": sample_id, "kind": kind, **_place(slide, index[sample[0]])}
                places = writers[kind, split].add(sample_id, images, meta) if whole else [None] * len(sample)
                for n, tile, place in zip(sample, tiles, places, strict=True):
                    rows[n] = {
                        "magnification": ladder.magnifications[len(index[n]) - 2],
                        **_row(folder.name, tile, place),
                    }
    tars = {name: stamp for writer in writers.values() for name, stamp in writer.tars.items()}
    return pd.concat([selected[COLUMNS[:6]], pd.DataFrame(rows)], axis=1), tars


@dataclass(frozen=True)
class _Encoded:
    data: bytes
    sha256: str
    blur: float


def _encoder(slide: AlignedSlide, root: Index, config: ShardConfig) -> Callable[[Index], _Encoded | None]:
    """Any tile under the coarsest tile `root` as it is stored, or None where it cannot be decoded.

    Each is read and encoded once, however many samples hold it: a 10x tile is a child, a parent and perhaps standalone.
    """
    pixels = Footprint(slide, *root[:2])

    @cache
    def encoded(index: Index) -> _Encoded | None:
        if (tile := pixels.tile(index)) is None:
            return None
        data = encode(tile, format=config.format, quality=config.quality, subsampling=config.subsampling)
        return _Encoded(data, hashlib.sha256(data).hexdigest(), blur_score(tile))

    return encoded


def _part(role: str, position: int, format: str) -> str:
    """The extension of a tile's member in its tar."""
    return {"parent": "parent.", "child": f"{position:02d}.", "standalone": ""}[role] + format


def _place(slide: AlignedSlide, index: Index) -> dict[str, Any]:
    """Where a tile lies, and its scale: for people and programs that have the tar alone."""
    level, row, column = slide.grid.ladder.position(index)
    x, y, side, _ = (int(value) for value in slide.grid.rectangle(level, row, column))
    mpp = slide.plan.mpp * slide.plan.levels[level].downsample
    return {"x": x, "y": y, "side": side, "magnification": slide.grid.ladder.magnifications[level], "mpp": mpp}


def _row(folder: str, tile: _Encoded | None, place: tuple[str, int, int] | None) -> dict[str, Any]:
    """A tile's own columns of the shard table; without a `place`, its sample was left out."""
    blur = np.nan if tile is None else tile.blur
    if tile is None or place is None:
        status = "unreadable" if tile is None else "incomplete"
        return {"shard": None, "offset": -1, "size": 0, "sha256": None, "status": status, "blur": blur}
    name, offset, size = place
    shard = f"{folder}/{name}"
    return {"shard": shard, "offset": offset, "size": size, "sha256": tile.sha256, "status": "ok", "blur": blur}


def _remove_strangers(folder: Path, keep: set[str]) -> None:
    """Remove tars of an earlier selection, which no index names any more."""
    for path in folder.glob("*.tar"):
        if f"{folder.name}/{path.name}" not in keep:
            path.unlink()
