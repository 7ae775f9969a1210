"""Stage `embed`: every tile of the shards through one encoder, as `embed/{encoder}/{slide}.npy` and `.parquet`.

Each tile is encoded once, however many samples hold it. Slides that segmentation maps are drawn of are also embedded
densely: every tile inside the slide, straight from the slide, in `embed/{encoder}/dense/`. A slide whose inputs and encoder
have not changed since is left as it is, so adding a slide embeds that slide alone. `audit.json`, written last, tells what
the encoder was.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mad.config import Config
from mad.evaluation.segmentation import segmentation_slides
from mad.files import (
    atomic_path,
    digest,
    file_stamp,
    read_json,
    read_parquet,
    sha256_file,
    write_json,
    write_parquet,
)
from mad.models.embedding import embed_tiles
from mad.models.encoders import Encoder, load_encoder
from mad.models.hub import MissingWeightsError
from mad.progress import log, track
from mad.slides.sheet import SlideRow, cohort_rows
from mad.tiles.aligned import Footprint, open_aligned
from mad.tiles.pyramid import parse_tile_id
from mad.tiles.shards import decode, read_member

ABSENT = "absent"


def run(config: Config, name: str) -> None:
    """Embed the whole cohort with one encoder.

    Where its published weights cannot be had, audit.json says `"status": "absent"` and why.

    Raises:
        MadError: the encoder cannot be made (or had, where `on_missing_encoder` is "fail"), or gives numbers that are not finite.
    """
    folder = Path(config.results) / "embed" / name
    try:
        encoder = load_encoder(config, name)
    except MissingWeightsError as missing:
        if config.on_missing_encoder == "fail":
            raise
        log(f"WARNING: {missing}. {name} is absent from the tables, the other encoders go on")
        entry = config.encoder(name).model_dump()
        write_json(folder / "audit.json", {"status": ABSENT, "reason": str(missing), "encoder": name, "config": entry})
        return
    (folder / "audit.json").unlink(missing_ok=True)  # it vouches for all slides at once
    rows = cohort_rows(config)
    start = time.perf_counter()
    done = {row.slide_id: _embed_shards(config, name, encoder, row, folder) for row in rows}
    slides = read_parquet(Path(config.results) / "cohort" / "slides.parquet")
    wanted = set(segmentation_slides(slides, config.evaluate))
    for row in rows:
        if row.slide_id in wanted:
            done[row.slide_id] += _embed_dense(config, name, encoder, row, folder / "dense")
    seconds, tiles = time.perf_counter() - start, sum(done.values())
    write_json(folder / "audit.json", {**encoder.audit, "encoder": name, "config": config.encoder(name).model_dump()})
    log(
        f"embed {name}: {tiles} tiles of {sum(map(bool, done.values()))} slides in {seconds:.1f} s ({tiles / seconds:.0f}/s); "
        "the rest was up to date"
    )


def _embed_shards(config: Config, name: str, encoder: Encoder, row: SlideRow, folder: Path) -> int:
    """Embed the tiles that a slide's shards hold; returns how many were encoded now."""
    shards = Path(config.results) / "shard"
    index = shards / f"{row.slide_id}.parquet"
    key = {"encoder": encoder.audit, "input": sha256_file(index)}
    if _is_fresh(folder, row.slide_id, key):
        return 0
    table = read_parquet(index)
    table = table[table["status"] == "ok"].drop_duplicates("tile_id", ignore_index=True)
    places = list(table[["shard", "offset", "size"]].itertuples(index=False, name=None))
    images = (decode(read_member(shards, *place)) for place in places)
    what = f"embed {name} {row.slide_id}"
    _write(
        folder,
        row.slide_id,
        key,
        table["tile_id"],
        _encode(encoder, images, len(places), config.encoder(name).batch, what),
    )
    return len(places)


def _embed_dense(config: Config, name: str, encoder: Encoder, row: SlideRow, folder: Path) -> int:
    """Embed every tile inside a slide at the magnifications of the maps, straight from the slide."""
    index = Path(config.results) / "tile" / f"{row.slide_id}.parquet"
    wanted = config.evaluate.segmentation_magnifications
    table = read_parquet(index, columns=["tile_id", "magnification", "status"])
    table = table[(table["status"] != "edge") & table["magnification"].isin(wanted)].reset_index(drop=True)
    cut = config.tile.model_dump(exclude={"tissue", "min_tissue"})
    key = {"encoder": encoder.audit, "tiles": table["tile_id"].tolist(), "slide": file_stamp(row.path), "cut": cut}
    if _is_fresh(folder, row.slide_id, key):
        return 0
    parsed = [parse_tile_id(tile_id)[1] for tile_id in table["tile_id"]]
    order = sorted(range(len(parsed)), key=lambda n: (parsed[n][:2], len(parsed[n]), parsed[n]))
    read: list[int] = []

    def images() -> Iterator[np.ndarray]:
        with open_aligned(row.path, config.tile, row.mpp) as slide:
            for (i, j), tiles in groupby(order, key=lambda n: parsed[n][:2]):
                footprint = Footprint(slide, i, j)
                for n in tiles:
                    if (pixels := footprint.tile(parsed[n])) is not None:
                        read.append(n)
                        yield pixels

    what = f"embed {name} {row.slide_id} (dense)"
    vectors = _encode(encoder, images(), len(order), config.encoder(name).batch, what)
    _write(folder, row.slide_id, key, table["tile_id"].iloc[read], vectors)
    return len(read)


def _encode(encoder: Encoder, images: Iterable[np.ndarray], total: int, batch: int | None, what: str) -> np.ndarray:
    """Embeddings float32 [n, d] of a stream of (about) `total` tiles."""
    return embed_tiles(encoder, track(images, what, total=total, unit="tiles"), batch, what)


def _is_fresh(folder: Path, slide_id: str, key: dict[str, Any]) -> bool:
    """Whether a slide's embeddings are whole and were made from just these inputs by just this encoder."""
    stamp = folder / f"{slide_id}.json"
    return stamp.exists() and (folder / f"{slide_id}.npy").exists() and read_json(stamp)["key"] == digest(key)


def _write(folder: Path, slide_id: str, key: dict[str, Any], tile_ids: pd.Series, vectors: np.ndarray) -> None:
    (folder / f"{slide_id}.json").unlink(missing_ok=True)
    with atomic_path(folder / f"{slide_id}.npy") as temporary:
        np.save(temporary, vectors.astype(np.float32))
    write_parquet(folder / f"{slide_id}.parquet", pd.DataFrame({"tile_id": tile_ids.astype("string")}))
    write_json(folder / f"{slide_id}.json", {"key": digest(key), "tiles": len(tile_ids)})
