"""Majority vote against counting pixels one by one; the class raster against point-in-polygon."""

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import Polygon

from mad.slides.annotations import Region
from mad.tiles.labels import NO_CLASS, block_sums, cells_per_tile, class_counts, class_raster, majority
from mad.tiles.pyramid import Grid, Ladder

GRID = Grid(Ladder((10.0, 40.0)), 32.0, 512, 384)
CLASSES = ["A", "B", "C"]


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]))
def test_shares_equal_a_count_of_every_cell(seed: int, span: int) -> None:
    """Class counts of any block, at either level, are those of a loop over its cells; the vote is Python's max."""
    rng = np.random.default_rng(seed)
    cells = 3
    raster = rng.choice([0, 1, 2, NO_CLASS], size=(4 * cells, 8 * cells)).astype(np.uint8)
    counts = class_counts(raster, 3, cells)
    coarse = np.stack([block_sums(counts[..., c], span) for c in range(3)], axis=-1)
    for row in range(coarse.shape[0]):
        for column in range(coarse.shape[1]):
            size = span * cells
            block = raster[row * size : (row + 1) * size, column * size : (column + 1) * size]
            expected = [sum(int(cell) == c for cell in block.ravel()) for c in range(3)]
            assert coarse[row, column].tolist() == expected
            label, share = majority(coarse[row, column] / size**2, 0.5)
            if sum(expected) < 0.5 * size**2:
                assert label == -1 and share == 0
            else:
                assert label == expected.index(max(expected))  # the first of equals
                assert share == pytest.approx(max(expected) / size**2)


def test_no_annotation_is_no_label() -> None:
    label, share = majority(np.array([[0.0, 0.0], [0.3, 0.3], [0.2, 0.2]]), 0.5)
    assert label.tolist() == [-1, 0, -1]
    assert share.tolist() == [0.0, 0.3, 0.0]


@given(st.integers(0, 2**32 - 1))
def test_the_raster_holds_what_lies_in_the_polygon(seed: int) -> None:
    """Every cell whose centre is clearly inside (outside) a star-shaped polygon with a hole is (is not) of its class."""
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
    radius = rng.uniform(60, 180, 12)
    outer = np.stack([250 + radius * np.cos(angle), 190 + radius * np.sin(angle)], axis=1)
    hole = Polygon([(240, 180), (265, 180), (265, 205), (240, 205)])
    area = shapely.make_valid(Polygon(outer)).difference(hole)
    cells = 8
    raster = class_raster([Region("B", area)], CLASSES, GRID, cells)
    size = 32 / cells
    rows, columns = np.indices(raster.shape)
    centres = shapely.points((columns + 0.5) * size, (rows + 0.5) * size)
    inside, near = shapely.contains(area, centres), shapely.distance(shapely.boundary(area), centres) < 1.5 * size
    assert (raster[inside & ~near] == 1).all()
    assert (raster[~inside & ~near] == NO_CLASS).all()


def test_priority_settles_overlaps_and_the_origin_counts() -> None:
    square = Polygon([(100, 100), (228, 100), (228, 228), (100, 228)])
    raster = class_raster([Region("A", square), Region("B", square.buffer(64, join_style="mitre"))], CLASSES, GRID, 8)
    assert raster[40, 40] == 0 and raster[15, 15] == 1 and raster[80, 80] == NO_CLASS
    moved = Grid(GRID.ladder, 32.0, 512, 384, left=100, top=100)
    shifted = class_raster([Region("A", square)], CLASSES, moved, 8)
    assert (shifted[:31, :31] == 0).all() and (shifted[34:, 34:] == NO_CLASS).all()


def test_raster_cells_divide_a_tile_exactly() -> None:
    assert cells_per_tile(Grid(Ladder((40.0,)), 112.0, 1, 1), 0.25, 2.0) == 14
    assert cells_per_tile(Grid(Ladder((40.0,)), 113.0, 1, 1), 0.25, 2.0) == 14
    assert cells_per_tile(Grid(Ladder((40.0,)), 16.0, 1, 1), 0.25, 100.0) == 1
