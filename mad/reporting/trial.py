"""Measures for a plan: tissue on a thumbnail, and bytes and seconds per tile by cutting one footprint of a few slides."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mad.config import Config
from mad.config.model import TileConfig
from mad.files import MadError
from mad.progress import log
from mad.slides.sheet import SlideRow
from mad.slides.tissue import tissue_mask
from mad.tiles.aligned import AlignedSlide, open_aligned
from mad.tiles.index import tile_table
from mad.tiles.labels import block_sums, cells_per_tile, raster_shape
from mad.tiles.shards import BLOCK, blur_score, encode

COARSE_MPP = 16.0
SLIDES = 3
TILES = 64
JSON_MEMBER_BYTES = 2 * BLOCK  # a header, and less than one block of text


@dataclass(frozen=True)
class Trial:
    """What was measured, of one process."""

    slides: int
    tiles: int
    bytes: dict[str, float]
    """Mean bytes of a tile in a tar per magnification ("10x"): header, image, padding."""
    read_s: float
    """Seconds to read a coarsest tile's footprint at every magnification."""
    encode_s: float
    """Seconds to score, encode and digest a tile."""
    overview_s: float
    """Seconds to read a footprint at the tissue mask's resolution and to mask it."""
    table_s: float
    """Seconds per row of the tile table."""


def tissue_tiles(slide: AlignedSlide, config: TileConfig) -> list[np.ndarray]:
    """Per magnification, which tiles are inside the slide and have enough tissue on a thumbnail: bool [rows, columns]."""
    grid, mpp = slide.grid, slide.scale.mpp
    cells = cells_per_tile(grid, mpp, max(COARSE_MPP, config.tissue.mpp))
    downsample = grid.finest_px / cells
    view, lost = slide.reader.salvaged_overview(downsample, *raster_shape(grid, cells), left=grid.left, top=grid.top)
    counts = block_sums(tissue_mask(view, mpp=mpp * downsample, options=config.tissue) & ~lost, cells)
    found = []
    for level in range(len(grid.ladder)):
        span = grid.ladder.span(level)
        share = block_sums(counts, span) / (span * cells) ** 2
        found.append((share >= config.min_tissue) & grid.contains(level, *np.indices(share.shape)))
    return found


def try_slides(config: Config, rows: Sequence[SlideRow]) -> Trial | None:
    """Cut one footprint with tissue of up to `SLIDES` slides, evenly spread over `rows`; None where none can be cut."""
    step = max(1, len(rows) // SLIDES)
    sizes: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {"read": [], "encode": [], "overview": [], "table": []}
    for row in rows[::step][:SLIDES]:
        try:
            with open_aligned(row.path, config.tile, row.mpp) as slide:
                _cut(config, slide, sizes, seconds)
        except MadError as error:
            log(f"plan: {row.slide_id} gives no measure: {error}")
    if not seconds["read"]:
        return None
    mean = {name: float(np.mean(values)) for name, values in seconds.items()}
    return Trial(
        slides=len(seconds["read"]),
        tiles=sum(map(len, sizes.values())),
        bytes={name: float(np.mean(values)) for name, values in sizes.items()},
        read_s=mean["read"],
        encode_s=mean["encode"],
        overview_s=mean["overview"],
        table_s=mean["table"],
    )


def _cut(config: Config, slide: AlignedSlide, sizes: dict[str, list[int]], seconds: dict[str, list[float]]) -> None:
    """Measure one slide's footprint: the one in the middle of the coarsest tiles with tissue."""
    grid = slide.grid
    for number, ok in enumerate(tissue_tiles(slide, config.tile)):
        if slide.plan.levels[number].available and ok.any():
            places = np.argwhere(ok) // (grid.ladder.span(0) // grid.ladder.span(number))
            i, j = (int(value) for value in places[len(places) // 2])
            break
    else:
        return
    read = 0.0
    for number, level in enumerate(slide.plan.levels):
        if not level.available:
            continue
        start = time.perf_counter()
        pixels = slide.footprint(number, i, j)
        read += time.perf_counter() - start
        per_side, px = pixels.shape[0] // slide.tile_px, slide.tile_px
        rows, columns = np.indices((per_side, per_side)).reshape(2, -1)
        inside = np.flatnonzero(grid.contains(number, i * per_side + rows, j * per_side + columns))
        for n in inside[:: max(1, len(inside) // TILES)]:
            top, left = rows[n] * px, columns[n] * px
            tile = np.ascontiguousarray(pixels[top : top + px, left : left + px])
            start = time.perf_counter()
            blur_score(tile)
            options = config.shard
            data = encode(tile, format=options.format, quality=options.quality, subsampling=options.subsampling)
            hashlib.sha256(data).digest()
            seconds["encode"].append(time.perf_counter() - start)
            sizes.setdefault(grid.ladder.name(number), []).append(BLOCK + len(data) + -len(data) % BLOCK)
    seconds["read"].append(read)
    seconds["overview"].append(_overview_seconds(config, slide, i, j))
    seconds["table"].append(_table_seconds(config, slide))


def _overview_seconds(config: Config, slide: AlignedSlide, i: int, j: int) -> float:
    """To read one footprint as stage `tile` does, and to mask it."""
    cells = cells_per_tile(slide.grid, slide.scale.mpp, config.tile.tissue.mpp)
    downsample = slide.grid.finest_px / cells
    x, y, _, _ = (int(value) for value in slide.grid.rectangle(0, i, j))
    side = slide.grid.ladder.span(0) * cells
    start = time.perf_counter()
    view = slide.reader.overview(downsample, side, side, left=x, top=y)
    tissue_mask(view, mpp=slide.scale.mpp * downsample, options=config.tile.tissue)
    return time.perf_counter() - start


def _table_seconds(config: Config, slide: AlignedSlide) -> float:
    """Per row, of the slide's whole tile table without tissue or labels."""
    shape, classes = slide.grid.level_shape(len(slide.grid.ladder) - 1), config.label.classes
    start = time.perf_counter()
    table = tile_table(
        "plan",
        slide.grid,
        slide.plan,
        np.zeros(shape, np.int64),
        np.zeros((*shape, len(classes)), np.int64),
        (1, 1),
        classes,
        min_tissue=config.tile.min_tissue,
        min_annotated=config.label.min_annotated,
    )
    return (time.perf_counter() - start) / max(len(table), 1)
