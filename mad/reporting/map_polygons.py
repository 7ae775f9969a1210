"""A predicted class map as polygons for QuPath: one annotation per class, its tiles merged."""

from __future__ import annotations

import json
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
    path: Pathlike, tiles: pd.DataFrame, colours: dict[str, str], origin: tuple[float, float] = (0, 0)
) -> None:
    """Write a GeoJSON FeatureCollection in level-0 pixels, which QuPath imports as annotations.

    Args:
        path: of the file.
        tiles: x y side (level-0 px) and `predicted` (class name or null), of one slide and magnification.
        colours: `#rrggbb` per class; classes that no tile has are left out.
        origin: x and y of the slide's bounds, from where QuPath counts.
    """
    tiles = tiles.reset_index(drop=True)
    side, features = float(tiles["side"].median()), []
    spans = [_spans(tiles[axis].to_numpy(float), side) for axis in ("x", "y")]
    for name, colour in colours.items():
        mine = tiles[(tiles["predicted"] == name).fillna(False)]
        if not len(mine):
            continue
        (left, right), (top, bottom) = ((starts[mine.index], ends[mine.index]) for starts, ends in spans)
        x, y = origin
        merged = shapely.coverage_union_all(shapely.box(left - x, top - y, right - x, bottom - y)).simplify(0)
        features.append(
            {
                "type": "Feature",
                "geometry": shapely.geometry.mapping(merged),
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": name, "color": list(rgb(colour))},
                },
            }
        )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def _spans(starts: Floats, side: float) -> tuple[Floats, Floats]:
    """First and last pixel edge of each tile [n]: where the next one starts, so that neighbours share an edge."""
    cells = cell_numbers(starts, side)
    start_of = dict(zip(cells.tolist(), starts.tolist(), strict=True))
    ends = [start_of.get(cell + 1, start + side) for cell, start in zip(cells.tolist(), starts.tolist(), strict=True)]
    return starts, np.array(ends)
