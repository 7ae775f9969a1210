"""Regions: every tile with tissue in exactly one, nested, its centre exact in one frame for all magnifications."""

from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from fake_regions import TILE_PX, cases, grid_of
from hypothesis import given, settings

from mad.files import MadError
from mad.slides.scale import plan_scale
from mad.tiles.index import tile_table
from mad.tiles.pyramid import Grid, Ladder, parse_tile_id, tile_id
from mad.tiles.regions import COLUMNS, EVERY_PLACE, region_table


@settings(max_examples=50)
@given(cases())
def test_regions_partition_the_tiles_with_tissue_and_nest(case: tuple[Ladder, pd.DataFrame, int, list[float]]) -> None:
    ladder, tiles, side, chosen = case
    found = region_table(tiles, ladder, TILE_PX, side, chosen)
    kept = sorted(chosen) or list(ladder.magnifications)
    wanted = tiles[(tiles["status"] == "ok") & tiles["magnification"].isin(kept)]
    assert list(found) == list(COLUMNS)
    assert sorted(found["tile_id"]) == sorted(wanted["tile_id"])  # each once, nothing else
    top = ladder.magnifications.index(kept[0])
    mpp = dict(zip(tiles["tile_id"], tiles["mpp"], strict=True))
    for row in found.itertuples():
        index = parse_tile_id(row.tile_id)[1]
        coarsest = index[: top + 2]  # of its ancestors in the region
        _, i, j = ladder.position(coarsest)
        corner = ladder.index(top, i // side * side, j // side * side)
        assert row.region == tile_id("S", corner)
        assert kept[row.scale] == row.magnification == ladder.magnifications[len(index) - 2]
        _, y, x = ladder.position(index)
        side_um = Fraction(mpp[row.tile_id]) * TILE_PX
        assert row.side_um == float(side_um)
        assert (row.x_um, row.y_um) == (float((x + Fraction(1, 2)) * side_um), float((y + Fraction(1, 2)) * side_um))
        region_um = side * side_um * ladder.span(top) / ladder.span(len(index) - 2)
        assert abs(row.region_x_um - (j // side + 0.5) * float(region_um)) < 1e-9 * float(region_um)
        assert (
            abs(row.x_um - row.region_x_um) < float(region_um) / 2 and abs(row.y_um - row.region_y_um) < region_um / 2
        )


@settings(max_examples=50)
@given(cases())
def test_a_place_is_one_square_at_every_magnification(case: tuple[Ladder, pd.DataFrame, int, list[float]]) -> None:
    """Two tiles of a region bear the same number exactly where they have the same ancestor at the level of the places."""
    ladder, tiles, side, chosen = case
    found = region_table(tiles, ladder, TILE_PX, side, chosen)
    kept = sorted(chosen) or list(ladder.magnifications)
    levels = [ladder.magnifications.index(magnification) for magnification in kept]
    level = levels[1] if side == 1 and len(levels) > 1 else levels[0]
    for _, region in found.groupby("region"):
        indices = [parse_tile_id(name)[1] for name in region["tile_id"]]
        for index, place in zip(indices, region["place"], strict=True):
            assert (place == EVERY_PLACE) == (len(index) - 2 < level)
        pairs = [
            (index[: level + 2], place) for index, place in zip(indices, region["place"], strict=True) if place >= 0
        ]
        assert len({place for _, place in pairs}) == len({ancestor for ancestor, _ in pairs}) == len(set(pairs))


@pytest.mark.parametrize(
    ("ladder", "side", "tokens"),
    [((5.0, 10.0, 20.0), 4, [16, 64, 256]), ((2.5, 10.0, 40.0), 1, [1, 16, 256]), ((5.0, 20.0), 2, [4, 64])],
)
def test_whole_regions_have_the_published_numbers_of_tokens(
    ladder: tuple[float, ...], side: int, tokens: list[int]
) -> None:
    found = region_table(grid_of(Ladder(ladder), 4, 4, 0.25, 0, 0), Ladder(ladder), TILE_PX, side)
    counts = found.groupby(["region", "scale"]).size().unstack().to_numpy()
    assert len(counts) == (4 // side) ** 2 and (counts == tokens).all()
    assert found.groupby("region", sort=False)["scale"].apply(lambda scales: scales.is_monotonic_increasing).all()


@pytest.mark.parametrize("mpp", [0.25, 0.2465, 0.5021])
def test_micrometres_are_those_of_the_slides_pixels(mpp: float) -> None:
    """Against x, y and side of a real tile table, which are whole level-0 pixels: less than one apart."""
    magnifications = [2.5, 10.0, 40.0] if mpp < 0.4 else [2.5, 10.0]
    plan = plan_scale(
        mpp=mpp, level_downsamples=[1.0], longer_px=700, magnifications=magnifications, tile_px=TILE_PX, tolerance=0.12,
        on_missing="drop", pyramid="area", slide="S",
    )  # fmt: skip
    ladder = Ladder(tuple(magnifications))
    grid = Grid(ladder, plan.finest_px, 700, 500)
    cells = grid.level_shape(len(ladder) - 1)
    tiles = tile_table(
        "S", grid, plan, np.ones(cells, np.int64), np.zeros((*cells, 1), np.int64), (1, 1), ["A"], min_tissue=0.1, min_annotated=0.5
    )  # fmt: skip
    found = region_table(tiles, ladder, TILE_PX).merge(tiles, on="tile_id")
    assert len(found) > 20
    for um, corner in (("x_um", "x"), ("y_um", "y")):
        pixels = found[corner] + found["side"] / 2
        assert (pixels * mpp - found[um]).abs().max() < mpp


def test_nothing_and_nonsense() -> None:
    ladder = Ladder((5.0, 20.0))
    empty = region_table(grid_of(ladder, 2, 2, 0.5, 1.0, 0), ladder, TILE_PX)
    assert len(empty) == 0 and {name: str(empty[name].dtype) for name in COLUMNS} == COLUMNS
    with pytest.raises(MadError, match=r"\[10\.0\] are not of the ladder"):
        region_table(grid_of(ladder, 1, 1, 0.5, 0, 0), ladder, TILE_PX, 1, [5.0, 10.0])
