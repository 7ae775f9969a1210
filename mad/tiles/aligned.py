"""A slide opened on its grid: the pixels of any tile, at any magnification, in its exact place."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from mad.config.model import TileConfig
from mad.files import Pathlike
from mad.progress import log
from mad.slides.readers import Reader, ReadError, open_slide
from mad.slides.scale import Scale, ScalePlan, plan_scale, read_scale
from mad.tiles.pyramid import Grid, Index, Ladder


@dataclass(frozen=True)
class AlignedSlide:
    """An open slide with its scale, the plan of its magnifications and its grid. Close it, or use it in a `with`."""

    reader: Reader
    scale: Scale
    plan: ScalePlan
    grid: Grid
    tile_px: int

    def footprint(self, level: int, i: int, j: int) -> np.ndarray:
        """RGB pixels of the coarsest tile (i, j) at ladder level `level`: [side, side, 3], side = tile_px x tiles per side.

        White beyond the slide's border.

        Raises:
            ReadError: some of it cannot be decoded.
        """
        side = self.tile_px * (self.grid.ladder.span(0) // self.grid.ladder.span(level))
        return read_footprint(self.reader, self.plan, level, self.grid.rectangle(0, i, j), side)

    def tile(self, index: Index) -> np.ndarray:
        """RGB pixels [tile_px, tile_px, 3] of one tile, read alone.

        Raises:
            ReadError: they cannot be decoded.
        """
        level, row, column = self.grid.ladder.position(index)
        return read_footprint(self.reader, self.plan, level, self.grid.rectangle(level, row, column), self.tile_px)

    def place(self, index: Index) -> tuple[slice, slice]:
        """Where a tile lies in its coarsest tile's `footprint`."""
        level, row, column = self.grid.ladder.position(index)
        per_side = self.grid.ladder.span(0) // self.grid.ladder.span(level)
        top, left = (row % per_side) * self.tile_px, (column % per_side) * self.tile_px
        return slice(top, top + self.tile_px), slice(left, left + self.tile_px)

    def __enter__(self) -> AlignedSlide:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()


class Footprint:
    """The pixels of one coarsest tile at each magnification, read once, when first asked for."""

    def __init__(self, slide: AlignedSlide, i: int, j: int) -> None:
        self._slide, self._i, self._j = slide, i, j
        self._pixels: dict[int, np.ndarray | None] = {}

    def tile(self, index: Index) -> np.ndarray | None:
        """A tile's pixels; None where they cannot be decoded. Where the footprint is damaged, tiles are read one by one."""
        level = len(index) - 2
        try:
            if level not in self._pixels:
                self._pixels[level] = None
                self._pixels[level] = self._slide.footprint(level, self._i, self._j)
        except ReadError as error:
            log(f"{error}; reading its tiles one by one")
        whole = self._pixels[level]
        if whole is not None:
            return np.ascontiguousarray(whole[self._slide.place(index)])
        try:
            return self._slide.tile(index)
        except ReadError as error:
            log(f"unreadable: {error}")
            return None


def read_footprint(
    reader: Reader, plan: ScalePlan, number: int, rectangle: tuple[int, int, int, int], side_px: int
) -> np.ndarray:
    """The pixels of one coarsest tile at magnification `number` of the plan: RGB [side_px, side_px, 3].

    `rectangle` is (x, y, width, height) in level-0 pixels. Native pixels are copied; others are shrunk from the next finer
    level by area averaging (or enlarged by Lanczos interpolation where the plan says so).
    """
    level = plan.levels[number]
    x, y, width, height = rectangle
    scale = level.level_downsample
    left, top = round(x / scale), round(y / scale)
    if level.native:
        return reader.read(level.level, left, top, side_px, side_px)
    right, bottom = round((x + width) / scale), round((y + height) / scale)
    pixels = reader.read(level.level, left, top, right - left, bottom - top)
    shrinks = pixels.shape[0] >= side_px
    return cv2.resize(pixels, (side_px, side_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4)


def open_aligned(path: Pathlike, config: TileConfig, mpp: float | None = None) -> AlignedSlide:
    """Open a slide on the grid that `config` asks for; `mpp` is the cohort sheet's word on its scale.

    Raises:
        MadError: the file is no slide, or its scale is unknown or does not fit.
    """
    reader = open_slide(path)
    try:
        scale = read_scale(reader.properties, mpp, str(path))
        plan = plan_scale(
            mpp=scale.mpp,
            level_downsamples=reader.level_downsamples,
            magnifications=config.magnifications,
            tile_px=config.tile_px,
            tolerance=config.scale_tolerance,
            on_missing=config.on_missing_scale,
            pyramid=config.pyramid,
            slide=str(path),
        )
    except Exception:
        reader.close()
        raise
    x, y, width, height = reader.bounds
    coarsest = round(plan.levels[0].downsample) if plan.keeps_pixel_grid else 1
    left, top = (
        -(-x // coarsest) * coarsest,
        -(-y // coarsest) * coarsest,
    )  # so that every level starts on a whole pixel
    grid = Grid(
        ladder=Ladder(tuple(config.magnifications)),
        finest_px=plan.finest_px,
        width=x + width - left,
        height=y + height - top,
        left=left,
        top=top,
    )
    return AlignedSlide(reader, scale, plan, grid, config.tile_px)
