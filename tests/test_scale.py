"""Scale: where um/px comes from, and which level gives which magnification."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mad.files import MadError
from mad.slides.scale import plan_scale, read_scale

LADDER = [2.5, 10.0, 40.0]


def plan(mpp: float, downsamples: list[float], **options: object):  # type: ignore[no-untyped-def]
    return plan_scale(mpp=mpp, level_downsamples=downsamples, magnifications=LADDER, tile_px=224, **options)  # type: ignore[arg-type]


def test_a_40x_scan_keeps_its_own_pixels() -> None:
    """Aperio's 0.2524 um/px lies within 12 % of 0.25; level downsamples are printed as 3.9999 and 16.0006."""
    result = plan(0.2524, [1.0, 3.9999, 16.0006])
    assert result.keeps_pixel_grid and result.finest_px == 224
    assert [(level.level, level.native, level.level_downsample) for level in result.levels] == [
        (2, True, 16.0),
        (1, True, 4.0),
        (0, True, 1.0),
    ]


def test_a_missing_level_is_shrunk_from_the_next_finer_one() -> None:
    result = plan(0.25, [1.0, 2.0, 8.0])
    assert [(level.level, level.native, level.level_downsample) for level in result.levels] == [
        (2, False, 8.0),
        (1, False, 2.0),
        (0, True, 1.0),
    ]


def test_area_takes_everything_from_level_0() -> None:
    assert [level.level for level in plan(0.25, [1.0, 4.0, 16.0], pyramid="area").levels] == [0, 0, 0]


def test_a_20x_scan_gives_its_coarser_pairs() -> None:
    result = plan(0.499, [1.0])
    assert not result.keeps_pixel_grid
    assert [level.available for level in result.levels] == [True, True, False]
    assert result.finest_px == pytest.approx(224 * 0.25 / 0.499)
    assert [level.available for level in plan(0.499, [1.0], on_missing="upsample").levels] == [True, True, True]
    with pytest.raises(MadError, match="40x asks for 0.25 um/px, the slide has 0.499"):
        plan(0.499, [1.0], on_missing="fail")


@given(st.floats(0.1, 1.0), st.lists(st.floats(1.5, 40), max_size=4))
def test_no_level_is_ever_coarser_than_wanted(mpp: float, downsamples: list[float]) -> None:
    levels = [1.0, *sorted(downsamples)]
    for level in plan(mpp, levels).levels:
        assert levels[level.level] <= max(level.downsample * 1.005, 1.0)
        assert not (level.native and abs(levels[level.level] / level.downsample - 1) > 0.005)


def test_the_sheet_wins_with_a_warning() -> None:
    vendor = {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5"}
    scale = read_scale(vendor, 0.25, "s")
    assert (scale.mpp, scale.source) == (0.25, "cohort sheet")
    assert scale.warning and "the sheet wins" in scale.warning
    assert read_scale(vendor, 0.51, "s").warning is None
    assert read_scale(vendor, None, "s").source == "vendor property"


def test_tiff_resolution_is_a_scale_only_where_it_is_physical() -> None:
    tags = {"tiff.XResolution": "40000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "centimeter"}
    assert read_scale(tags, None, "s").mpp == pytest.approx(0.25)
    for wrong in (
        {},
        {**tags, "tiff.ResolutionUnit": "none"},
        {**tags, "tiff.XResolution": "72", "tiff.YResolution": "72"},
    ):
        with pytest.raises(MadError, match="`mpp` column of the cohort sheet"):
            read_scale(wrong, None, "s")
