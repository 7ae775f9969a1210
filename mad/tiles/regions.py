"""Regions: nested grids of tiles at several magnifications, out of a tile table. Pure, vectorised, no I/O.

A region is a square of `side` x `side` tiles of the coarsest magnification together with every tile of the finer ones inside it:
under the ladder [5, 10, 20], side 4 gives 16 + 64 + 256 tiles. Blank tiles and those on the slide's border are left out, so that
a region has as many rows as it has tissue. Its *places* are its tiles at the coarsest magnification of which it can hold
several (the coarsest but for side 1): what lies in a place, at any magnification, shows the same tissue.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mad.files import MadError
from mad.tiles.index import DIGITS
from mad.tiles.pyramid import Ladder, tile_id

EVERY_PLACE = -1  # of the one tile that covers the whole region
COLUMNS = {
    "region": "string",
    "tile_id": "string",
    "magnification": "float64",
    "scale": "int64",
    "place": "int64",
    "x_um": "float64",
    "y_um": "float64",
    "side_um": "float64",
    "region_x_um": "float64",
    "region_y_um": "float64",
}


def region_table(
    tiles: pd.DataFrame, ladder: Ladder, tile_px: int, side: int = 1, magnifications: Sequence[float] = ()
) -> pd.DataFrame:
    """Every tile with tissue and its region.

    Args:
        tiles: the tile table of one slide (tile_id, slide_id, magnification, mpp, i, j, k, m, status).
        ladder: that the tiles were cut by.
        tile_px: side of a tile in its own pixels.
        side: of a region, in tiles of the coarsest of `magnifications`.
        magnifications: of the ladder; none: all.

    Returns:
        One row per `ok` tile of these magnifications, region by region (row by row of the slide), coarsest first: `region` (tile id
        of its top left coarsest tile, whether or not that one is `ok`), `tile_id`, `magnification`, `scale` (number among the
        magnifications, 0 the coarsest), `place` (number of the region's place that it lies in, row-major; -1 where it covers
        all), centre `x_um`, `y_um` in micrometres from the grid's corner, exact and in one frame for all magnifications,
        `side_um`, and the centre of the region's square, `region_x_um`, `region_y_um`.

    Raises:
        MadError: a magnification is none of the ladder's.
    """
    chosen = sorted(magnifications) or list(ladder.magnifications)
    if unknown := sorted(set(chosen) - set(ladder.magnifications)):
        raise MadError(f"regions: {unknown} are not of the ladder {list(ladder.magnifications)}")
    levels = [ladder.magnifications.index(magnification) for magnification in chosen]
    top, span = levels[0], side * ladder.span(levels[0])  # side of a region in finest tiles
    parts = []
    for scale, level in enumerate(levels):
        own = tiles[(tiles["status"] == "ok") & (tiles["magnification"] == chosen[scale])]
        _, row, column = ladder.position(tuple(own[name].to_numpy(np.int64) for name in DIGITS[: level + 2]))
        side_um = own["mpp"].to_numpy(np.float64) * tile_px
        first = ladder.span(level)  # finest tiles per tile
        place_level = levels[min(int(side == 1), len(levels) - 1)]
        part = pd.DataFrame({"tile_id": own["tile_id"].to_numpy(), "slide_id": own["slide_id"].to_numpy()})
        part["row"], part["column"] = row * first // span, column * first // span
        part["magnification"], part["scale"], part["side_um"] = chosen[scale], scale, side_um
        part["x_um"], part["y_um"] = (column + 0.5) * side_um, (row + 0.5) * side_um
        region_um = span / first * side_um
        part["region_x_um"], part["region_y_um"] = (part["column"] + 0.5) * region_um, (part["row"] + 0.5) * region_um
        part["place"] = _place(ladder, level, place_level, row, column, span)
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    table = table.sort_values(["row", "column", "scale"], kind="stable", ignore_index=True)
    corners = table[["slide_id", "row", "column"]].drop_duplicates()
    names = {
        (row, column): tile_id(slide, tuple(map(int, ladder.index(top, row * side, column * side))))
        for slide, row, column in corners.itertuples(index=False, name=None)
    }
    table["region"] = [names[place] for place in zip(table["row"], table["column"], strict=True)]
    return table.astype(COLUMNS)[list(COLUMNS)]


def _place(ladder: Ladder, level: int, place_level: int, row: np.ndarray, column: np.ndarray, span: int) -> np.ndarray:
    """Number of the place, row-major in its region of `span` finest tiles, in which each tile of `level` lies."""
    own, size = ladder.span(level), ladder.span(place_level)
    if own > size:
        return np.full(len(row), EVERY_PLACE)
    return (row * own % span // size) * (span // size) + column * own % span // size
