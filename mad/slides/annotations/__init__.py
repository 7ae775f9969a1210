"""Annotations of pathology programs: polygons with class names, or label masks; all in level-0 pixels of the whole slide.

| file | program | |
|---|---|---|
| `.geojson`, `.json` | QuPath | polygons |
| `.xml` | Aperio ImageScope, ASAP; the root element tells which | polygons |
| `.annotations` | HALO | polygons |
| `.png`, `.tif`, `.tiff` | any | a class per pixel value |

Polygon files may be gzipped, with `.gz` after their suffix.
"""

from __future__ import annotations

from pathlib import Path

from mad.files import MadError, Pathlike
from mad.slides.annotations.geojson import read_geojson
from mad.slides.annotations.markup import read_markup
from mad.slides.annotations.mask import LabelMask, open_mask
from mad.slides.annotations.region import Annotation, Region, check_file, in_slide_frame, num_off_slide

__all__ = [
    "Annotation",
    "LabelMask",
    "Region",
    "check_file",
    "in_slide_frame",
    "is_mask",
    "num_off_slide",
    "open_mask",
    "read_annotation",
    "read_geojson",
    "read_markup",
]


def is_mask(path: Pathlike) -> bool:
    """Whether a file name is that of a label mask (`open_mask`); others hold polygons (`read_annotation`)."""
    return Path(path).suffix.lower() in (".png", ".tif", ".tiff")


def read_annotation(
    path: Pathlike, *, bounds: tuple[int, int, int, int] | None = None, size: tuple[int, int] | None = None
) -> Annotation:
    """The annotated areas of a file, in level-0 pixels of the whole slide.

    Args:
        path: the annotation; its suffix names the format.
        bounds: x, y, width and height of the part of the slide that QuPath shows (`Reader.bounds`). QuPath's coordinates
            start at its corner, those of the other programs at the slide's. Not given: QuPath shows the whole slide.
        size: width and height of level 0, given where `bounds` is.

    Raises:
        MadError: the file is missing, damaged, too large, or of no known format.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    kind = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
    if kind in ([".geojson"], [".json"]):
        annotation = read_geojson(path)
        return annotation if bounds is None or size is None else in_slide_frame(annotation, bounds, size)
    if kind in ([".xml"], [".annotations"]):
        return read_markup(path)
    raise MadError(
        f"{path}: no known annotation format; give .geojson or .json (QuPath), .xml (Aperio ImageScope, ASAP) "
        "or .annotations (HALO), each plain or with .gz, or a label mask (.png, .tif, .tiff)"
    )
