"""Pixels of a slide behind one interface: tifffile's codecs for TIFFs, OpenSlide for vendors' formats (docs/slides.md).

A read error is an error (`ReadError`), never white pixels; white stands only beyond the slide's border and where a scanner
recorded nothing (alpha 0, tiles of 0 bytes).
"""

from __future__ import annotations

import logging
import os
from itertools import islice
from pathlib import Path
from typing import Any

import openslide

from mad.files import MadError, Pathlike, file_stamp
from mad.slides.readers.base import IccChoice, Reader, ReadError
from mad.slides.readers.tiff import TiffReader, open_aperio, open_tiff
from mad.slides.readers.vendor import OpenSlideReader

__all__ = ["IccChoice", "OpenSlideReader", "ReadError", "Reader", "TiffReader", "open_slide", "slide_stamp"]

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would say is raised, with the slide's name
TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")


def open_slide(path: Pathlike, icc: IccChoice = "keep") -> Reader:
    """Open a slide with the fastest reader that decodes it exactly.

    Args:
        icc: "keep" gives pixels as they are stored, "apply" converts them to sRGB by the slide's ICC profile.

    Raises:
        MadError: there is no slide at `path` that can be read; the message tells the cause.
    """
    path = Path(path)
    head = _head(path)
    vendor = openslide.OpenSlide.detect_format(path)
    if vendor in (None, "generic-tiff"):
        if head in TIFF_MAGIC:
            return open_tiff(path, icc)
        if vendor is None:
            raise MadError(
                f"{path}: no slide that can be read: neither a TIFF nor of a whole-slide format that OpenSlide knows (it starts "
                f"with {head!r}); convert it to OME-TIFF, with QuPath or bioformats2raw and raw2ometiff, or copy it anew"
            )
    reader = OpenSlideReader(path, icc)
    if vendor == "aperio" and (faster := open_aperio(path, reader, icc)):
        reader.close()
        return faster
    return reader


def slide_stamp(path: Pathlike) -> list[Any] | None:
    """`file_stamp` of a slide and, of a MIRAX slide, of all in the folder of its name, where its pixels are; None if gone."""
    path = Path(path)
    stamp = file_stamp(path)
    if stamp is None or path.suffix.lower() != ".mrxs":
        return stamp
    return [*stamp, *(file_stamp(file) for file in sorted(path.with_suffix("").glob("*")))]


def _head(path: Path) -> bytes:
    """The first four bytes of a slide's file.

    Raises:
        MadError: there is no file, or none that can be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except FileNotFoundError:
        raise MadError(f"{path}: no such slide; mend its `path` in the cohort sheet") from None
    except IsADirectoryError:
        raise MadError(
            f"{path}: a folder, no slide; put a file of it in the sheet's `path`{_suggestion(path)} (any file of a DICOM series)"
        ) from None
    except OSError as error:
        raise MadError(f"{path}: cannot be read ({error.strerror}); mend its permissions, or copy it anew") from None
    if not head:
        raise MadError(f"{path}: an empty file (0 bytes); copy it anew")
    return head


def _suggestion(folder: Path) -> str:
    """The first slide of a folder, as a part of a sentence."""
    try:
        files = sorted(islice((entry.path for entry in os.scandir(folder) if entry.is_file()), 100))
    except OSError:
        return ""
    slides = (file for file in files if openslide.OpenSlide.detect_format(file))
    found = next(slides, None)
    return f", for one {found}" if found else ""
