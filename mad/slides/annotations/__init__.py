"""Annotations of pathology programs into polygons with class names, in level-0 pixels of the whole slide.

| file | program |
|---|---|
| `.geojson`, `.json` | QuPath |
| `.xml` | Aperio ImageScope, ASAP; the root element tells which |
| `.annotations` | HALO |

Each may be gzipped, with `.gz` after its suffix.
"""

from __future__ import annotations

from pathlib import Path

from mad.files import MadError, Pathlike
from mad.slides.annotations.geojson import read_geojson
from mad.slides.annotations.markup import read_markup
from mad.slides.annotations.region import Region, in_slide_frame

__all__ = ["Region", "in_slide_frame", "read_annotation", "read_geojson", "read_markup"]


def read_annotation(
    path: Pathlike, *, bounds: tuple[int, int, int, int] | None = None, size: tuple[int, int] | None = None
) -> list[Region]:
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
        regions = read_geojson(path)
        return regions if bounds is None or size is None else in_slide_frame(regions, bounds, size)
    if kind in ([".xml"], [".annotations"]):
        return read_markup(path)
    raise MadError(
        f"{path}: no known annotation format; give .geojson or .json (QuPath), .xml (Aperio ImageScope, ASAP) "
        "or .annotations (HALO), each plain or with .gz"
    )
