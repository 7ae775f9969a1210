"""What the polygon formats share: the annotated area, what was found wrong with a file, its frame, and how it is read."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import shapely

from mad.files import MadError, unreadable

MAX_BYTES = 2_000_000_000  # decompressed: more is no annotation, or an attack
MAX_COORDINATE = 1e9  # px: no slide is so wide, and sums and products stay exact
CHUNK_BYTES = 1 << 20
UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    EOFError,
    gzip.BadGzipFile,
    zlib.error,
    shapely.errors.ShapelyError,
)


@dataclass(frozen=True)
class Region:
    """One annotated area: its class name and a valid Polygon or MultiPolygon, holes kept."""

    name: str
    geometry: shapely.Geometry


@dataclass(frozen=True)
class Annotation:
    """The areas of a file, and what else it held."""

    regions: list[Region]
    num_repaired: int = 0
    """Self-crossing polygons that were mended."""
    num_unnamed: int = 0
    """Areas left out for want of a class."""
    num_without_area: int = 0
    """Objects left out because they cover nothing: points, lines, rulers, areas wholly cut away."""


def annotation_of(names: Sequence[str | None], geometries: np.ndarray, num_repaired: int) -> Annotation:
    """The regions among objects with a class name (or none) and a geometry each.

    Raises:
        ValueError: a class name is not valid Unicode.
    """
    for name in set(filter(None, names)):
        name.encode()  # half a surrogate pair, which JSON can spell, could not be written to any table
    has_area = shapely.area(geometries) > 0
    areas = [(name, geometry) for name, geometry, area in zip(names, geometries, has_area, strict=True) if area]
    return Annotation(
        regions=[Region(name, geometry) for name, geometry in areas if name],
        num_repaired=num_repaired,
        num_unnamed=sum(not name for name, _ in areas),
        num_without_area=len(names) - len(areas),
    )


def check_file(path: Path) -> None:
    """Refuse what cannot be read as a file.

    Raises:
        MadError: the path is missing, no file, or not readable.
    """
    try:
        if path.is_file():
            with path.open("rb"):
                return
        what = "no file but a folder or a device" if path.exists() else "no such annotation"
    except OSError as error:
        raise MadError(
            f"{path}: cannot be opened ({error.strerror}); mend its path, or let this user read it"
        ) from None
    raise MadError(f"{path}: {what}; mend its `annotation` in the cohort sheet, or leave the cell empty")


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed where its name ends in `.gz`.

    Raises:
        MadError: the path is missing, no file, or not readable.
        ValueError: nothing comes out, or more than MAX_BYTES.
    """
    check_file(path)
    num_bytes = 0
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        while chunk := _read(file, path):
            num_bytes += len(chunk)
            if num_bytes > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES / 1e9:g} GB")
            yield chunk
    if not num_bytes:
        raise ValueError("the file is empty")


def _read(file: IO[bytes] | gzip.GzipFile, path: Path) -> bytes:
    try:
        return file.read(CHUNK_BYTES)
    except gzip.BadGzipFile:
        raise
    except OSError as error:
        raise unreadable(path, error) from None


def check_coordinates(points: np.ndarray) -> None:
    """Refuse coordinates that can be no pixel of a slide.

    Raises:
        ValueError: one is not finite, or beyond MAX_COORDINATE.
    """
    if not (np.abs(points) <= MAX_COORDINATE).all():
        raise ValueError(f"a coordinate is not finite, or beyond {MAX_COORDINATE:g} px")


def linear_rings(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Closed rings, object [n], of vertices [m, 2] and the number of vertices of each ring [n], at least 3."""
    return shapely.linearrings(points, indices=np.repeat(np.arange(len(counts)), counts))


def repaired(geometries: np.ndarray) -> tuple[np.ndarray, int]:
    """Self-crossing polygons mended, valid ones as they are; what has no area comes out empty. Object [n], number mended."""
    broken = ~shapely.is_valid(geometries)
    mended = geometries.copy()
    mended[broken] = shapely.make_valid(geometries[broken], method="structure", keep_collapsed=False)
    return mended, int((shapely.area(mended[broken]) > 0).sum())


def in_slide_frame(annotation: Annotation, bounds: tuple[int, int, int, int], size: tuple[int, int]) -> Annotation:
    """QuPath's coordinates as level-0 pixels of the whole slide.

    QuPath shows a slide cropped to its bounds (x, y, width, height) where the file gives bounds smaller than the slide
    (MIRAX and others), and its coordinates then start at their corner.
    """
    x, y, width, height = bounds
    if (width, height) == size or not annotation.regions:
        return annotation
    geometries = shapely.transform(geometries_of(annotation.regions), lambda points: np.add(points, (x, y)))
    regions = [Region(old.name, new) for old, new in zip(annotation.regions, geometries, strict=True)]
    return replace(annotation, regions=regions)


def num_off_slide(regions: Sequence[Region], size: tuple[int, int], margin_px: float = 1.0) -> tuple[int, int]:
    """How many areas lie wholly off a slide of `size` (width, height), and how many reach beyond it by over `margin_px`."""
    geometries = geometries_of(regions)
    bounds = shapely.bounds(geometries)
    crossing = (bounds[:, :2] < -margin_px).any(axis=1) | (bounds[:, 2:] > np.add(size, margin_px)).any(axis=1)
    on_slide = shapely.area(shapely.intersection(geometries[crossing], shapely.box(0, 0, *size))) > 0
    return int((~on_slide).sum()), int(on_slide.sum())


def geometries_of(regions: Sequence[Region]) -> np.ndarray:
    """Their geometries: object [n]."""
    geometries = np.empty(len(regions), dtype=object)
    geometries[:] = [region.geometry for region in regions]
    return geometries
