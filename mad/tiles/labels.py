"""From annotated polygons to class shares per tile, by majority vote over one class raster.

The raster is aligned with the grid: a finest tile is exactly `cells` x `cells` raster cells, so the shares of every tile at
every magnification are sums of whole blocks, exact whatever the size of the slide.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import shapely

from mad.slides.annotations import Region
from mad.tiles.pyramid import Grid

NO_CLASS = 255
SUBPIXEL_BITS = 6


def cells_per_tile(grid: Grid, mpp: float, wanted_mpp: float) -> int:
    """Raster cells along the side of a finest tile for a raster of about `wanted_mpp` um per cell."""
    return max(1, round(grid.finest_px * mpp / wanted_mpp))


def raster_shape(grid: Grid, cells: int) -> tuple[int, int]:
    """Rows and columns of the raster over the whole grid."""
    rows, columns = grid.level_shape(len(grid.ladder) - 1)
    return rows * cells, columns * cells


def class_raster(regions: Sequence[Region], classes: Sequence[str], grid: Grid, cells: int) -> np.ndarray:
    """Index into `classes` per raster cell, uint8 [rows, columns], NO_CLASS where no polygon lies.

    Polygons are drawn in reverse order of priority: where they overlap the class listed first wins. OpenCV paints a
    polygon's boundary too, so areas come out about half a cell larger on each side.
    """
    raster = np.full(raster_shape(grid, cells), NO_CLASS, np.uint8)
    scale = cells / grid.finest_px
    for number in reversed(range(len(classes))):
        for region in regions:
            if region.name != classes[number]:
                continue
            for polygon in shapely.get_parts(region.geometry):
                if polygon.geom_type == "Polygon":
                    rings = [_ring(ring, grid, scale) for ring in (polygon.exterior, *polygon.interiors)]
                    cv2.fillPoly(raster, rings, number, cv2.LINE_8, SUBPIXEL_BITS)
    return raster


def _ring(ring: shapely.LinearRing, grid: Grid, scale: float) -> np.ndarray:
    """Ring vertices as fixed-point raster coordinates; OpenCV counts from the centre of cell (0, 0)."""
    points = (shapely.get_coordinates(ring) - (grid.left, grid.top)) * scale - 0.5
    return np.round(points * (1 << SUBPIXEL_BITS)).astype(np.int32)


def block_sums(mask: np.ndarray, cells: int) -> np.ndarray:
    """Sum of a raster [rows * cells, columns * cells] over each cells x cells block: int64 [rows, columns]."""
    rows, columns = mask.shape[0] // cells, mask.shape[1] // cells
    return mask.reshape(rows, cells, columns, cells).sum(axis=(1, 3), dtype=np.int64)


def class_counts(raster: np.ndarray, num_classes: int, cells: int) -> np.ndarray:
    """Raster cells of each class per finest tile: int64 [rows, columns, num_classes]."""
    return np.stack([block_sums(raster == number, cells) for number in range(num_classes)], axis=-1)


def majority(shares: np.ndarray, min_annotated: float) -> tuple[np.ndarray, np.ndarray]:
    """The majority class and its share of a tile.

    Args:
        shares: share of the tile's area that each class covers, [..., num_classes].
        min_annotated: least sum of shares that gives a label.

    Returns:
        Index of the class (int, -1 for none; ties go to the class listed first) and its share of the tile.
    """
    label = shares.argmax(axis=-1)
    share = shares.max(axis=-1)
    labelled = (shares.sum(axis=-1) >= min_annotated - 1e-9) & (share > 0)
    return np.where(labelled, label, -1), np.where(labelled, share, 0.0)
