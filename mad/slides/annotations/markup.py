"""The XML formats: Aperio ImageScope, HALO and ASAP.

ImageScope and HALO hold layers of regions, `Annotations/Annotation/Regions/Region/Vertices/Vertex` (HALO: `V`). A layer is a
class; a region with `NegativeROA="1"` cuts its area out of every other region of its layer. ASAP holds single outlines,
`ASAP_Annotations/Annotations/Annotation/Coordinates/Coordinate`, whose group is their class. All count level-0 pixels from the
corner of the whole slide.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import ParseError

import numpy as np
import shapely
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser

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

ROOTS = ("Annotations", "ASAP_Annotations")
RECTANGLES = ("1", "rectangle")
ELLIPSES = ("2", "ellipse")
WITHOUT_AREA = ("3", "4", "5", "ruler", "pin", "dot", "pointset", "measurement")  # ImageScope 3-5: arrow, ruler, point
NUM_ELLIPSE_VERTICES = 128  # area .04 % under the ellipse's


def read_markup(path: Pathlike) -> Annotation:
    """The areas of an ImageScope, HALO or ASAP file, plain or gzipped, one Region per outline.

    The class is the layer's name, else its description, else the region's text (ImageScope, HALO); the group, else the name
    (ASAP). Rectangles and ellipses may be given by two corners. Self-crossing outlines are repaired; outlines without a class
    or without an area (arrows, rulers, points) are left out and counted. An ASAP spline is the polygon of its control points.

    Raises:
        MadError: the file is missing, damaged, too large, declares entities, or is another kind of XML.
    """
    try:
        target = _Outlines()
        parser = DefusedXMLParser(target=target)
        parser.parser.ordered_attributes = False
        parser.parser.StartElementHandler = target.start  # expat's own events: half the time of ElementTree's
        parser.parser.EndElementHandler = target.end
        for chunk in chunks(Path(path)):
            parser.feed(chunk)
        parser.close()
        return _annotation(target)
    except DefusedXmlException as error:
        raise MadError(
            f"{path}: unsafe XML ({error}); annotations declare no entities, export it again or remove the declaration"
        ) from None
    except (*UNREADABLE, LookupError, ParseError) as error:
        raise MadError(
            f"{path}: no ImageScope, HALO or ASAP annotation ({error}); export it again, or from QuPath as GeoJSON"
        ) from None


@dataclass
class _Layer:
    name: str
    description: str = ""


@dataclass(frozen=True)
class _Outline:
    layer: _Layer
    kind: str
    text: str
    negative: bool
    start: int  # its first vertex

    @property
    def name(self) -> str:
        return self.layer.name or self.layer.description or self.text


class _Outlines:
    """Parser target that keeps vertices in flat arrays and no tree: files of millions of vertices fit in memory."""

    def __init__(self) -> None:
        self.outlines: list[_Outline] = []
        self.points = array("d")  # x, y, x, y, ...
        self.order = array("d")  # ASAP's Order of each vertex
        self._root: str | None = None
        self._layer: _Layer | None = None
        self._inside = False  # an outline

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        tag = tag.rpartition("}")[2]
        if tag in ("Vertex", "V", "Coordinate"):
            if self._inside:
                try:
                    self.points.append(float(attributes["X"]))
                    self.points.append(float(attributes["Y"]))
                except KeyError as error:
                    raise ValueError(f"a {tag} without {error}") from None
                self.order.append(float(attributes.get("Order", len(self.order))))
        elif self._root is None:
            if tag not in ROOTS:
                raise ValueError(f"<{tag}> where <{'> or <'.join(ROOTS)}> should be")
            self._root = tag
        elif tag == "Annotation":
            name, group = (attributes.get(key, "").strip() for key in ("Name", "PartOfGroup"))
            self._layer = _Layer(name if group in ("", "None") else group)
            if self._root == "ASAP_Annotations":
                self._open(self._layer, attributes)
        elif tag == "Region" and self._layer:
            self._open(self._layer, attributes)
        elif tag == "Attribute" and self._layer and not self._inside and attributes.get("Name") == "Description":
            self._layer.description = attributes.get("Value", "").strip()

    def end(self, tag: str) -> None:
        if tag.endswith(("Region", "Annotation")):
            self._inside = False

    def close(self) -> None:
        """Called by the parser at the end of the file."""

    def _open(self, layer: _Layer, attributes: Mapping[str, str]) -> None:
        negative = attributes.get("NegativeROA", "").strip().lower() in ("1", "true")
        kind, text = attributes.get("Type", "").strip().lower(), attributes.get("Text", "").strip()
        self.outlines.append(_Outline(layer, kind, text, negative, len(self.order)))
        self._inside = True


def _annotation(parsed: _Outlines) -> Annotation:
    points = np.array(parsed.points).reshape(-1, 2)
    check_coordinates(points)
    number = np.repeat(np.arange(len(parsed.outlines)), _counts(parsed))
    points = points[np.lexsort((np.array(parsed.order), number))]
    geometries, num_repaired = _polygons(parsed, points)

    layers: dict[int, tuple[list[int], list[int]]] = {}  # its outlines: positive and negative ones
    for index, outline in enumerate(parsed.outlines):
        layers.setdefault(id(outline.layer), ([], []))[outline.negative].append(index)
    for positive, negative in layers.values():
        geometries[positive] = _without(geometries[positive], geometries[negative])
    drawn = [index for positive, _ in layers.values() for index in positive]
    return annotation_of([parsed.outlines[index].name for index in drawn], geometries[drawn], num_repaired)


def _counts(parsed: _Outlines) -> np.ndarray:
    """Vertices per outline: int64 [outlines]."""
    return np.diff([*(outline.start for outline in parsed.outlines), len(parsed.order)]).astype(np.int64)


def _polygons(parsed: _Outlines, points: np.ndarray) -> tuple[np.ndarray, int]:
    """Geometries, object [outlines], of vertices [n, 2] in order: valid, or without an area; and how many were mended."""
    counts = _counts(parsed)
    kinds = np.array([outline.kind for outline in parsed.outlines], dtype=object)
    drawn = (counts >= 3) & ~np.isin(kinds, WITHOUT_AREA)
    polygons = np.full(len(counts), shapely.Polygon(), dtype=object)
    rings = linear_rings(points[np.repeat(drawn, counts)], counts[drawn])
    polygons[drawn], num_repaired = repaired(shapely.polygons(rings))
    for index in np.flatnonzero((counts == 2) & np.isin(kinds, (*RECTANGLES, *ELLIPSES))):
        corners = points[parsed.outlines[index].start :][:2]
        polygons[index] = _ellipse(corners) if kinds[index] in ELLIPSES else shapely.box(*corners.ravel())
    return polygons, num_repaired


def _ellipse(corners: np.ndarray) -> shapely.Polygon:
    """The ellipse inside the box between two corners [2, 2]."""
    angles = np.linspace(0, 2 * np.pi, NUM_ELLIPSE_VERTICES, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return shapely.Polygon(corners.mean(axis=0) + circle * np.abs(corners[1] - corners[0]) / 2)


def _without(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Each positive area less all negative ones: their union is the union of the positive less that of the negative."""
    rest = positive.copy()
    cut, cutter = shapely.STRtree(negative).query(positive, predicate="intersects")
    indices, first = np.unique(cut, return_index=True)  # `cut` is sorted
    for index, cutters in zip(indices, np.split(cutter, first[1:]), strict=False):
        rest[index] = shapely.difference(rest[index], shapely.union_all(negative[cutters]))
    return rest
