"""Majority vote against counting pixels one by one; the class raster against point-in-polygon."""

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import Polygon

from mad.slides.annotations import Region
from mad.tiles import labels
from mad.tiles.labels import (
    NO_CLASS,
    block_sums,
    cells_per_tile,
    class_counts,
    class_raster,
    majority,
    raster_shape,
)
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


def centres(grid: Grid, cells: int) -> np.ndarray:
    """The centre of every raster cell in level-0 px: points, object [rows, columns]."""
    rows, columns = np.indices(raster_shape(grid, cells))
    step = grid.finest_px / cells
    return shapely.points(grid.left + (columns + 0.5) * step, grid.top + (rows + 0.5) * step)


def star(rng: np.random.Generator, x: float, y: float) -> shapely.Geometry:
    """A star-shaped polygon, self-crossing ones repaired, with a hole."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
    radius = rng.uniform(20, 180, 12)
    outer = Polygon(np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1))
    return shapely.make_valid(outer).difference(shapely.box(x - 10, y - 15, x + 15, y + 10))


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(32.0, 8, 0, 0), (33.7, 5, 100, 60), (32.0, 3, 7, 0)]))
def test_a_cell_has_the_class_at_its_centre(seed: int, frame: tuple[float, int, int, int]) -> None:
    """Overlapping areas of three classes, inside and across the border, against point-in-polygon for every cell."""
    rng = np.random.default_rng(seed)
    finest_px, cells, left, top = frame
    grid = Grid(GRID.ladder, finest_px, 512, 384, left, top)
    areas = [star(rng, *rng.uniform(-100, 600, 2)) for _ in range(7)]
    regions = [Region(CLASSES[number % 3], area) for number, area in enumerate(areas)]
    raster = class_raster(regions, CLASSES, grid, cells)
    points = centres(grid, cells)
    expected = np.full(raster.shape, NO_CLASS)
    for number in (2, 1, 0):
        for area in areas[number::3]:
            expected[shapely.contains(area, points)] = number
    near = np.any([shapely.distance(shapely.boundary(area), points) < 1e-6 for area in areas], axis=0)
    assert near.mean() < 0.01
    np.testing.assert_array_equal(raster[~near], expected[~near])


def test_work_in_bands_and_portions_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    regions = [Region(CLASSES[n % 3], star(rng, *rng.uniform(0, 500, 2))) for n in range(30)]
    whole = class_raster(regions, CLASSES, GRID, 8)
    monkeypatch.setattr(labels, "MAX_CELLS", 700)
    monkeypatch.setattr(labels, "MAX_CROSSINGS", 5)
    np.testing.assert_array_equal(class_raster(regions, CLASSES, GRID, 8), whole)
    assert set(np.unique(whole)) == {0, 1, 2, NO_CLASS}


def test_neighbours_share_no_cell_and_leave_none_between() -> None:
    """A coverage whose borders run through the very centres of cells: areas add up, even on the borders."""
    rng = np.random.default_rng(2)
    x, y = np.meshgrid(np.arange(0, 513, 32), np.arange(0, 385, 32))
    x[1:-1, 1:-1] += rng.integers(-3, 4, x[1:-1, 1:-1].shape) * 4 + 2  # 4 px cells: a vertex at a centre
    y[1:-1, 1:-1] += rng.integers(-3, 4, x[1:-1, 1:-1].shape) * 4 + 2
    corners = np.stack([x, y], axis=-1)
    counts = np.zeros(raster_shape(GRID, 8), int)
    for row in range(12):
        for column in range(16):
            quad = corners[[row, row, row + 1, row + 1], [column, column + 1, column + 1, column]]
            counts += class_raster([Region("A", Polygon(quad))], CLASSES, GRID, 8) == 0
    assert (counts[:96] == 1).all()


def test_far_and_huge_polygons_cost_nothing_and_overflow_nothing() -> None:
    everything = Polygon([(-1e9, -1e9), (1e9, -1e9), (1e9, 1e9), (-1e9, 1e9)], [[(0, 0), (64, 0), (64, 64), (0, 64)]])
    raster = class_raster([Region("A", everything), Region("B", shapely.box(-5e8, 0, -4e8, 9))], CLASSES, GRID, 8)
    assert (raster[:16, :16] == NO_CLASS).all()
    raster[:16, :16] = 0
    assert (raster == 0).all()
    beside = [shapely.box(1000, 0, 2000, 400), shapely.box(0, 5000, 9, 6000), shapely.box(-9, -9, -1, -1)]
    assert (class_raster([Region("A", area) for area in beside], CLASSES, GRID, 8) == NO_CLASS).all()


def test_priority_settles_overlaps_and_the_origin_counts() -> None:
    square = Polygon([(100, 100), (228, 100), (228, 228), (100, 228)])
    raster = class_raster([Region("A", square), Region("B", square.buffer(64, join_style="mitre"))], CLASSES, GRID, 8)
    assert raster[40, 40] == 0 and raster[15, 15] == 1 and raster[80, 80] == NO_CLASS
    moved = Grid(GRID.ladder, 32.0, 512, 384, left=100, top=100)
    shifted = class_raster([Region("A", square)], CLASSES, moved, 8)
    assert (shifted[:32, :32] == 0).all() and (shifted == 0).sum() == 32 * 32


def test_raster_cells_divide_a_tile_exactly() -> None:
    assert cells_per_tile(Grid(Ladder((40.0,)), 112.0, 1, 1), 0.25, 2.0) == 14
    assert cells_per_tile(Grid(Ladder((40.0,)), 113.0, 1, 1), 0.25, 2.0) == 14
    assert cells_per_tile(Grid(Ladder((40.0,)), 16.0, 1, 1), 0.25, 100.0) == 1
