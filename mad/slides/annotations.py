"""Annotations: QuPath GeoJSON into polygons with class names, in level-0 pixels."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.geometry import shape

from mad.files import MadError, Pathlike

MAX_BYTES = 2_000_000_000  # decompressed: more is no annotation, or an attack
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zlib.error)


@dataclass(frozen=True)
class Region:
    """One annotated area: its class name and a valid Polygon or MultiPolygon, holes kept."""

    name: str
    geometry: shapely.Geometry


def read_geojson(path: Pathlike) -> list[Region]:
    """The areas of a QuPath GeoJSON export: a FeatureCollection, a list of features or one feature, plain or gzipped.

    The class is `properties.classification.name` (or `classification` as a string, or the last of `names`). Self-crossing
    polygons are repaired; features without a class or without an area (points, lines) are left out.

    Raises:
        MadError: the file is missing, damaged, too large, or no GeoJSON.
    """
    path = Path(path)
    if not path.exists():
        raise MadError(
            f"{path}: no such annotation; mend its `annotation` in the cohort sheet, or leave the cell empty"
        )
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES / 1e9:.0f} GB")
        content = json.loads(text)
        features = content.get("features", [content]) if isinstance(content, dict) else content
        named = [
            (name, feature["geometry"])
            for feature in features
            if (name := _class_name(feature.get("properties"))) and feature["geometry"] is not None
        ]
        geometries = shapely.make_valid(
            [shape(geometry) for _, geometry in named], method="structure", keep_collapsed=False
        )
    except (*UNREADABLE, shapely.errors.ShapelyError) as error:
        raise MadError(
            f"{path}: no QuPath GeoJSON ({error}); export it from QuPath with File > Export objects"
        ) from None
    pairs = zip((name for name, _ in named), geometries, strict=True)
    return [Region(name, geometry) for name, geometry in pairs if geometry.area > 0]


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


def _class_name(properties: dict[str, Any] | None) -> str | None:
    classification = (properties or {}).get("classification")
    if isinstance(classification, dict):
        return classification.get("name") or next(iter(reversed(classification.get("names", []))), None)
    return classification
