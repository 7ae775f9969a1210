"""The interface of every reader, and OpenSlide behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import openslide

from mad.files import MadError, Pathlike


class ReadError(MadError):
    """Some pixels of a slide could not be decoded."""


class Reader:
    """An open slide.

    `level_dimensions` are (width, height), `level_downsamples` the levels' true downsamples, `read` gives RGB uint8 arrays
    of shape [height, width, 3].
    """

    def __init__(self, path: Pathlike) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise MadError(f"{self.path}: no such slide; mend its `path` in the cohort sheet")
        self._slide = self._open()
        self.properties: Mapping[str, str] = dict(self._slide.properties)
        self.level_dimensions: list[tuple[int, int]] = list(self._slide.level_dimensions)
        self.level_downsamples: list[float] = list(self._slide.level_downsamples)

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(self.path)
        except openslide.OpenSlideError as error:
            raise MadError(
                f"{self.path}: no slide that can be read ({error}); is the file whole, and of a whole-slide format?"
            ) from None

    @property
    def level_count(self) -> int:
        return len(self.level_dimensions)

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """(x, y, width, height) of the scanned area in level-0 pixels."""
        width, height = self.level_dimensions[0]
        names = ("x", "y", "width", "height")
        found = [self.properties.get(f"openslide.bounds-{name}") for name in names]
        return tuple(map(int, found)) if all(found) else (0, 0, width, height)  # type: ignore[return-value, arg-type]

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """RGB pixels [height, width, 3] of a rectangle in pixels of `level`; white beyond the border.

        Raises:
            ReadError: the file's pixels cannot be decoded there.
        """
        level_width, level_height = self.level_dimensions[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, level_width), min(y + height, level_height)
        if (left, top, right, bottom) == (x, y, x + width, y + height):
            return self._decode(level, x, y, width, height)
        out = np.full((height, width, 3), 255, np.uint8)
        if right > left and bottom > top:
            out[top - y : bottom - y, left - x : right - x] = self._decode(level, left, top, right - left, bottom - top)
        return out

    def _decode(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        downsample = self.level_downsamples[level]
        try:
            rgba = np.asarray(
                self._slide.read_region((round(x * downsample), round(y * downsample)), level, (width, height))
            )
        except openslide.OpenSlideError as error:
            self._slide = self._open()  # an OpenSlide handle latches its first error
            raise ReadError(f"{self.path}: level {level}, {width} x {height} px at ({x}, {y}): {error}") from None
        if rgba[..., 3].min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        alpha = rgba[..., 3:].astype(np.uint16)
        return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)

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
        step = max(1, int(strip_px / factor))
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

    def close(self) -> None:
        self._slide.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pad(strip: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([strip, np.repeat(strip[-1:], rows - len(strip), axis=0)])
