"""Stage `shard`: the selected tiles' native pixels in tars, and where each lies, as `shard/{slide}.parquet`.

Each coarsest tile's footprint is read once per magnification, and all of its selected tiles are cut from that array. A
tile that cannot be decoded is `unreadable`; its sample, if it belongs to a pair, is left out whole, and the table says so.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mad.config import Config
from mad.config.model import ShardConfig
from mad.files import digest, file_stamp, read_json, read_parquet, sha256_file, write_json, write_parquet
from mad.progress import log, track
from mad.slides.sheet import SlideRow, cohort_rows
from mad.tiles.aligned import AlignedSlide, Footprint, open_aligned
from mad.tiles.pyramid import parse_tile_id
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
    if selected.empty:
        table = pd.DataFrame(columns=COLUMNS)
    else:
        with open_aligned(row.path, config.tile, row.mpp) as slide:
            table = _cut(config, slide, selected, folder / row.slide_id)
    (folder / row.slide_id / "index.json").unlink(missing_ok=True)
    _remove_strangers(folder / row.slide_id, set(table["shard"].dropna()))
    table = table[COLUMNS].astype(TYPES)
    write_parquet(folder / f"{row.slide_id}.parquet", table)
    write_parquet(folder / row.slide_id / "index.parquet", table)
    write_json(folder / row.slide_id / "index.json", {"key": key})
    unreadable = int((table["status"] == "unreadable").sum())
    log(f"shard {row.slide_id}: {len(table)} tiles" + (f", {unreadable} of them unreadable" if unreadable else ""))


def _key(config: Config, row: SlideRow, selection: Path) -> str:
    """Digest of all that a slide's shards depend on: the selection's bytes, the slide's, and how tiles are cut and stored."""
    cut = config.tile.model_dump(exclude={"tissue", "min_tissue"})
    return digest([sha256_file(selection), file_stamp(row.path), row.mpp, cut, config.shard.model_dump()], length=64)


def _copy_if_fresh(folder: Path, slide_id: str, key: str) -> bool:
    """Put the shard table back, where the tars beside its copy were made from just this; the workflow has deleted it.

    One job selects for the whole cohort, so any change of it schedules every slide's shards again; those whose selection
    came out the same are not cut again.
    """
    stamp, copy = folder / slide_id / "index.json", folder / slide_id / "index.parquet"
    if not stamp.exists() or not copy.exists() or read_json(stamp)["key"] != key:
        return False
    table = read_parquet(copy)
    if not all((folder / name).exists() for name in table["shard"].dropna().unique()):
        return False
    write_parquet(folder / f"{slide_id}.parquet", table)
    return True


def run_cohort(config: Config) -> None:
    """Write `shard/cohort.json`: tiles per kind and split over all slides, and one digest of every tile's bytes."""
    folder = Path(config.results) / "shard"
    columns = ["tile_id", "kind", "role", "split", "sha256", "status"]
    tables = [read_parquet(folder / f"{row.slide_id}.parquet", columns=columns) for row in cohort_rows(config)]
    table = pd.concat(tables, ignore_index=True)
    ok = table[table["status"] == "ok"]
    counts = {
        f"{split} {kind} {role}": int(n)
        for (split, kind, role), n in ok.groupby(["split", "kind", "role"]).size().items()
    }
    content = hashlib.sha256("\n".join((ok["kind"] + ok["tile_id"] + ok["sha256"]).tolist()).encode()).hexdigest()
    write_json(folder / "cohort.json", {"tiles": counts, "unreadable": len(table) - len(ok), "sha256": content})


def _cut(config: Config, slide: AlignedSlide, selected: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Write the tars; returns the shard table in the order of `selected`."""
    roots = pd.DataFrame([parse_tile_id(name)[1][:2] for name in selected["tile_id"]], columns=["i", "j"])
    rows = []
    with ExitStack() as stack:
        writers = {
            (kind, split): stack.enter_context(ShardWriter(folder, f"{split}-{kind}", config.shard.max_bytes))
            for kind, split in selected[["kind", "split"]].drop_duplicates().itertuples(index=False)
        }
        footprints = selected.groupby([roots["i"], roots["j"]])
        for (i, j), group in track(footprints, f"shard {folder.name}", total=len(footprints), unit="footprints"):
            pixels = Footprint(slide, int(i), int(j))
            for (kind, split, _), sample in group.groupby(["kind", "split", "sample_id"], sort=False):
                rows += _write_sample(config.shard, slide, pixels, sample, writers[kind, split], folder.name)
    table = pd.DataFrame(rows).set_index("row").sort_index()
    return pd.concat([selected[COLUMNS[:6]], table], axis=1)


def _write_sample(
    config: ShardConfig, slide: AlignedSlide, pixels: Footprint, sample: pd.DataFrame, writer: ShardWriter, folder: str
) -> list[dict[str, Any]]:
    """Encode and write one sample: its rows of the shard table, keyed by `row`, the row of the selection."""
    rows: list[dict[str, Any]] = []
    images: dict[str, bytes] = {}
    for entry in sample.itertuples():
        index = parse_tile_id(entry.tile_id)[1]
        tile = pixels.tile(index)
        row = {"row": entry.Index, "magnification": slide.grid.ladder.magnifications[len(index) - 2]}
        row |= {
            "status": "unreadable" if tile is None else "ok",
            "shard": None,
            "offset": -1,
            "size": 0,
            "sha256": None,
        }
        row["blur"] = np.nan if tile is None else blur_score(tile)
        rows.append(row)
        if tile is not None:
            part = {"parent": "parent.", "child": f"{entry.position:02d}.", "standalone": ""}[entry.role]
            data = encode(tile, format=config.format, quality=config.quality, subsampling=config.subsampling)
            images[f"{part}{config.format}"] = data
    if len(images) < len(rows):
        return [{**row, "status": "unreadable"} for row in rows]
    head = sample.iloc[0]
    level, row_number, column = slide.grid.ladder.position(parse_tile_id(head["sample_id"])[1])
    x, y, side, _ = (int(value) for value in slide.grid.rectangle(level, row_number, column))
    meta = {"tile_id": head["sample_id"], "kind": head["kind"], "x": x, "y": y, "side": side}
    meta |= {"magnification": rows[0]["magnification"], "mpp": slide.plan.mpp * slide.plan.levels[level].downsample}
    places = writer.add(head["sample_id"], images, meta)
    for row, data, (name, offset, size) in zip(rows, images.values(), places, strict=True):
        row |= {"shard": f"{folder}/{name}", "offset": offset, "size": size, "sha256": hashlib.sha256(data).hexdigest()}
    return rows


def _remove_strangers(folder: Path, keep: set[str]) -> None:
    """Remove tars of an earlier selection, which no index names any more."""
    for path in folder.glob("*.tar"):
        if f"{folder.name}/{path.name}" not in keep:
            path.unlink()
