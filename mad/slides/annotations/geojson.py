"""QuPath GeoJSON into regions."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from mad.files import MadError, Pathlike
from mad.slides.annotations.region import (
    UNREADABLE,
    Annotation,
    annotation_of,
    check_coordinates,
    chunks,
    linear_rings,
    repaired,
)

WITHOUT_AREA = ("Point", "MultiPoint", "LineString", "MultiLineString")
Ring = list[list[float]]


def read_geojson(path: Pathlike) -> Annotation:
    """The areas of a QuPath GeoJSON export: a FeatureCollection, a list of features or one feature, plain or gzipped.

    The class is that of `properties.classification`, under the name that QuPath shows (`_class_name`). Objects that QuPath
    wrote inside others (`properties.childObjects`, by scripts that export the hierarchy) count like all others. Self-crossing
    polygons are repaired; features without a class or without an area (points, lines) are left out and counted.
    Coordinates are as the file gives them: `in_slide_frame` moves them to the whole slide.

    Raises:
        MadError: the file is missing, damaged, too large, or no GeoJSON.
    """
    try:
        with _no_garbage_collection():
            content = json.loads(b"".join(chunks(Path(path))))
            outermost = content.get("features", [content]) if isinstance(content, dict) else content
            features = list(_with_children(outermost))
            names = [_class_name((feature.get("properties") or {}).get("classification")) for feature in features]
            return annotation_of(names, *repaired(_areas([feature["geometry"] for feature in features])))
    except UNREADABLE as error:
        raise MadError(
            f"{path}: no QuPath GeoJSON ({_told(error)}); export it from QuPath with File > Export objects"
        ) from None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of lists of numbers form no cycles, yet Python searches them again and again: two thirds of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _told(error: BaseException) -> str:
    return f"a feature lacks {error}" if isinstance(error, KeyError) else str(error)


def _with_children(features: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Features, each followed by those inside it."""
    for feature in features:
        yield feature
        yield from _with_children((feature.get("properties") or {}).get("childObjects") or ())


def _class_name(classification: Any) -> str | None:
    """A class as QuPath shows it (its `PathClass.toString`): `Tumor: Necrosis` for one that is derived from another.

    QuPath writes `name`, of a derived class all `names`, outermost first; before version 0.4 its last `name` and its
    `parentClass`. Other programs write a text.
    """
    if isinstance(classification, dict):
        parent, name = classification.get("parentClass"), classification.get("name")
        names = [parent, name] if name else classification.get("names") or ()
        return ": ".join(filter(None, map(_class_name, names))) or None
    if classification and not isinstance(classification, str):
        raise ValueError(f"the class name {str(classification)[:80]} is no text")
    return classification or None


def _areas(geometries: list[dict[str, Any] | None]) -> np.ndarray:
    """GeoJSON geometries as MultiPolygons, empty where they have no area: object [n]."""
    polygons: list[list[Ring]] = []
    owner: list[int] = []
    for number, geometry in enumerate(geometries):
        for polygon in _polygons(geometry):
            if polygon and len(polygon[0]) >= 3:
                polygons.append([ring for ring in polygon if len(ring) >= 3])
                owner.append(number)
    rings = list(chain.from_iterable(polygons))
    points = _points(chain.from_iterable(rings))
    check_coordinates(points)
    closed = linear_rings(points, np.array([len(ring) for ring in rings], np.int64))
    num_rings = np.array([len(polygon) for polygon in polygons], np.int64)
    parts = shapely.polygons(closed, indices=np.repeat(np.arange(len(polygons)), num_rings))
    areas = np.full(len(geometries), shapely.MultiPolygon(), dtype=object)
    numbers, indices = np.unique(np.array(owner, np.int64), return_inverse=True)
    areas[numbers] = shapely.multipolygons(parts, indices=indices)
    return areas


def _polygons(geometry: dict[str, Any] | None) -> list[list[Ring]]:
    """The rings of each polygon of a GeoJSON geometry (RFC 7946, section 3.1); none where it is null or has no area."""
    kind = geometry["type"] if geometry is not None else "Point"
    if geometry is None or kind in WITHOUT_AREA:
        return []
    if kind == "Polygon":
        return [geometry["coordinates"]]
    if kind == "MultiPolygon":
        return geometry["coordinates"]
    if kind == "GeometryCollection":
        return [polygon for part in geometry["geometries"] for polygon in _polygons(part)]
    raise ValueError(f"a geometry of type {str(kind)[:80]!r}")


def _points(points: Iterable[list[float]]) -> np.ndarray:
    """Positions as float64 [n, 2]; heights are dropped."""
    points = list(points)
    lengths = set(map(len, points))
    if min(lengths, default=2) < 2:
        raise ValueError("a position of fewer than two numbers")
    if lengths - {2}:
        points = [point[:2] for point in points]
    return np.fromiter(chain.from_iterable(points), np.float64, 2 * len(points)).reshape(-1, 2)
