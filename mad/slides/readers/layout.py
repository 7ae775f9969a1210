"""Which directories of a TIFF are a slide's levels, and how their pixels are stored.

The levels below the largest image are its SubIFDs (OME-TIFF), or, where it has none, the further directories of its aspect
ratio, marked as reduced or not. Labels, macro pictures and thumbnails are none.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile

from mad.files import MadError
from mad.slides.readers.ome import OmePixels, is_ome, read_ome

JPEG, UNCOMPRESSED = 7, 1  # TIFF compressions
RGB, YCBCR = 2, 6  # TIFF photometric interpretations
MASK = 4  # bit of NewSubfileType: a transparency mask
MAX_STRIP_BYTES = 2**28
NEEDED = {256, 257, 258, 259, 262, 270, 273, 277, 279, 282, 283, 284, 296, 322, 323, 324, 325, 330, 338, 347, 34675}
"""Tags that decide what a slide is: one that cannot be read is damage, not absence."""
EXPORT = "export the slide as 8-bit RGB (QuPath: OME-TIFF of the rendered RGB image; Bio-Formats: raw2ometiff --rgb)"


@dataclass(frozen=True)
class TiffLevel:
    """One level: a grid of tiles, or of strips, which are tiles as wide as the image.

    `offsets` and `sizes` are those of the compressed tiles, row by row, plane after plane. Uncompressed strips that follow each
    other are cut into lower ones: reading a rectangle then costs its rows, however the writer cut the file.
    """

    page: Any
    width: int
    height: int
    tile_width: int
    tile_height: int
    offsets: Sequence[int]
    sizes: Sequence[int]

    @property
    def across(self) -> int:
        return -(-self.width // self.tile_width)

    @property
    def down(self) -> int:
        return -(-self.height // self.tile_height)

    @property
    def planes(self) -> int:
        """1: interleaved samples. Else the number of separate planes."""
        return self.page.samplesperpixel if self.page.planarconfig == 2 else 1


def pyramid_pages(pages: list[Any]) -> list[Any]:
    """The directories of the slide's levels, finest first, among the file's images.

    Raises:
        MadError: the largest image has a twin of the same size, so that it is one of a stack.
    """
    first = max(pages, key=_area)
    twins = sum((page.imagewidth, page.imagelength) == (first.imagewidth, first.imagelength) for page in pages)
    if twins > 1:
        raise MadError(
            f"{twins} images of the same {first.imagewidth} x {first.imagelength} px: a stack of focal planes, channels or "
            f"times; {EXPORT}"
        )
    smaller = list(first.pages or pages)
    levels = [first]
    for page in sorted(smaller, key=_area, reverse=True):
        if _area(page) < _area(levels[-1]) and _is_level(page, first):
            levels.append(page)
    return levels


def images(file: tifffile.TiffFile) -> list[Any]:
    """The top-level directories that hold an image.

    Raises:
        ValueError: there is none, or the list of directories breaks off, so that levels or the vendor's own would be missed.
    """
    pages: list[Any] = list(file.pages)
    if not pages:
        raise ValueError("no image in it")
    if _directory(file, pages[-1])[1]:
        raise ValueError(f"cut short, after {len(pages)} image(s) further ones lie beyond the file's end")
    return [page for page in pages if not page.subfiletype & MASK]


def _area(page: Any) -> int:
    return page.imagewidth * page.imagelength


def _is_level(page: Any, first: Any) -> bool:
    """Whether `page` shows what `first` shows, smaller, stored in the same way; a writer may round each side up or down."""
    width, height = first.imagewidth, first.imagelength
    same_view = abs(page.imagelength * width - page.imagewidth * height) <= 2 * max(width, height)
    return same_view and page.is_tiled == first.is_tiled and page.samplesperpixel == first.samplesperpixel


def level_of(page: Any) -> TiffLevel:
    """How the pixels of a directory are stored."""
    width, height = page.imagewidth, page.imagelength
    if page.is_tiled:
        return TiffLevel(page, width, height, page.tilewidth, page.tilelength, page.dataoffsets, page.databytecounts)
    rows = min(page.rowsperstrip, height)
    row_bytes = width * page.samplesperpixel
    if page.compression == UNCOMPRESSED and page.planarconfig == 1 and page.is_contiguous:
        rows = max(1, min(rows, 2**20 // row_bytes))
        starts = np.arange(0, height, rows)
        sizes = (np.minimum(starts + rows, height) - starts) * row_bytes
        return TiffLevel(
            page, width, height, width, rows, (page.dataoffsets[0] + starts * row_bytes).tolist(), sizes.tolist()
        )
    return TiffLevel(page, width, height, width, rows, page.dataoffsets, page.databytecounts)


def refusal(level: TiffLevel) -> str | None:
    """Why a level is not read, and what mends it; None where it is 8-bit RGB in a codec that tifffile has."""
    page = level.page
    samples, bits = page.samplesperpixel, page.bitspersample
    if samples not in (3, 4) or page.photometric not in (RGB, YCBCR):
        kind = getattr(page.photometric, "name", page.photometric)
        return f"{samples} sample(s) per pixel of kind {kind} (fluorescence? a mask?), not RGB; {EXPORT}"
    if bits != 8 or page.sampleformat != 1 or page.imagedepth != 1:
        return f"{bits}-bit {page.dtype} samples, not 8-bit RGB; {EXPORT}"
    name = getattr(page.compression, "name", page.compression)
    try:
        tifffile.TIFF.DECOMPRESSORS[page.compression]
    except KeyError:
        return f"compression {name}, which is not read; {EXPORT}"
    jpeg = page.compression == JPEG
    if (jpeg and samples != 3) or (page.photometric == YCBCR and (not jpeg or level.planes > 1)):
        return f"{samples} samples of {page.photometric.name} in compression {name}, which is not read; {EXPORT}"
    if level.tile_width * level.tile_height * samples > MAX_STRIP_BYTES:
        return (
            f"pieces of {level.tile_width} x {level.tile_height} px, each of which must be decoded whole; cut it into tiles: "
            "vips tiffsave IN OUT --tile --pyramid --bigtiff --compression jpeg --Q 90"
        )
    return None


def check_whole(file: tifffile.TiffFile, level: TiffLevel) -> None:
    """Raises ValueError where a directory has lost entries that decide what the slide is, or contradicts itself."""
    codes, _ = _directory(file, level.page)
    if lost := sorted(code for code in codes & NEEDED if code not in level.page.tags):
        raise ValueError(f"the tags {lost} of its directory cannot be read")
    size = f"{level.width} x {level.height} px in tiles of {level.tile_width} x {level.tile_height} px"
    if level.width * level.height == 0 or level.tile_width * level.tile_height > MAX_STRIP_BYTES:
        raise ValueError(size)
    wanted, found = level.across * level.down * level.planes, (len(level.offsets), len(level.sizes))
    if min(found) < wanted or found[0] != found[1]:
        raise ValueError(f"{size} are {wanted} tiles; its directory lists {found[0]} places and {found[1]} sizes")


def _directory(file: tifffile.TiffFile, page: Any) -> tuple[set[int], int]:
    """The tags that a directory lists, whether they can be read or not, and the offset of the next directory (0: none)."""
    tiff, handle = file.tiff, file.filehandle
    handle.seek(page.offset)
    (count,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
    entries = handle.read(count * tiff.tagsize)
    codes = {struct.unpack_from(tiff.byteorder + "H", entries, n * tiff.tagsize)[0] for n in range(count)}
    return codes, struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))[0]


def ome_pixels(pages: list[Any]) -> OmePixels | None:
    """What the OME-XML in the first of the file's images tells of the largest; None where there is none.

    Raises:
        MadError: it tells of a stack.
        ValueError: it is damaged.
    """
    if not is_ome(pages[0].description):
        return None
    first = max(pages, key=_area)
    pixels = read_ome(pages[0].description, first.imagewidth, first.imagelength)
    if pixels and (pixels.size_z > 1 or pixels.size_t > 1 or pixels.size_c > first.samplesperpixel):
        raise MadError(
            f"an OME-TIFF of {pixels.size_c} channel(s), {pixels.size_z} focal plane(s) and {pixels.size_t} time(s), "
            f"not one RGB image; {EXPORT}"
        )
    return pixels
