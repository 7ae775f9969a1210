"""QuPath GeoJSON into regions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shapely.geometry import shape

from mad.files import MadError, Pathlike
from mad.slides.annotations.region import UNREADABLE, Region, chunks, repaired


def read_geojson(path: Pathlike) -> list[Region]:
    """The areas of a QuPath GeoJSON export: a FeatureCollection, a list of features or one feature, plain or gzipped.

    The class is `properties.classification.name` (or `classification` as a string, or the last of `names`). Self-crossing
    polygons are repaired; features without a class or without an area (points, lines) are left out. Coordinates are as
    the file gives them: `in_slide_frame` moves them to the whole slide.

    Raises:
        MadError: the file is missing, damaged, too large, or no GeoJSON.
    """
    try:
        content = json.loads(b"".join(chunks(Path(path))))
        features = content.get("features", [content]) if isinstance(content, dict) else content
        named = [
            (name, feature["geometry"])
            for feature in features
            if (name := _class_name(feature.get("properties"))) and feature["geometry"] is not None
        ]
        geometries = repaired([shape(geometry) for _, geometry in named])
    except UNREADABLE as error:
        raise MadError(
            f"{path}: no QuPath GeoJSON ({error}); export it from QuPath with File > Export objects"
        ) from None
    pairs = zip((name for name, _ in named), geometries, strict=True)
    return [Region(name, geometry) for name, geometry in pairs if geometry.area > 0]


def _class_name(properties: dict[str, Any] | None) -> str | None:
    classification = (properties or {}).get("classification")
    if isinstance(classification, dict):
        return classification.get("name") or next(iter(reversed(classification.get("names", []))), None)
    return classification
