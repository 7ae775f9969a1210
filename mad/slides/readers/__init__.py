"""Pixels of a slide behind one interface: tifffile's codecs for tiled TIFFs, OpenSlide for everything else.

OpenSlide also tells the metadata. A read error is an error (`ReadError`), never white pixels; white stands only beyond the
slide's border and where a scanner recorded nothing (alpha 0).
"""

from __future__ import annotations

from pathlib import Path

from mad.files import Pathlike
from mad.slides.readers.base import Reader, ReadError
from mad.slides.readers.tiff import TiffReader, tiff_pages

__all__ = ["ReadError", "Reader", "TiffReader", "open_slide"]


def open_slide(path: Pathlike) -> Reader:
    """Open a slide with the fastest reader that decodes it exactly.

    Raises:
        MadError: the file is missing or no slide.
    """
    reader = Reader(path)
    if reader.properties.get("openslide.vendor") in ("aperio", "generic-tiff"):
        pages = tiff_pages(Path(path), reader.level_dimensions)
        if pages is not None:
            reader.close()
            return TiffReader(path, pages)
    return reader
