"""TIFFs, every compressed tile fetched and decoded once, by libjpeg or tifffile's codecs."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import simplejpeg
import tifffile

from mad.files import MadError, StorageError, unreadable
from mad.progress import log
from mad.slides.readers.base import IccChoice, Reader, ReadError
from mad.slides.readers.layout import (
    JPEG,
    UNCOMPRESSED,
    YCBCR,
    TiffLevel,
    check_whole,
    images,
    level_of,
    ome_pixels,
    pyramid_pages,
    refusal,
)
from mad.slides.readers.lzw import LZW, decode_lzw

APERIO_CODECS = {JPEG, UNCOMPRESSED, LZW, 8, 32773, 32946}  # and deflate, PackBits, old deflate: no JPEG 2000
CACHE_BYTES = 80_000_000  # the footprint of a 2.5x tile of 224 px over 40x, with the tiles at its rim
Found = TypeVar("Found")
ASSOCIATED, UNASSOCIATED = 1, 2  # kinds of a fourth sample that are an alpha channel


class TiffReader(Reader):
    """Pixels of a TIFF: every compressed tile, or strip, is fetched and decoded once, and the last ones used are kept.

    Several times faster than OpenSlide (benchmarks/readers.py) and as strict: any fault that libjpeg remarks on is an error.
    `levels` tells how each level is stored.
    """

    def __init__(
        self,
        path: Path,
        file: tifffile.TiffFile,
        levels: Sequence[TiffLevel],
        properties: Mapping[str, str],
        icc: IccChoice,
    ) -> None:
        self._tiff = file
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            file.close()
            raise unreadable(path, error) from None
        self._size = os.fstat(self._descriptor).st_size
        self.levels = list(levels)
        self._decoded: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._decoded_bytes = 0
        page = levels[0].page
        try:
            super().__init__(
                path,
                properties=properties,
                level_dimensions=[(level.width, level.height) for level in levels],
                profile=page.iccprofile,
                icc=icc,
            )
        except MadError:
            self.close()
            raise
        for number, level in enumerate(levels):
            places = zip(level.offsets, level.sizes, strict=True)
            if beyond := sum(offset + size > self._size for offset, size in places):
                log(
                    f"{path}: cut short, {beyond} of {len(level.sizes)} tiles of level {number} lie beyond the file's end"
                )

    def storage_tile(self, level: int) -> tuple[int, int]:
        return self.levels[level].tile_width, self.levels[level].tile_height

    def _decode(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        stored = self.levels[level]
        out = np.empty((height, width, 3), np.uint8)
        for row in range(y // stored.tile_height, (y + height - 1) // stored.tile_height + 1):
            for column in range(x // stored.tile_width, (x + width - 1) // stored.tile_width + 1):
                try:
                    tile = self._recall(level, row, column)
                except (StorageError, MemoryError):
                    raise
                except Exception as error:  # a damaged stream fails in as many ways as there are codecs
                    cause = f"tile in row {row}, column {column}: {type(error).__name__}: {error}"
                    raise ReadError(
                        f"{self.path}: level {level}, {width} x {height} px at ({x}, {y}): {cause}"
                    ) from error
                left, top = column * stored.tile_width, row * stored.tile_height
                x0, y0 = max(x, left), max(y, top)
                x1, y1 = min(x + width, left + stored.tile_width), min(y + height, top + stored.tile_height)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _recall(self, level: int, row: int, column: int) -> np.ndarray:
        """`_tile`, from memory where it is one of the last used."""
        key = (level, row, column)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        tile = self._decoded[key] = self._tile(self.levels[level], row, column)
        self._decoded_bytes += tile.nbytes
        while self._decoded_bytes > CACHE_BYTES and len(self._decoded) > 1:
            self._decoded_bytes -= self._decoded.popitem(last=False)[1].nbytes
        return tile

    def _tile(self, level: TiffLevel, row: int, column: int) -> np.ndarray:
        """One tile, decoded: RGB [rows, columns, 3], at least as far as the image goes; white where none was recorded (0 bytes)."""
        height = min(level.tile_height, level.height - row * level.tile_height)
        width = min(level.tile_width, level.width - column * level.tile_width)
        number = row * level.across + column
        planes = []
        for plane in range(level.planes):
            place = number + plane * level.across * level.down
            if level.sizes[place] == 0:
                return np.full((height, width, 3), 255, np.uint8)
            pixels = self._samples(level, place, height)
            if not (height <= pixels.shape[0] <= level.tile_height and width <= pixels.shape[1] <= level.tile_width):
                raise ValueError(f"decodes to {pixels.shape}")
            planes.append(pixels)
        return _over_white(planes[0] if level.planes == 1 else np.concatenate(planes, axis=-1), level.page.extrasamples)

    def _samples(self, level: TiffLevel, place: int, height: int) -> np.ndarray:
        """The decoded samples of the compressed piece number `place`: [rows, columns, samples]."""
        page, size = level.page, level.sizes[place]
        try:
            data = os.pread(self._descriptor, min(size, self._size), level.offsets[place])
        except OSError as error:
            raise unreadable(self.path, error) from None
        if len(data) != size:
            raise EOFError(f"the file is cut short: it ends after {len(data)} of the tile's {size} bytes")
        if page.compression == JPEG:
            jpeg = _complete_jpeg(data, page.jpegtables, page.photometric)
            return simplejpeg.decode_jpeg(jpeg, "RGB" if level.planes == 1 else "GRAY", strict=True)
        rows = level.tile_height if page.is_tiled else height
        samples = page.samplesperpixel if level.planes == 1 else 1
        if page.compression == UNCOMPRESSED:
            return np.frombuffer(data, np.uint8).reshape(rows, level.tile_width, samples)
        if page.compression == LZW:
            return decode_lzw(data, rows, level.tile_width, samples, page.predictor)
        return page.decode(data, place)[0][0]

    def close(self) -> None:
        self._tiff.close()
        os.close(self._descriptor)


def _over_white(pixels: np.ndarray, extra: Sequence[int]) -> np.ndarray:
    """RGB of decoded samples; where the fourth is an alpha channel, what it leaves open is white."""
    rgb = pixels[..., :3]
    if not extra or extra[0] not in (ASSOCIATED, UNASSOCIATED) or pixels[..., 3].min() == 255:
        return rgb
    alpha = pixels[..., 3:].astype(np.uint16)
    if extra[0] == ASSOCIATED:
        return np.minimum(rgb + (255 - alpha), 255).astype(np.uint8)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _complete_jpeg(data: bytes, tables: bytes | None, photometric: int) -> bytes:
    """A TIFF tile as a JPEG file: with the directory's tables, and an Adobe marker that tells RGB from YCbCr.

    What the stream says of itself comes after it and wins: Bio-Formats writes JFIF, hence YCbCr, under the tag RGB.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG stream")
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([photometric == YCBCR])
    return b"".join((b"\xff\xd8", adobe, tables[2:-2] if tables else b"", memoryview(data)[2:]))


def open_tiff(path: Path, icc: IccChoice = "keep") -> TiffReader:
    """Open a TIFF that is no vendor's own format: OME-TIFF, or any of 8-bit RGB, tiled or in strips, pyramid or not.

    Raises:
        MadError: it is damaged, or no 8-bit RGB image.
    """
    file, (levels, properties) = _parse(path, _describe)
    return TiffReader(path, file, levels, properties, icc)


def open_aperio(path: Path, reader: Reader, icc: IccChoice) -> TiffReader | None:
    """An Aperio slide, its levels and properties as OpenSlide found them; None where its pixels are left to OpenSlide.

    OpenSlide knows Aperio's thumbnail, label and macro picture from its levels, and decodes their JPEG 2000.

    Raises:
        MadError: it is damaged.
    """

    def find_levels(file: tifffile.TiffFile) -> list[TiffLevel]:
        tiled = {(page.imagewidth, page.imagelength): page for page in reversed(images(file)) if page.is_tiled}
        levels = [level_of(tiled[size]) for size in reader.level_dimensions]
        for level in levels:
            check_whole(file, level)
        return levels

    file, levels = _parse(path, find_levels)
    if all(level.page.compression in APERIO_CODECS and not refusal(level) for level in levels):
        return TiffReader(path, file, levels, reader.properties, icc)
    file.close()
    return None


def _parse(path: Path, describe: Callable[[tifffile.TiffFile], Found]) -> tuple[tifffile.TiffFile, Found]:
    """An open TIFF and what `describe` says of it. tifffile fails in many ways on a damaged directory: all are one error here.

    Raises:
        MadError: the file is damaged, or `describe` refuses it.
    """
    file = None
    try:
        file = tifffile.TiffFile(path)
        return file, describe(file)
    except Exception as error:
        if file:
            file.close()
        if isinstance(error, MadError):
            raise MadError(f"{path}: {error}") from None
        if isinstance(error, OSError) and error.errno:
            raise unreadable(path, error) from None
        if isinstance(error, MemoryError):
            raise
        raise MadError(
            f"{path}: no slide that can be read (TIFF: {type(error).__name__}: {error}); is the file whole? Copy it anew"
        ) from error


def _describe(file: tifffile.TiffFile) -> tuple[list[TiffLevel], dict[str, str]]:
    """Levels and properties of a TIFF that is no vendor's own format."""
    found = images(file)
    ome, pages = ome_pixels(found), pyramid_pages(found)
    levels = [level_of(page) for page in pages]
    if fault := refusal(levels[0]):
        raise MadError(fault)
    levels = [level for level in levels if not refusal(level)]
    for level in levels:
        check_whole(file, level)
    return levels, _properties(pages[0]) | (ome.properties | {"openslide.vendor": "ome-tiff"} if ome else {})


def _properties(page: Any) -> dict[str, str]:
    """Properties of a TIFF under OpenSlide's names."""
    found = {"openslide.vendor": "generic-tiff"}
    for name in ("XResolution", "YResolution"):
        numerator, denominator = page.tags.valueof(name) or (0, 0)
        if denominator:
            found[f"tiff.{name}"] = repr(numerator / denominator)
    unit = page.tags.valueof("ResolutionUnit", default=2)
    found["tiff.ResolutionUnit"] = {2: "inch", 3: "centimeter"}.get(int(unit), "none")
    return found
