"""Stage `embed`: every tile of the shards through one encoder, as `embed/{encoder}/{slide}.npy` and `.parquet`.

Each tile is encoded once, however many samples hold it. Slides that segmentation maps are drawn of are also embedded
densely: every tile inside the slide, straight from the slide, in `embed/{encoder}/dense/`. An encoder of which regions or
slides are made (`mixers:`, `biomarkers:`) embeds all slides so: every tile with tissue at the magnifications that they take. A
slide whose inputs and encoder have not changed since is left as it is, so adding a slide embeds that slide alone. `audit.json`,
written last, tells what the encoder was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mad.config import Config
from mad.config.adapters import adapter_of
from mad.config.regions import region_magnifications
from mad.evaluation.segmentation import segmentation_slides
from mad.files import (
    MadError,
    StorageError,
    read_parquet,
    sha256_file,
    write_json,
)
from mad.models.embedding import embed_tiles
from mad.models.encoders import Encoder, load_encoder
from mad.models.hub import MissingWeightsError
from mad.progress import log, track
from mad.slides.readers import slide_stamp
from mad.slides.sheet import SlideRow, cohort_rows
from mad.stages import embed_adapter
from mad.stages.embedded import ABSENT, is_fresh, write_embeddings
from mad.tiles.aligned import Footprint, open_aligned
from mad.tiles.embeddings import source_key
from mad.tiles.pyramid import parse_tile_id
from mad.tiles.shards import decode, read_member


def run(config: Config, name: str) -> None:
    """Embed the whole cohort with one encoder.

    Where its published weights cannot be had, audit.json says `"status": "absent"` and why.

    Raises:
        MadError: the encoder cannot be made (or had, where `on_missing_encoder` is "fail"), or gives numbers that are not finite.
    """
    if (adapter := adapter_of(config, name)) is not None:
        embed_adapter.run(config, name, adapter)
        return
    folder = Path(config.results) / "embed" / name
    try:
        encoder = load_encoder(config, name)
    except MissingWeightsError as missing:
        if config.on_missing_encoder == "fail":
            raise
        log(
            f"WARNING: {missing}. {name} is absent from the tables, the other encoders go on. It is tried again when its entry, "
            f"its file of weights or HF_TOKEN changes, and after {folder / 'audit.json'} is deleted"
        )
        entry = config.encoder(name).model_dump()
        write_json(folder / "audit.json", {"status": ABSENT, "reason": str(missing), "encoder": name, "config": entry})
        return
    (folder / "audit.json").unlink(missing_ok=True)  # it vouches for all slides at once
    rows = cohort_rows(config)
    start = time.perf_counter()
    done = {row.slide_id: _embed_shards(config, name, encoder, row, folder) for row in rows}
    slides = read_parquet(Path(config.results) / "cohort" / "slides.parquet")
    mapped, whole = set(segmentation_slides(slides, config.evaluate)), region_magnifications(config, name)
    for row in rows:
        if whole or row.slide_id in mapped:
            done[row.slide_id] += _embed_dense(
                config, name, encoder, row, folder / "dense", whole, row.slide_id in mapped
            )
    seconds, tiles = time.perf_counter() - start, sum(done.values())
    scales = {"mpp_seen": seen_mpp(config.tile.magnifications, encoder.audit)}
    write_json(
        folder / "audit.json", {**encoder.audit, **scales, "encoder": name, "config": config.encoder(name).model_dump()}
    )
    log(
        f"embed {name}: {tiles} tiles of {sum(map(bool, done.values()))} slides in {seconds:.1f} s ({tiles / seconds:.0f}/s); "
        "the rest was up to date"
    )


def seen_mpp(magnifications: list[float], audit: dict[str, Any]) -> dict[str, float]:
    """um/px of the images that the network sees, by magnification: 10 / magnification, nominally, times that of a resizing."""
    return {f"{value:g}x": 10 / value * audit.get("mpp_factor", 1.0) for value in magnifications}


def _embed_shards(config: Config, name: str, encoder: Encoder, row: SlideRow, folder: Path) -> int:
    """Embed the tiles that a slide's shards hold; returns how many were encoded now."""
    shards = Path(config.results) / "shard"
    index = shards / f"{row.slide_id}.parquet"
    key = source_key(encoder.audit, sha256_file(index))
    if is_fresh(folder, row.slide_id, key):
        return 0
    table = read_parquet(index)
    table = table[table["status"] == "ok"].drop_duplicates("tile_id", ignore_index=True)
    places = list(table[["shard", "offset", "size"]].itertuples(index=False, name=None))
    images = (decode(read_member(shards, *place)) for place in places)
    what = f"embed {name} {row.slide_id}"
    shown = track(images, what, total=len(places), unit="tiles")
    vectors = embed_tiles(encoder, shown, config.encoder(name).batch, what, lambda n: table["tile_id"].iloc[n])
    write_embeddings(folder, row.slide_id, key, table["tile_id"], vectors)
    return len(places)


def _embed_dense(
    config: Config, name: str, encoder: Encoder, row: SlideRow, folder: Path, whole: list[float], mapped: bool
) -> int:
    """Embed tiles straight from the slide: every one with tissue at the magnifications `whole`, and every one inside the slide for
    its maps (`mapped`).

    A slide that cannot be opened any more gets empty files, with a warning, unless `on_bad_slide` is "fail".
    """
    index = Path(config.results) / "tile" / f"{row.slide_id}.parquet"
    table = read_parquet(index, columns=["tile_id", "magnification", "status"])
    shown = (table["status"] != "edge") & table["magnification"].isin(config.evaluate.segmentation_magnifications)
    used = (table["status"] == "ok") & table["magnification"].isin(whole)
    table = table[(shown & mapped) | used].reset_index(drop=True)
    cut = config.tile.model_dump(exclude={"tissue", "min_tissue"})
    key = {"encoder": encoder.audit, "tiles": table["tile_id"].tolist(), "slide": slide_stamp(row.path), "cut": cut}
    parsed = [parse_tile_id(tile_id)[1] for tile_id in table["tile_id"]]
    order = sorted(range(len(parsed)), key=lambda n: (parsed[n][:2], len(parsed[n]), parsed[n]))
    read: list[int] = []

    def images(numbers: list[int]) -> Iterator[np.ndarray]:
        try:
            aligned = open_aligned(row.path, config.tile, row.mpp)
        except MadError as error:
            if config.on_bad_slide == "fail" or isinstance(error, StorageError):
                raise
            log(f"WARNING: embed {name}: {row.slide_id} has no dense embeddings: {error}")
            return
        with aligned as slide:
            for (i, j), tiles in groupby(numbers, key=lambda n: parsed[n][:2]):
                footprint = Footprint(slide, i, j)
                for n in tiles:
                    if (pixels := footprint.tile(parsed[n])) is not None:
                        read.append(n)
                        yield pixels

    if is_fresh(folder, row.slide_id, key):
        known = set(read_parquet(folder / f"{row.slide_id}.parquet")["tile_id"])
        lost = [n for n in order if table["tile_id"].iloc[n] not in known]
        if (
            not lost or next(images(lost), None) is None
        ):  # that a slide was mended need not show in size and time (`cp -p`)
            return 0
        read.clear()
    what = f"embed {name} {row.slide_id} (dense)"
    shown = track(images(order) if order else [], what, total=len(order), unit="tiles")
    vectors = embed_tiles(encoder, shown, config.encoder(name).batch, what, lambda n: table["tile_id"].iloc[read[n]])
    write_embeddings(folder, row.slide_id, key, table["tile_id"].iloc[read], vectors)
    return len(read)
