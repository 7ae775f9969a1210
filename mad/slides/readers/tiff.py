"""Tiled TIFFs, every compressed tile fetched and decoded once per read, by libjpeg or tifffile's codecs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tifffile

from mad.files import Pathlike
from mad.progress import log
from mad.slides.readers.base import Reader, ReadError

JPEG, LOSSLESS = 7, {1, 5, 8, 32773, 32946}  # TIFF compressions; lossless: none, LZW, deflate, PackBits, old deflate
RGB, YCBCR = 2, 6  # TIFF photometric interpretations


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


def tiff_pages(path: Path, dimensions: list[tuple[int, int]]) -> list[int] | None:
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
