"""Slides through OpenSlide: vendors' formats, DICOM, JPEG 2000."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide

from mad.files import MadError, Pathlike
from mad.slides.readers.base import IccChoice, Reader, ReadError, axis_ratio


class OpenSlideReader(Reader):
    """Any slide that OpenSlide knows."""

    def __init__(self, path: Pathlike, icc: IccChoice = "keep") -> None:
        path = Path(path)
        self._slide = _open(path)
        try:
            super().__init__(
                path,
                properties=dict(self._slide.properties),
                level_dimensions=self._slide.level_dimensions,
                level_downsamples=_downsamples(self._slide),
                profile=openslide.lowlevel.read_icc_profile(self._slide._osr),
                icc=icc,
            )
        except KeyError:
            self._slide.close()
            raise MadError(
                f"{path}: the names of its properties are damaged; is the file whole? Copy it anew"
            ) from None
        except MadError:
            self._slide.close()
            raise

    def _decode(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        downsample = self._slide.level_downsamples[level]  # OpenSlide's own word, by which it finds the place again
        place = round(x * downsample), round(y * downsample)  # whole level-0 pixels: up to 0.5 / downsample px beside
        try:
            rgba = np.asarray(self._slide.read_region(place, level, (width, height)))
        except openslide.OpenSlideError as error:
            latched, self._slide = self._slide, _open(self.path)  # a handle that met an error fails for ever
            latched.close()
            raise ReadError(f"{self.path}: level {level}, {width} x {height} px at ({x}, {y}): {error}") from None
        if rgba[..., 3].min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        alpha = rgba[..., 3:].astype(np.uint16)
        return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)

    def close(self) -> None:
        self._slide.close()


def _downsamples(slide: openslide.OpenSlide) -> list[float]:
    """What the file says of its levels; where it says nothing (and OpenSlide takes the mean of both axes) `axis_ratio`."""
    width, height = slide.dimensions
    found = []
    for (w, h), given in zip(slide.level_dimensions, slide.level_downsamples, strict=True):
        assumed = abs(given - (width / w + height / h) / 2) < 1e-6 * given
        found.append(axis_ratio((width, height), (w, h)) if assumed else given)
    return found


def _open(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise MadError(f"{path}: no slide that can be read ({error}); is the file whole? Copy it anew") from None
