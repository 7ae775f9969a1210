"""The annotation of a synthetic slide: its class map as polygons, the way a neuropathologist would hand it over from QuPath."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import shapely

from mad.slides.synthetic.layout import CELL_PX, CLASSES, Layout

COLOURS = ((120, 190, 130), (235, 165, 90), (90, 130, 200), (225, 215, 150))
SMOOTHING_PX = 16.0


def class_polygons(layout: Layout) -> list[shapely.Geometry]:
    """One (multi)polygon per class of `CLASSES`, level-0 px; neighbours share their borders, glass is left open.

    The stairs of the grid are smoothed by at most a grid cell, shared borders alike.
    """
    shapes = [_squares(layout.classes == number) for number in range(len(CLASSES))]
    return list(shapely.coverage_simplify(np.array(shapes), SMOOTHING_PX))


def _squares(mask: np.ndarray) -> shapely.Geometry:
    """The union of the grid cells of a mask, level-0 px."""
    boxes = []
    for row, line in enumerate(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)):
        starts, stops = (np.flatnonzero(np.diff(line) == sign) for sign in (1, -1))
        boxes.append(shapely.box(starts * CELL_PX, row * CELL_PX, stops * CELL_PX, (row + 1) * CELL_PX))
    return shapely.union_all(np.concatenate(boxes))


def feature_collection(slide_id: str, layout: Layout) -> dict[str, Any]:
    """A QuPath GeoJSON object: one annotation per polygon, holes kept; glass has no polygon."""
    features = []
    for name, colour, shape in zip(CLASSES, COLOURS, class_polygons(layout), strict=True):
        for number, polygon in enumerate(shapely.get_parts(shapely.normalize(shape))):
            rings = [polygon.exterior, *polygon.interiors]
            features.append(
                {
                    "type": "Feature",
                    "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{slide_id}/{name}/{number}")),
                    "geometry": {
                        "type": "Polygon",
                        "coordinates": [[[int(x), int(y)] for x, y in ring.coords] for ring in rings],
                    },
                    "properties": {
                        "objectType": "annotation",
                        "classification": {"name": name, "color": list(colour)},
                    },
                }
            )
    return {"type": "FeatureCollection", "features": features}
