"""A slide opened on its grid: the pixels of any tile, at any magnification, in its exact place."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from mad.config.model import TileConfig
from mad.files import MadError, Pathlike
from mad.progress import log
from mad.slides.readers import Reader, ReadError, open_slide
from mad.slides.scale import LevelPlan, Scale, ScalePlan, plan_scale, read_scale
from mad.tiles.pyramid import Grid, Index, Ladder

MAX_SLIDE_UM2 = 200_000.0**2


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
        return self.shrunk(level, self.source(level, i, j))

    def source(self, level: int, i: int, j: int) -> np.ndarray:
        """The slide's own pixels under the coarsest tile (i, j), of the slide level that ladder level `level` is read from.

        Raises:
            ReadError: some of it cannot be decoded.
        """
        return read_source(self.reader, self.plan.levels[level], self.grid.rectangle(0, i, j), self._side(level))

    def shrunk(self, level: int, source: np.ndarray) -> np.ndarray:
        """The footprint at ladder level `level` from its `source`."""
        return resample(source, self._side(level))

    def _side(self, level: int) -> int:
        return self.tile_px * (self.grid.ladder.span(0) // self.grid.ladder.span(level))

    def tile(self, index: Index) -> np.ndarray:
        """RGB pixels [tile_px, tile_px, 3] of one tile, read alone.

        Raises:
            ReadError: they cannot be decoded.
        """
        level, row, column = self.grid.ladder.position(index)
        rectangle = self.grid.rectangle(level, row, column)
        return resample(read_source(self.reader, self.plan.levels[level], rectangle, self.tile_px), self.tile_px)

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
    """The tiles of one coarsest tile at every magnification; what several of them are made from is read once.

    Native tiles are read one by one. The others are cut from the whole footprint, resampled at once: so their pixels do not
    depend on which of them are asked for. (Where the footprint is damaged they are resampled one by one, from pixels that may lie
    half a source pixel beside.)
    """

    def __init__(self, slide: AlignedSlide, i: int, j: int) -> None:
        self._slide, self._i, self._j = slide, i, j
        self._sources: dict[int, np.ndarray] = {}
        self._pixels: dict[int, np.ndarray | None] = {}

    def tile(self, index: Index) -> np.ndarray | None:
        """A tile's pixels; None where they cannot be decoded. Where a footprint is damaged, its tiles are read one by one."""
        level = len(index) - 2
        if not self._slide.plan.levels[level].native and (whole := self._whole(level)) is not None:
            return np.ascontiguousarray(whole[self._slide.place(index)])
        try:
            return self._slide.tile(index)
        except ReadError as error:
            log(f"unreadable: {error}")
            return None

    def _whole(self, level: int) -> np.ndarray | None:
        if level not in self._pixels:
            self._pixels[level] = None
            slide_level = self._slide.plan.levels[level].level
            try:
                if slide_level not in self._sources:
                    self._sources[slide_level] = self._slide.source(level, self._i, self._j)
                self._pixels[level] = self._slide.shrunk(level, self._sources[slide_level])
            except ReadError as error:
                log(f"{error}; reading its tiles one by one")
        return self._pixels[level]


def read_source(reader: Reader, level: LevelPlan, rectangle: tuple[int, int, int, int], side_px: int) -> np.ndarray:
    """RGB pixels of the slide level that `level` is read from, under `rectangle` = (x, y, width, height) in level-0 pixels.

    Native pixels come as a square of `side_px`, which is what they make; others in their own number.

    Raises:
        ReadError: they cannot be decoded.
    """
    x, y, width, height = rectangle
    scale = level.level_downsample
    left, top = round(x / scale), round(y / scale)
    if level.native:
        return reader.read(level.level, left, top, side_px, side_px)
    return reader.read(level.level, left, top, round((x + width) / scale) - left, round((y + height) / scale) - top)


def resample(pixels: np.ndarray, side_px: int) -> np.ndarray:
    """RGB [side_px, side_px, 3]: shrunk by area averaging, or enlarged by Lanczos interpolation."""
    if pixels.shape[:2] == (side_px, side_px):
        return pixels
    shrinks = pixels.shape[0] >= side_px
    return cv2.resize(pixels, (side_px, side_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4)


def open_aligned(path: Pathlike, config: TileConfig, mpp: float | None = None) -> AlignedSlide:
    """Open a slide on the grid that `config` asks for; `mpp` is the cohort sheet's word on its scale.

    Raises:
        MadError: the file is no slide, or its scale is unknown or does not fit.
    """
    reader = open_slide(path, config.icc)
    try:
        scale = read_scale(reader.properties, mpp, str(path))
        plan = plan_scale(
            mpp=scale.mpp,
            level_downsamples=reader.level_downsamples,
            longer_px=max(reader.level_dimensions[0]),
            magnifications=config.magnifications,
            tile_px=config.tile_px,
            tolerance=config.scale_tolerance,
            on_missing=config.on_missing_scale,
            pyramid=config.pyramid,
            slide=str(path),
        )
        return AlignedSlide(reader, scale, plan, _grid(reader, plan, config), config.tile_px)
    except Exception:
        reader.close()
        raise


def _grid(reader: Reader, plan: ScalePlan, config: TileConfig) -> Grid:
    """The grid over the slide's bounds; where the slide keeps its own pixels, it starts on a whole pixel of every level."""
    x, y, width, height = reader.bounds
    coarsest = round(plan.levels[0].downsample) if plan.keeps_pixel_grid else 1
    left, top = -(-x // coarsest) * coarsest, -(-y // coarsest) * coarsest
    width, height = x + width - left, y + height - top
    if width <= 0 or height <= 0:
        raise MadError(
            f"{reader.path}: its bounds {reader.bounds} hold no tissue to tile; is the file whole? Copy it anew"
        )
    if width * height * plan.mpp**2 > MAX_SLIDE_UM2:
        sides = " x ".join(f"{side * plan.mpp / 1000:.0f}" for side in (width, height))
        raise MadError(
            f"{reader.path}: at {plan.mpp:.3g} um/px it would measure {sides} mm, "
            "more than any slide; mend its `mpp` in the cohort sheet"
        )
    return Grid(Ladder(tuple(config.magnifications)), plan.finest_px, width, height, left, top)
