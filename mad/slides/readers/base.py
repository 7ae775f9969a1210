"""The interface of every reader: levels, properties, and RGB pixels of a rectangle or of the whole slide."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from mad.files import MadError
from mad.progress import log
from mad.slides.icc import describe_profile, to_srgb
from mad.slides.scale import ROUNDING_PX, SAME_DOWNSAMPLE

IccChoice = Literal["keep", "apply"]
Rectangle = tuple[int, int, int, int]
STRIP_BYTES = 100_000_000  # of an overview's strip: memory does not grow with the slide's width
PIECE_PX = 512  # side of what is given up around damage where the file does not tell its tiles
MAX_LOST = 0.5
"""Share of an overview that may be lost to damage; beyond it the slide is to be copied anew, not read in part."""


class ReadError(MadError):
    """Some pixels of a slide could not be decoded."""


def axis_ratio(size: tuple[int, int], level_size: tuple[int, int]) -> float:
    """Downsample of a level from sizes (width, height): along the longer axis, where the level's rounding to whole pixels
    weighs least. The mean of both axes would be off by the shorter one's rounding, across the whole of the longer one."""
    longer = size.index(max(size))
    return size[longer] / level_size[longer]


class Reader(ABC):
    """An open slide.

    `level_dimensions` are (width, height); `level_downsamples` what the file says, else `axis_ratio`, never rounded; `read` gives
    RGB uint8 arrays of shape [height, width, 3]. `profile` is the slide's ICC profile; `icc` tells what becomes of it: "none",
    "kept (NAME)" (the pixels as they are stored) or "applied to sRGB (NAME)".
    """

    def __init__(
        self,
        path: Path,
        *,
        properties: Mapping[str, str],
        level_dimensions: Sequence[tuple[int, int]],
        level_downsamples: Sequence[float] | None = None,
        profile: bytes | None,
        icc: IccChoice,
    ) -> None:
        self.path = path
        self.properties = properties
        self.level_dimensions = list(level_dimensions)
        width, height = self.level_dimensions[0]
        self.level_downsamples = list(
            level_downsamples or [axis_ratio((width, height), size) for size in self.level_dimensions]
        )
        self.profile = profile
        self.icc = "none"
        self._convert = to_srgb(profile, str(path)) if profile and icc == "apply" else None
        if profile:
            self.icc = f"{'applied to sRGB' if self._convert else 'kept'} ({describe_profile(profile)})"

    @property
    def level_count(self) -> int:
        return len(self.level_dimensions)

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """(x, y, width, height) of the scanned area in level-0 pixels."""
        width, height = self.level_dimensions[0]
        names = ("x", "y", "width", "height")
        found = [self.properties.get(f"openslide.bounds-{name}") for name in names]
        try:
            return tuple(int(float(value)) for value in found)  # type: ignore[arg-type, return-value]
        except (TypeError, ValueError):  # none given, or no numbers
            return 0, 0, width, height

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """RGB pixels [height, width, 3] of a rectangle in pixels of `level`; white beyond the border.

        Raises:
            ReadError: the file's pixels cannot be decoded there.
        """
        level_width, level_height = self.level_dimensions[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, level_width), min(y + height, level_height)
        if (left, top, right, bottom) == (x, y, x + width, y + height):
            return self._pixels(level, x, y, width, height)
        out = np.full((height, width, 3), 255, np.uint8)
        if right > left and bottom > top:
            out[top - y : bottom - y, left - x : right - x] = self._pixels(level, left, top, right - left, bottom - top)
        return out

    def storage_tile(self, level: int) -> tuple[int, int] | None:
        """(width, height) of the pieces that a level is stored in; None where the file does not tell."""
        sides = [self.properties.get(f"openslide.level[{level}].tile-{name}") for name in ("width", "height")]
        return (int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None

    @abstractmethod
    def _decode(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """RGB pixels, as they are stored, of a rectangle that lies inside the level."""

    def _pixels(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        pixels = self._decode(level, x, y, width, height)
        return self._convert(pixels) if self._convert else pixels

    def overview(
        self, downsample: float, rows: int, columns: int, *, left: int = 0, top: int = 0, strip_px: int = 2048
    ) -> np.ndarray:
        """The slide from level-0 pixel (left, top) on, shrunk by `downsample`: [rows, columns, 3], white beyond the border.

        Read strip by strip from the coarsest level that is fine enough; where that is damaged, from the next finer one.

        Raises:
            ReadError: no level that is fine enough can be decoded.
        """
        for level in self._fine_enough(downsample):
            try:
                return self._overview(level, downsample, rows, columns, left, top, strip_px=strip_px)
            except ReadError as error:
                fault = error
        raise fault

    def salvaged_overview(
        self, downsample: float, rows: int, columns: int, *, left: int = 0, top: int = 0, max_lost: float = MAX_LOST
    ) -> tuple[np.ndarray, np.ndarray]:
        """`overview` of a slide that may be damaged, and boolean [rows, columns] of what of it is lost: black there.

        Where no level can be read whole, the finest is read in the pieces that it is stored in, as far as they decode.

        Raises:
            ReadError: more than `max_lost` of it is lost.
        """
        lost = np.zeros((rows, columns), bool)
        try:
            return self.overview(downsample, rows, columns, left=left, top=top), lost
        except ReadError as error:
            log(f"{error}; reading around the damage")
        level = self._fine_enough(downsample)[-1]
        scale = self.level_downsamples[level]
        damage: list[Rectangle] = []
        across, down = self.level_dimensions[0]
        shown = min(columns * downsample, across - left) * min(rows * downsample, down - top)
        bearable = max_lost * shown / scale**2
        read = partial(self._read_around, damage, bearable)
        image = self._overview(level, downsample, rows, columns, left, top, read=read)
        for x, y, width, height in damage:
            (x0, x1), (y0, y1) = (
                (math.floor((at * scale - start) / downsample), math.ceil(((at + size) * scale - start) / downsample))
                for at, size, start in ((x, width, left), (y, height, top))
            )
            lost[max(y0, 0) : y1, max(x0, 0) : x1] = True
        image[lost] = 0
        log(f"{self.path}: {len(damage)} pieces of level {level} cannot be decoded")
        return image, lost

    def _read_around(
        self, damage: list[Rectangle], bearable: float, level: int, x: int, y: int, width: int, height: int
    ) -> np.ndarray:
        """`read`, where that fails piece by piece; pieces that cannot be decoded are added to `damage`.

        Raises:
            ReadError: there are more than `bearable` pixels of them.
        """
        try:
            return self.read(level, x, y, width, height)
        except ReadError as error:
            fault = error
        out = np.full((height, width, 3), 255, np.uint8)
        across, down = self.storage_tile(level) or (PIECE_PX, PIECE_PX)
        right, bottom = (min(*ends) for ends in zip((x + width, y + height), self.level_dimensions[level], strict=True))
        for top in range(y // down * down, bottom, down):
            for left in range(x // across * across, right, across):
                x0, y0, x1, y1 = max(left, x), max(top, y), min(left + across, right), min(top + down, bottom)
                try:
                    out[y0 - y : y1 - y, x0 - x : x1 - x] = self.read(level, x0, y0, x1 - x0, y1 - y0)
                except ReadError:
                    damage.append((x0, y0, x1 - x0, y1 - y0))
        if sum(piece[2] * piece[3] for piece in damage) > bearable:
            raise ReadError(f"{fault}; more than {MAX_LOST:.0%} of the slide cannot be decoded: copy it anew")
        return out

    def _fine_enough(self, downsample: float) -> list[int]:
        """The levels that an overview can be made of, coarsest first."""
        found = [n for n, d in enumerate(self.level_downsamples) if d <= downsample * (1 + SAME_DOWNSAMPLE)] or [0]
        return sorted(found, key=lambda n: -self.level_downsamples[n])

    def _overview(
        self,
        level: int,
        downsample: float,
        rows: int,
        columns: int,
        left: int,
        top: int,
        *,
        strip_px: int = 2048,
        read: Callable[[int, int, int, int, int], np.ndarray] | None = None,
    ) -> np.ndarray:
        factor = downsample / self.level_downsamples[level]
        whole = max(1, round(factor))
        if max(rows, columns) * abs(factor - whole) <= ROUNDING_PX:
            factor = whole
        x, y = round(left / self.level_downsamples[level]), round(top / self.level_downsamples[level])
        width = math.ceil(columns * factor)
        out = np.empty((rows, columns, 3), np.uint8)
        step = max(1, int(min(strip_px, STRIP_BYTES / (3 * width)) / factor))
        for row in range(0, rows, step):
            count = min(step, rows - row)
            start = round(row * factor)
            strip = (read or self.read)(level, x, y + start, width, math.ceil(count * factor))
            if factor != 1:
                strip = cv2.resize(strip, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)
            out[row : row + count] = (
                strip[:count, :columns] if strip.shape[0] >= count else _pad(strip, count)[:, :columns]
            )
        return out

    @abstractmethod
    def close(self) -> None:
        """Give the file back."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pad(strip: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([strip, np.repeat(strip[-1:], rows - len(strip), axis=0)])
