"""Areas with classes as polygons for QuPath; of a class map one annotation per class, its tiles merged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import shapely
from numpy.typing import NDArray

from mad.files import Pathlike, atomic_path
from mad.metrics.maps import cell_numbers
from mad.reporting.overlay import rgb

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


def write_map(
    path: Pathlike, tiles: pd.DataFrame, colours: Mapping[str, str], origin: tuple[float, float] = (0, 0)
) -> None:
    """Write a GeoJSON FeatureCollection in level-0 pixels, which QuPath imports as annotations.

    Args:
        path: of the file.
        tiles: x y side (level-0 px) and `predicted` (class name or null), of one slide and magnification.
        colours: `#rrggbb` per class; classes that no tile has are left out.
        origin: x and y of the slide's bounds, from where QuPath counts.
    """
    tiles = tiles.reset_index(drop=True)
    side, areas = float(tiles["side"].median()), []
    spans = [_spans(tiles[axis].to_numpy(float), side) for axis in ("x", "y")]
    for name in colours:
        mine = tiles[(tiles["predicted"] == name).fillna(False)]
        if not len(mine):
            continue
        (left, right), (top, bottom) = ((starts[mine.index], ends[mine.index]) for starts, ends in spans)
        x, y = origin
        merged = shapely.coverage_union_all(shapely.box(left - x, top - y, right - x, bottom - y)).simplify(0)
        areas.append((name, merged))
    write_areas(path, areas, colours)


def write_areas(path: Pathlike, areas: Iterable[tuple[str, shapely.Geometry]], colours: Mapping[str, str]) -> None:
    """Write areas with their class, in QuPath's coordinates, as a GeoJSON FeatureCollection of annotations."""
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(geometry),
            "properties": {
                "objectType": "annotation",
                "classification": {"name": name, "color": list(rgb(colours[name]))},
            },
        }
        for name, geometry in areas
    ]
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def _spans(starts: Floats, side: float) -> tuple[Floats, Floats]:
    """First and last pixel edge of each tile [n]: where the next one starts, so that neighbours share an edge."""
    cells = cell_numbers(starts, side)
    start_of = dict(zip(cells.tolist(), starts.tolist(), strict=True))
    ends = [start_of.get(cell + 1, start + side) for cell, start in zip(cells.tolist(), starts.tolist(), strict=True)]
    return starts, np.array(ends)
