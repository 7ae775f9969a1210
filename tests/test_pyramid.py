"""Properties of the index (i, j, k, m) and of the grid, for any ladder and any slide."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mad.tiles.pyramid import Grid, Ladder, parent, parse_tile_id, tile_id

LADDERS = st.sampled_from(
    [(2.5, 10.0, 40.0), (5.0, 20.0), (5.0, 10.0, 20.0), (1.25, 2.5, 10.0, 40.0), (10.0,), (4.0, 12.0)]
)
SLIDE_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,30}", fullmatch=True)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    ladder = Ladder(draw(LADDERS))
    finest = draw(st.one_of(st.integers(16, 256).map(float), st.floats(16, 256)))
    size = st.integers(1, 9000)
    return Grid(ladder, finest, draw(size), draw(size), draw(st.integers(0, 500)), draw(st.integers(0, 500)))


@st.composite
def grids_with_index(draw: st.DrawFn) -> tuple[Grid, tuple[int, ...]]:
    grid = draw(grids())
    level = draw(st.integers(0, len(grid.ladder) - 1))
    head = (draw(st.integers(0, 50)), draw(st.integers(0, 50)))
    return grid, head + tuple(draw(st.integers(0, step**2 - 1)) for step in grid.ladder.steps[:level])


def test_the_paper_s_numbering() -> None:
    """4 x 4 children, row-major: child 6 is in row 1, column 2."""
    ladder = Ladder((2.5, 10.0, 40.0))
    assert ladder.steps == (4, 4)
    assert ladder.span(0) == 16
    assert ladder.position((3, 5, 6)) == (1, 3 * 4 + 1, 5 * 4 + 2)
    assert ladder.position((3, 5, 6, 15)) == (2, (3 * 4 + 1) * 4 + 3, (5 * 4 + 2) * 4 + 3)
    assert len(ladder.children((0, 0))) == 16
    assert ladder.children((0, 0, 1, 2)) == []
    assert ladder.transition(1) == "10x-40x"
    assert ladder.mpp(0) == 4.0


@given(grids_with_index())
def test_index_and_position_are_inverse(case: tuple[Grid, tuple[int, ...]]) -> None:
    grid, index = case
    level, row, column = grid.ladder.position(index)
    assert grid.ladder.index(level, row, column) == index
    many = grid.ladder.index(level, np.array([row, row]), np.array([column, column]))
    assert [tuple(int(part[n]) for part in many) for n in range(2)] == [index, index]


@given(SLIDE_IDS, grids_with_index())
def test_ids_round_trip(slide: str, case: tuple[Grid, tuple[int, ...]]) -> None:
    assert parse_tile_id(tile_id(slide, case[1])) == (slide, case[1])


@pytest.mark.parametrize("text", ["S01", "S01_L1_0_2", "S01_L0_0", "_L0_1_2", "S01_L0_1_-2", "S01_L0_1_2_"])
def test_other_texts_are_no_ids(text: str) -> None:
    with pytest.raises(ValueError, match="no tile id"):
        parse_tile_id(text)


@given(grids_with_index())
def test_children_tile_their_parent_exactly(case: tuple[Grid, tuple[int, ...]]) -> None:
    """Every pixel of a parent belongs to exactly one child, and no child reaches beyond, at any place of the grid."""
    grid, index = case
    children = grid.ladder.children(index)
    x, y, width, height = map(int, grid.rectangle(*grid.ladder.position(index)))
    covered = np.zeros((height, width), int)
    for child in children:
        assert parent(child) == index
        cx, cy, cw, ch = map(int, grid.rectangle(*grid.ladder.position(child)))
        assert x <= cx and y <= cy and cx + cw <= x + width and cy + ch <= y + height
        covered[cy - y : cy - y + ch, cx - x : cx - x + cw] += 1
    assert not children or (covered == 1).all()


@given(grids(), st.integers(0, 400))
def test_edges_never_drift(grid: Grid, position: int) -> None:
    """Every edge lies within half a pixel of its exact place, however far from the origin."""
    for level in range(len(grid.ladder)):
        exact = position * grid.ladder.span(level) * grid.finest_px
        assert abs(int(grid.edge(level, position)) - exact) <= 0.5 + 1e-6


@given(grids())
def test_the_grid_covers_the_slide_and_no_more(grid: Grid) -> None:
    rows, columns = grid.shape
    assert grid.edge(0, rows) >= grid.height and grid.edge(0, columns) >= grid.width
    assert grid.touches(0, rows - 1, columns - 1)
    assert not grid.touches(0, 0, columns) and not grid.touches(0, rows, 0)


def test_a_ladder_needs_integer_steps() -> None:
    for wrong in [(10.0, 2.5), (10.0, 15.0), (10.0, 10.0)]:
        with pytest.raises(ValueError, match="integer factor"):
            Ladder(wrong)
