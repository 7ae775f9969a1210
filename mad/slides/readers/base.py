"""The interface of every reader: levels, properties, and RGB pixels of a rectangle or of the whole slide."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from mad.files import MadError
from mad.slides.icc import describe_profile, to_srgb

IccChoice = Literal["keep", "apply"]
STRIP_BYTES = 100_000_000  # of an overview's strip: memory does not grow with the slide's width


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
        fits = [n for n, d in enumerate(self.level_downsamples) if d <= downsample * 1.005] or [0]
        for level in sorted(fits, key=lambda n: -self.level_downsamples[n]):
            try:
                return self._overview(level, downsample, rows, columns, left, top, strip_px)
            except ReadError as error:
                fault = error
        raise fault

    def _overview(
        self, level: int, downsample: float, rows: int, columns: int, left: int, top: int, strip_px: int
    ) -> np.ndarray:
        factor = downsample / self.level_downsamples[level]
        if abs(factor - round(factor)) < 0.005 * factor:
            factor = round(factor)
        x, y = round(left / self.level_downsamples[level]), round(top / self.level_downsamples[level])
        width = math.ceil(columns * factor)
        out = np.empty((rows, columns, 3), np.uint8)
        step = max(1, int(min(strip_px, STRIP_BYTES / (3 * width)) / factor))
        for row in range(0, rows, step):
            count = min(step, rows - row)
            start = round(row * factor)
            strip = self.read(level, x, y + start, width, math.ceil(count * factor))
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
