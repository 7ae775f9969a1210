"""From polygons or a label mask to class shares per tile, by majority vote over one class raster.

The raster is aligned with the grid: a finest tile is exactly `cells` x `cells` raster cells, so the shares of every tile at
every magnification are sums of whole blocks, exact whatever the size of the slide. A cell has the class at its centre.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import cv2
import numpy as np
import shapely

from mad.slides.annotations import LabelMask, Region
from mad.tiles.pyramid import Grid

NO_CLASS = 255
MAX_CELLS = 1 << 24  # of the raster under work at once
MAX_CROSSINGS = 1 << 22


def cells_per_tile(grid: Grid, mpp: float, wanted_mpp: float) -> int:
    """Raster cells along the side of a finest tile for a raster of about `wanted_mpp` um per cell."""
    return max(1, round(grid.finest_px * mpp / wanted_mpp))


def raster_shape(grid: Grid, cells: int) -> tuple[int, int]:
    """Rows and columns of the raster over the whole grid."""
    rows, columns = grid.level_shape(len(grid.ladder) - 1)
    return rows * cells, columns * cells


def class_raster(regions: Sequence[Region], classes: Sequence[str], grid: Grid, cells: int) -> np.ndarray:
    """Index into `classes` per raster cell, uint8 [rows, columns], NO_CLASS where no polygon holds the cell's centre.

    Polygons are drawn in reverse order of priority: where they overlap the class listed first wins. A centre on the border
    between neighbours belongs to exactly one of them.
    """
    raster = np.full(raster_shape(grid, cells), NO_CLASS, np.uint8)
    by_class: dict[str, list[shapely.Geometry]] = {}
    for region in regions:
        by_class.setdefault(region.name, []).append(region.geometry)
    for number in reversed(range(len(classes))):
        if geometries := by_class.get(classes[number]):
            _fill(raster, *_sides(geometries, (grid.left, grid.top), cells / grid.finest_px), number)
    return raster


def _sides(
    geometries: Sequence[shapely.Geometry], origin: tuple[int, int], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """The sides of all polygons, in cells counted from the centre of cell (0, 0).

    Returns:
        x and y of the upper, then of the lower end of each side, float64 [n, 4]; +1 where the polygon lies to its right, -1
        where it lies to its left, int32 [n].
    """
    parts = shapely.get_parts(geometries)
    polygons = shapely.orient_polygons(parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON])
    points, ring = shapely.get_coordinates(shapely.get_rings(polygons), return_index=True)
    points = (points - origin) * scale - 0.5
    start, end = points[:-1][ring[1:] == ring[:-1]], points[1:][ring[1:] == ring[:-1]]
    down = start[:, 1] < end[:, 1]
    sides = np.where(down[:, None], np.hstack([start, end]), np.hstack([end, start]))
    return sides, np.where(down, -1, 1).astype(np.int32)


def _fill(raster: np.ndarray, sides: np.ndarray, signs: np.ndarray, number: int) -> None:
    """Write `number` into the cells whose centre lies in any polygon, band by band, by the winding number.

    Going along a row of centres, each side crossed on the way adds its sign: the sum is the number of polygons around a
    centre (holes run the other way round). Overlaps, holes and sides far off the raster need no care.
    """
    rows, columns = raster.shape
    first, stop = (np.clip(np.ceil(sides[:, n]), 0, rows).astype(np.int64) for n in (1, 3))
    left = int(np.clip(np.floor(sides[:, ::2].min()), 0, columns))
    right = int(np.clip(np.ceil(sides[:, ::2].max()) + 1, 0, columns))
    band = max(1, MAX_CELLS // max(1, right - left))
    for top in range(int(first.min()), int(stop.max()), band):
        bottom = min(top + band, int(stop.max()))
        cover = np.zeros((bottom - top, right - left + 1), np.int32)
        begin, end = np.maximum(first, top), np.minimum(stop, bottom)
        for chosen in _portions(end - begin):
            count = end[chosen] - begin[chosen]
            row = np.arange(count.sum()) + np.repeat(begin[chosen] - (np.cumsum(count) - count), count)
            x, y, lower_x, lower_y = sides[chosen].T
            slope = (lower_x - x) / (lower_y - y)
            crossing = np.repeat(x, count) + (row - np.repeat(y, count)) * np.repeat(slope, count)
            column = np.clip(np.ceil(crossing), left, right).astype(np.int64) - left
            np.add.at(cover, (row - top, column), np.repeat(signs[chosen], count))
        np.cumsum(cover, axis=1, out=cover)
        raster[top:bottom, left:right][cover[:, :-1] > 0] = number


def _portions(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of the positive counts, in portions whose counts sum to about MAX_CROSSINGS."""
    chosen = np.flatnonzero(counts > 0)
    total = np.cumsum(counts[chosen])
    portion = total // MAX_CROSSINGS
    yield from np.split(chosen, np.flatnonzero(np.diff(portion)) + 1)


def mask_raster(
    mask: LabelMask, values: Mapping[int, str], classes: Sequence[str], grid: Grid, cells: int
) -> tuple[np.ndarray, dict[int, int]]:
    """The class raster of a label mask: each cell has the class of the mask's pixel at its centre.

    Args:
        mask: the slide's mask.
        values: class of each pixel value; pixels of other values have none.
        classes, grid, cells: as in `class_raster`.

    Returns:
        uint8 [rows, columns], NO_CLASS where there is none, and the number of the mask's pixels of each value.

    Raises:
        MadError: the mask is damaged.
    """
    raster = np.full(raster_shape(grid, cells), NO_CLASS, np.uint8)
    numbers = np.full(1 << 16, NO_CLASS, np.uint8)
    for value, name in values.items():
        numbers[value] = classes.index(name)
    across, down = mask.downsample
    step = grid.finest_px / cells
    row_of = ((grid.top + (np.arange(raster.shape[0]) + 0.5) * step) / down).astype(np.int64)
    column_of = ((grid.left + (np.arange(raster.shape[1]) + 0.5) * step) / across).astype(np.int64)
    num_px = np.zeros(1 << 16, np.int64)
    for top, left, block in mask.blocks():
        bins = np.iinfo(block.dtype).max + 1
        num_px[:bins] += cv2.calcHist([block], [0], None, [bins], [0, bins]).ravel().astype(np.int64)
        first, last = np.searchsorted(row_of, (top, top + block.shape[0]))
        start, stop = np.searchsorted(column_of, (left, left + block.shape[1]))
        picked = block[np.ix_(row_of[first:last] - top, column_of[start:stop] - left)]
        raster[first:last, start:stop] = numbers[picked]
    return raster, {int(value): int(num_px[value]) for value in np.flatnonzero(num_px)}


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
