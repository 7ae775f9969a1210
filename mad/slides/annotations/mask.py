"""Label masks: a PNG or TIFF image whose pixel values are classes, at any downsample of the slide.

A mask covers the whole of level 0, and is read block by block, in memory bounded by the blocks, not by the mask.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import tifffile

from mad.files import MadError, Pathlike
from mad.slides.annotations.region import check_file

BLOCK_PX = 1 << 22
MAX_SEGMENT_BYTES = 1 << 30
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_KINDS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGB and alpha"}
LOSSLESS = ("NONE", "CCITTRLE", "CCITT_T4", "CCITT_T6", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "LZMA", "ZSTD")
PHOTOMETRICS = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.PALETTE)


@dataclass(frozen=True)
class LabelMask:
    """A mask of `width` x `height` px over a slide whose level 0 is `downsample` = (across, down) times as large."""

    path: Path
    width: int
    height: int
    downsample: tuple[float, float]

    def blocks(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Top row, left column and values, uint8 or uint16 [rows, columns], of blocks that tile the mask.

        Raises:
            MadError: the file is damaged.
        """
        try:
            yield from _png_blocks(self.path) if _is_png(self.path) else _tiff_blocks(self.path)
        except Exception as error:  # decoders raise whatever damaged bytes lead them to
            raise MadError(
                f"{self.path}: the mask's pixels cannot be decoded ({_line(error)}); export it again"
            ) from None


def open_mask(path: Pathlike, size: tuple[int, int]) -> LabelMask:
    """A label mask of a slide whose level 0 has `size` (width, height).

    Grey or palette, 1 to 16 bits; of a pyramidal TIFF the first directory.

    Raises:
        MadError: the file is missing, no PNG or TIFF, no map of classes, or of another shape than the slide.
    """
    path = Path(path)
    check_file(path)
    try:
        width, height = _png_size(path) if _is_png(path) else _tiff_size(path)
    except _UnfitError as error:
        raise MadError(
            f"{path}: no label mask: {error}; save it with one uint8 or uint16 value per pixel, lossless, as PNG or tiled TIFF"
        ) from None
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise MadError(f"{path}: no PNG or TIFF ({_line(error)}); export the mask again") from None
    if not _covers((width, height), size):
        raise MadError(
            f"{path}: the mask has {width} x {height} px, the slide {size[0]} x {size[1]}: another shape; "
            "export the mask of the whole of level 0, at any downsample"
        )
    return LabelMask(path, width, height, (size[0] / width, size[1] / height))


class _UnfitError(Exception):
    """An image that is no map of classes."""


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _covers(mask: tuple[int, int], slide: tuple[int, int]) -> bool:
    """Whether one downsample >= 1 makes the slide's size the mask's, each side rounded up or down."""
    if min(mask) < 1:
        return False
    least = max(side / (px + 1) for side, px in zip(slide, mask, strict=True))
    most = min(side / (px - 1) if px > 1 else np.inf for side, px in zip(slide, mask, strict=True))
    return least < most and most > 1


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(PNG_MAGIC)) == PNG_MAGIC


def _png_chunks(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each chunk of a PNG file (PNG specification, section 5.3).

    Raises:
        ValueError: a chunk is cut short, or its checksum does not hold.
    """
    with path.open("rb") as file:
        file.seek(len(PNG_MAGIC))
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            content = file.read(length)
            if file.read(4) != struct.pack(">I", zlib.crc32(kind + content)):
                raise ValueError(f"its part {kind!r} is damaged")
            yield kind, content


def _png_header(path: Path) -> tuple[int, int, int, int]:
    """Width, height, bit depth and colour type."""
    kind, content = next(_png_chunks(path), (b"", b""))
    if kind != b"IHDR" or len(content) != 13:
        raise ValueError("its header is damaged")
    return struct.unpack(">IIBB", content[:10])


def _png_size(path: Path) -> tuple[int, int]:
    width, height, _, colour = _png_header(path)
    if colour not in (0, 3):
        raise _UnfitError(f"its pixels are {PNG_KINDS.get(colour, f'of colour type {colour}')}")
    return width, height


def _png_blocks(path: Path) -> Iterator[tuple[int, int, np.ndarray]]:
    """Strips of a grey or palette PNG.

    libvips turns palettes into colours. Values stored under a palette are laid out as grey ones are, so the file is decoded
    with the colour type of its header set to grey and its palette left out.
    """
    width, height, depth, _ = _png_header(path)
    data = bytearray(PNG_MAGIC)
    for kind, content in _png_chunks(path):
        if kind == b"IHDR":
            content = content[:9] + b"\x00" + content[10:]
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    image = pyvips.Image.new_from_buffer(bytes(data), "", access="sequential", fail_on="error")
    region, dtype = pyvips.Region.new(image), np.dtype(np.uint16 if depth == 16 else np.uint8)
    spread = 255 // (2**depth - 1) if depth < 8 else 1  # libvips spreads fewer bits over 0..255
    step = max(1, BLOCK_PX // width)
    for top in range(0, height, step):
        strip = np.frombuffer(region.fetch(0, top, width, min(step, height - top)), dtype).reshape(-1, width)
        yield top, 0, strip // spread if spread > 1 else strip


def _tiff_size(path: Path) -> tuple[int, int]:
    with tifffile.TiffFile(path) as file:
        page = _first(file)
        if page.samplesperpixel != 1 or page.photometric not in PHOTOMETRICS:
            raise _UnfitError(
                f"it has {page.samplesperpixel} channel(s), {tifffile.PHOTOMETRIC(page.photometric).name}"
            )
        if page.imagedepth != 1 or page.dtype not in (np.bool_, np.uint8, np.uint16):
            raise _UnfitError(f"its pixels are {page.dtype}")
        compression = tifffile.COMPRESSION(page.compression).name
        if compression not in LOSSLESS:
            raise _UnfitError(f"{compression} may blur values into their neighbours'")
        if not page.is_memmappable and np.prod(page.chunks) * page.dtype.itemsize > MAX_SEGMENT_BYTES:
            raise _UnfitError(f"it is one compressed strip of {page.imagewidth} x {page.imagelength} px")
        return int(page.imagewidth), int(page.imagelength)


def _tiff_blocks(path: Path) -> Iterator[tuple[int, int, np.ndarray]]:
    """Tiles, strips, or groups of rows of the first directory."""
    with tifffile.TiffFile(path) as file:
        page = _first(file)
        if page.is_memmappable:  # bare pixels, one row after the other
            stored, step = page.dtype.newbyteorder(file.byteorder), max(1, BLOCK_PX // page.imagewidth)
            for top in range(0, page.imagelength, step):
                rows = min(step, page.imagelength - top)
                offset = page.dataoffsets[0] + top * page.imagewidth * stored.itemsize
                pixels = np.fromfile(path, stored, rows * page.imagewidth, offset=offset).reshape(rows, -1)
                yield top, 0, pixels.astype(page.dtype)
            return
        kind = np.uint8 if page.dtype == np.bool_ else page.dtype
        for segment, (_, _, top, left, _), (_, rows, columns, _) in page.segments(maxworkers=1):
            rows, columns = min(rows, page.imagelength - top), min(columns, page.imagewidth - left)
            if segment is None:  # sparse: the file does not store it
                yield top, left, np.full((rows, columns), page.nodata, kind)
            else:
                yield top, left, np.ascontiguousarray(segment[0, :rows, :columns, 0]).astype(kind, copy=False)


def _first(file: tifffile.TiffFile) -> Any:
    return file.pages.first
