"""Pixels of a slide behind one interface: tifffile's codecs for tiled TIFFs, OpenSlide for everything else.

OpenSlide also tells the metadata. A read error is an error (`ReadError`), never white pixels; white stands only beyond the
slide's border and where a scanner recorded nothing (alpha 0).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import simplejpeg
import tifffile

from mad.files import MadError, Pathlike
from mad.progress import log
from mad.slides.scale import ScalePlan

JPEG, LOSSLESS = 7, {1, 5, 8, 32773, 32946}  # TIFF compressions; lossless: none, LZW, deflate, PackBits, old deflate
RGB, YCBCR = 2, 6  # TIFF photometric interpretations


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


class TiffReader(Reader):
    """Pixels of a tiled TIFF: every compressed tile is fetched and decoded once per read. Metadata through OpenSlide.

    `pages[level]` is the level's directory. Several times faster than OpenSlide (benchmarks/readers.py) and as strict: any
    fault that libjpeg remarks on is an error.
    """

    def __init__(self, path: Pathlike, pages: list[int]) -> None:
        super().__init__(path)
        self._tiff = tifffile.TiffFile(path)
        self._pages: list[Any] = [self._tiff.pages[page] for page in pages]
        self._descriptor = os.open(path, os.O_RDONLY)

    def _decode(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        page = self._pages[level]
        tile_width, tile_height = page.tilewidth, page.tilelength
        across = -(-page.imagewidth // tile_width)
        out = np.empty((height, width, 3), np.uint8)
        for row in range(y // tile_height, (y + height - 1) // tile_height + 1):
            for column in range(x // tile_width, (x + width - 1) // tile_width + 1):
                try:
                    tile = self._tile(page, row * across + column)
                except Exception as error:  # a damaged stream fails in as many ways as there are codecs
                    cause = f"tile in row {row}, column {column}: {type(error).__name__}: {error}"
                    raise ReadError(
                        f"{self.path}: level {level}, {width} x {height} px at ({x}, {y}): {cause}"
                    ) from error
                left, top = column * tile_width, row * tile_height
                x0, y0 = max(x, left), max(y, top)
                x1, y1 = min(x + width, left + tile_width), min(y + height, top + tile_height)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _tile(self, page: Any, number: int) -> np.ndarray:
        """One compressed tile, decoded: RGB [tile height, tile width, 3]; white where the scanner recorded none (0 bytes)."""
        size = page.databytecounts[number]
        if size == 0:
            return np.full((page.tilelength, page.tilewidth, 3), 255, np.uint8)
        data = os.pread(self._descriptor, size, page.dataoffsets[number])
        if len(data) != size:
            raise EOFError(f"the file ends after {len(data)} of {size} bytes")
        if page.compression == JPEG:
            pixels = simplejpeg.decode_jpeg(_complete_jpeg(data, page.jpegtables, page.photometric), strict=True)
        else:
            pixels = page.decode(data, number)[0][0]
        if pixels.shape[:2] != (page.tilelength, page.tilewidth) or pixels.shape[2] < 3:
            raise ValueError(f"decodes to {pixels.shape}")
        return pixels[..., :3]

    def close(self) -> None:
        super().close()
        self._tiff.close()
        os.close(self._descriptor)


def _complete_jpeg(data: bytes, tables: bytes | None, photometric: int) -> bytes:
    """A TIFF tile as a JPEG file: with the directory's tables, and an Adobe marker that tells RGB from YCbCr."""
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG stream")
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([photometric == YCBCR])
    return data[:2] + adobe + (tables[2:-2] if tables else b"") + data[2:]


def _pad(strip: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([strip, np.repeat(strip[-1:], rows - len(strip), axis=0)])


def open_slide(path: Pathlike) -> Reader:
    """Open a slide with the fastest reader that decodes it exactly.

    Raises:
        MadError: the file is missing or no slide.
    """
    reader = Reader(path)
    if reader.properties.get("openslide.vendor") in ("aperio", "generic-tiff"):
        pages = _tiff_pages(Path(path), reader.level_dimensions)
        if pages is not None:
            reader.close()
            return TiffReader(path, pages)
    return reader


def _tiff_pages(path: Path, dimensions: list[tuple[int, int]]) -> list[int] | None:
    """The directory of each level, where all are tiles of interleaved 8-bit RGB (or JPEG's YCbCr); else None."""
    found: dict[tuple[int, int], int] = {}
    try:
        with tifffile.TiffFile(path) as file:
            pages: list[Any] = list(file.pages)
            for number, page in enumerate(pages):
                known = (page.compression == JPEG and page.photometric in (RGB, YCBCR)) or (
                    page.compression in LOSSLESS and page.photometric == RGB
                )
                interleaved = page.planarconfig == 1 and page.samplesperpixel in (3, 4) and page.bitspersample == 8
                if page.is_tiled and known and interleaved:
                    found.setdefault((page.imagewidth, page.imagelength), number)
    except Exception as error:  # whatever tifffile cannot parse is left to OpenSlide, which has opened the slide
        log(f"{path}: read through OpenSlide, since tifffile cannot parse it ({type(error).__name__}: {error})")
        return None
    directories = [found.get(size) for size in dimensions]
    return None if None in directories else directories  # type: ignore[return-value]


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
