"""Odd pyramids and ladders: the plan of any slide is exact, and says what it is made from."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mad.files import MadError
from mad.slides.scale import ROUNDING_PX, SAME_DOWNSAMPLE, ScalePlan, plan_scale

LADDERS = [(2.5, 10.0, 40.0), (5.0, 20.0), (5.0, 10.0, 20.0), (1.25, 10.0), (40.0,)]
PYRAMIDS = [[1.0], [1.0, 2.0, 4.0, 8.0], [1.0, 4.0, 16.0], [1.0, 3.9999, 16.0012], [1.0, 4.0012, 15.9988, 32.01]]


LONGER_PX = 20_000


def plan(mpp: float, downsamples: list[float], ladder: tuple[float, ...] = LADDERS[0], **options: object) -> ScalePlan:
    given = {"mpp": mpp, "level_downsamples": downsamples, "magnifications": ladder, "tile_px": 224}
    return plan_scale(**{"longer_px": LONGER_PX, **given, **options})  # type: ignore[arg-type]


def sources(result: ScalePlan) -> list[tuple[int, bool, str]]:
    return [(level.level, level.native, level.pyramid) for level in result.levels]


@pytest.mark.parametrize(
    ("mpp", "downsamples", "ladder", "finest_px", "expected"),
    [
        # 80x: two of its pixels make one at 40x; no level is its own 40x, so that is averaged from level 0
        (0.125, [1.0, 4.0, 16.0], (2.5, 10.0, 40.0), 448, [(2, False, "scanner"), (1, False, "scanner"), (0, False, "area")]),
        # 80x with a level at 2: native from there on
        (0.125, [1.0, 2.0, 8.0, 32.0], (2.5, 10.0, 40.0), 448, [(3, True, "scanner"), (2, True, "scanner"), (1, True, "scanner")]),
        # 40x on the ladder of XMAG
        (0.2524, [1.0, 4.0, 16.0], (5.0, 20.0), 448, [(1, False, "scanner"), (0, False, "area")]),
        (0.2524, [1.0, 2.0, 4.0, 8.0], (5.0, 10.0, 20.0), 448, [(3, True, "scanner"), (2, True, "scanner"), (1, True, "scanner")]),
        # 20x on a ladder that ends at 20x
        (0.499, [1.0, 3.9999], (5.0, 20.0), 224, [(1, True, "scanner"), (0, True, "scanner")]),
    ],
)  # fmt: skip
def test_slides_that_keep_their_own_grid(
    mpp: float, downsamples: list[float], ladder: tuple[float, ...], finest_px: int, expected: list[tuple]
) -> None:
    result = plan(mpp, downsamples, ladder)
    assert result.keeps_pixel_grid and result.finest_px == finest_px
    assert sources(result) == expected


@pytest.mark.parametrize("mpp", [0.357, 0.499, 0.6, 1.0])
def test_28x_20x_and_coarser_scans_lie_on_a_grid_in_micrometres(mpp: float) -> None:
    result = plan(mpp, [1.0, 4.0, 16.0])
    assert not result.keeps_pixel_grid
    assert result.finest_px * mpp == pytest.approx(224 * 0.25)
    assert not any(level.native for level in result.levels)
    assert [level.available for level in result.levels] == [10 / m * 1.12 >= mpp for m in LADDERS[0]]


def test_levels_are_whole_downsamples_but_for_the_rounding_of_their_size() -> None:
    """Levels that are shrunk once more too: 4.0012 taken at its word lies 6 px of level 0 beside at the far end."""
    result = plan(0.125, [1.0, 4.0012, 15.9988])
    assert [level.level_downsample for level in result.levels] == [16.0, 4.0, 1.0]
    assert not any(level.native for level in result.levels)
    assert plan(0.25, [1.0, 3.5]).levels[1].level_downsample == 3.5


@pytest.mark.parametrize(
    ("width", "level_width", "whole"),
    [
        (10_000, 2499, True),  # 4.0016
        (120_001, 30_000, True),
        (120_000, 29_998, True),  # even: 4.00027
        (120_000, 29_991, False),  # 4.0012, where rounding gives 30,000 px
        (24_000, 6023, False),  # 3.9847
        (2000, 502, True),  # the same ratio of a small slide: two pixels
    ],
)
def test_another_ratio_is_not_taken_for_a_whole_number(width: int, level_width: int, whole: bool) -> None:
    found = plan(0.25, [1.0, width / level_width], longer_px=width).levels[1]
    assert (found.level, found.native, found.pyramid) == (1, whole, "scanner")
    assert found.level_downsample == (4.0 if whole else width / level_width)


def test_dropped_means_never_enlarged() -> None:
    """A slide that does not keep its own grid is coarser than 40x by more than the tolerance: 40x is dropped, not enlarged."""
    for mpp in (0.2801, 0.282, 0.285):
        assert [level.available for level in plan(mpp, [1.0]).levels] == [True, True, False]


def test_area_never_reads_a_level_of_the_scanner() -> None:
    result = plan(0.25, [1.0, 4.0, 16.0], pyramid="area")
    assert sources(result) == [(0, False, "area"), (0, False, "area"), (0, True, "scanner")]


@given(st.floats(0.1, 1.2), st.sampled_from(PYRAMIDS), st.sampled_from(LADDERS), st.sampled_from(["scanner", "area"]))
def test_every_plan_is_sound(mpp: float, downsamples: list[float], ladder: tuple[float, ...], pyramid: str) -> None:
    if mpp > 1.12 * 10 / ladder[0]:
        with pytest.raises(MadError, match="coarser than every magnification"):
            plan(mpp, downsamples, ladder, pyramid=pyramid)
        return
    result = plan(mpp, downsamples, ladder, pyramid=pyramid)
    finest_mpp = 10 / ladder[-1]
    for magnification, level in zip(ladder, result.levels, strict=True):
        got = mpp * level.downsample
        assert abs(got * magnification / 10 - 1) <= (0.12 if result.keeps_pixel_grid else 1e-9)
        assert level.downsample == pytest.approx(result.levels[-1].downsample * ladder[-1] / magnification, rel=1e-12)
        assert downsamples[level.level] <= max(
            level.downsample * (1 + SAME_DOWNSAMPLE), 1.0
        )  # never enlarged from coarser
        if level.native:
            assert abs(LONGER_PX / downsamples[level.level] - LONGER_PX / level.downsample) <= ROUNDING_PX
        if pyramid == "area":
            assert level.level == 0
        assert not level.available or level.downsample >= 1 / 1.12 - 1e-12
    if result.keeps_pixel_grid:
        assert result.finest_px == int(result.finest_px) >= 224
        assert all(level.available for level in result.levels)
    else:
        assert math.isclose(result.finest_px * mpp, 224 * finest_mpp)
