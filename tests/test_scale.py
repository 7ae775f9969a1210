"""Scale: where um/px comes from, and which level gives which magnification."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mad.files import MadError
from mad.slides.scale import plan_scale, read_scale

LADDER = [2.5, 10.0, 40.0]


def plan(mpp: float, downsamples: list[float], **options: object):  # type: ignore[no-untyped-def]
    given = {
        "mpp": mpp,
        "level_downsamples": downsamples,
        "longer_px": 20_000,
        "magnifications": LADDER,
        "tile_px": 224,
    }
    return plan_scale(**given, **options)  # type: ignore[arg-type]


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


def vendor(x: object, y: object) -> dict[str, str]:
    return {"openslide.mpp-x": str(x), "openslide.mpp-y": str(y)}


def ome(x: object, unit_x: str | None, y: object, unit_y: str | None) -> dict[str, str]:
    found = {"ome.PhysicalSizeX": str(x), "ome.PhysicalSizeY": str(y)}
    units = {"ome.PhysicalSizeXUnit": unit_x, "ome.PhysicalSizeYUnit": unit_y}
    return found | {name: unit for name, unit in units.items() if unit is not None}


TAGS = {"tiff.XResolution": "20000", "tiff.YResolution": "20000", "tiff.ResolutionUnit": "centimeter"}


@pytest.mark.parametrize(
    ("value", "unit", "mpp"),
    [
        (0.25, None, 0.25),
        (0.25, "µm", 0.25),
        (0.25, "\u03bcm", 0.25),
        (250, "nm", 0.25),
        (2.5e-4, "mm", 0.25),
        (2.5e-5, "cm", 0.25),
        (2.5e-7, "m", 0.25),
        (1e-5, "in", 0.254),
        (1e-5, "inch", 0.254),
        (0.01, "thou", 0.254),
    ],
)
def test_ome_units(value: float, unit: str | None, mpp: float) -> None:
    scale = read_scale({**ome(value, unit, value, unit), **TAGS}, None, "s")
    assert (scale.mpp, scale.source) == (pytest.approx(mpp), "OME-XML")


@pytest.mark.parametrize("unit", ["pixel", "reference frame", "furlong", ""])
def test_units_that_are_no_length_leave_the_scale_to_the_tags(unit: str) -> None:
    scale = read_scale({**ome(1, unit, 1, unit), **TAGS}, None, "s")
    assert (scale.mpp, scale.source) == (pytest.approx(0.5), "TIFF resolution")


def test_each_axis_has_its_own_unit() -> None:
    assert read_scale(ome(250, "nm", 0.25, "µm"), None, "s").mpp == pytest.approx(0.25)


def test_the_most_trusted_source_wins_and_absurd_ones_are_passed_over() -> None:
    assert read_scale({**vendor(0.4, 0.4), **ome(0.3, "µm", 0.3, "µm"), **TAGS}, None, "s").source == "vendor property"
    assert read_scale({**vendor(0, 0), **ome(0.3, "µm", 0.3, "µm"), **TAGS}, None, "s").mpp == pytest.approx(0.3)
    assert read_scale({**vendor("nan", 0.2), **ome(1, "m", 1, "m"), **TAGS}, None, "s").mpp == pytest.approx(0.5)


def test_a_decimal_comma_is_understood() -> None:
    assert read_scale(vendor("0,2520", "0,2520"), None, "s").mpp == pytest.approx(0.252)


@pytest.mark.parametrize(
    "value", ["0", "-0.25", "nan", "inf", "-inf", "1e-9", "352.8", "", "forty", "0.25 um", "1,024.5"]
)
def test_what_is_no_scale_is_refused_by_name(value: str) -> None:
    with pytest.raises(MadError, match="`mpp` column of the cohort sheet"):
        read_scale({**vendor(value, value), "openslide.objective-power": "40"}, None, "s")
    assert read_scale(vendor(value, value), 0.25, "s").warning is None


def test_the_absurd_value_is_told() -> None:
    with pytest.raises(MadError, match="no physical scale, only TIFF resolution 352.8 x 352.8 um/px"):
        read_scale(
            {**TAGS, "tiff.ResolutionUnit": "inch", "tiff.XResolution": "72", "tiff.YResolution": "72"}, None, "s"
        )


@pytest.mark.parametrize("mpp", [0.0, -1.0, math.nan, math.inf, 100.0])
def test_an_absurd_sheet_is_refused(mpp: float) -> None:
    with pytest.raises(MadError, match="the cohort sheet says"):
        read_scale(vendor(0.25, 0.25), mpp, "s")


@given(st.floats(0.03, 5), st.floats(1, 1.2), st.booleans())
def test_pixels_that_are_not_square(x: float, ratio: float, upright: bool) -> None:
    """Up to 1 %: taken as they are. Up to 5 %: warned of. Beyond: refused, unless the sheet says that they are square."""
    properties = vendor(x * ratio, x) if upright else vendor(x, x * ratio)
    if ratio > 1.0501:
        with pytest.raises(MadError, match="not square.*`mpp` column"):
            read_scale(properties, None, "s")
    elif ratio < 1.0499:
        scale = read_scale(properties, None, "s")
        assert scale.mpp == pytest.approx(x * math.sqrt(ratio))
        if abs(ratio - 1.01) > 1e-4:
            assert (scale.warning is not None) == (ratio > 1.01)
    given_by_sheet = read_scale(properties, x, "s")
    assert given_by_sheet.mpp == x
    if ratio > 1.0101:
        assert given_by_sheet.warning and given_by_sheet.warning.endswith("the sheet wins")


@given(
    st.dictionaries(
        st.sampled_from([*vendor(0, 0), *ome(0, "", 0, ""), *TAGS, "openslide.objective-power"]),
        st.one_of(st.text(max_size=8), st.floats().map(str), st.sampled_from(["µm", "nm", "inch", "centimeter"])),
    ),
    st.one_of(st.none(), st.floats()),
)
def test_any_metadata_give_a_physical_scale_or_an_error(properties: dict[str, str], sheet: float | None) -> None:
    try:
        scale = read_scale(properties, sheet, "s")
    except MadError as error:
        assert "`mpp`" in str(error)
    else:
        assert 0.019 < scale.mpp < 20.001
        assert sheet is None or scale.mpp == sheet
