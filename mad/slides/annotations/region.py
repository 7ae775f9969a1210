"""What every annotation format shares: the annotated area, its frame, and how a file's bytes are read."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely

from mad.files import MadError

MAX_BYTES = 2_000_000_000  # decompressed: more is no annotation, or an attack
CHUNK_BYTES = 1 << 20
UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    OSError,
    zlib.error,
    shapely.errors.ShapelyError,
)


@dataclass(frozen=True)
class Region:
    """One annotated area: its class name and a valid Polygon or MultiPolygon, holes kept."""

    name: str
    geometry: shapely.Geometry


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed where its name ends in `.gz`.

    Raises:
        MadError: there is no such file.
        ValueError: more than MAX_BYTES come out.
    """
    if not path.exists():
        raise MadError(
            f"{path}: no such annotation; mend its `annotation` in the cohort sheet, or leave the cell empty"
        )
    num_bytes = 0
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            num_bytes += len(chunk)
            if num_bytes > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES / 1e9:g} GB")
            yield chunk


def repaired(polygons: Sequence[shapely.Geometry] | np.ndarray) -> np.ndarray:
    """Self-crossing polygons mended, valid ones as they are; what has no area comes out empty. Object array [n]."""
    geometries = np.array(polygons, dtype=object)
    broken = ~shapely.is_valid(geometries)
    geometries[broken] = shapely.make_valid(geometries[broken], method="structure", keep_collapsed=False)
    return geometries


def in_slide_frame(regions: list[Region], bounds: tuple[int, int, int, int], size: tuple[int, int]) -> list[Region]:
    """QuPath's coordinates as level-0 pixels of the whole slide.

    QuPath shows a slide cropped to its bounds (x, y, width, height) where the file gives bounds smaller than the slide
    (MIRAX and others), and its coordinates then start at their corner.
    """
    x, y, width, height = bounds
    if (width, height) == size:
        return regions
    return [
        Region(region.name, shapely.transform(region.geometry, lambda points: np.add(points, (x, y))))
        for region in regions
    ]
