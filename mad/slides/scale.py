"""Physical scale: from a slide's metadata to which of its pixels make which magnification. Pure, no I/O.

A magnification is a name for a scale: mpp = 10 / magnification, so 40x = 0.25 um/px. What a scanner calls "20x" is at most
a label. The scale of a slide is never guessed: a slide without one fails with a message that tells how to give it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mad.files import MadError

MICRONS_PER_UNIT = {"centimeter": 10_000.0, "inch": 25_400.0}
MICRONS_PER_OME_UNIT = {
    **dict.fromkeys(("µm", "\u03bcm", "um"), 1.0),  # micro sign, Greek mu
    **{"pm": 1e-6, "Å": 1e-4, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6},
    **{"thou": 25.4, "in": 25_400.0, "inch": 25_400.0, "pt": 25_400 / 72},
}
"""OME-XML's UnitsLength; "pixel" and "reference frame" are no lengths. None given is um by its schema."""
MIN_MPP, MAX_MPP = 0.02, 20.0
AGREES = 0.1
SQUARE, NEARLY_SQUARE = 0.01, 0.05
SAME_DOWNSAMPLE = 0.005
"""A level that is coarser than wanted by up to this share is still fine enough to be read."""
ROUNDING_PX = 2.0
"""Scanners print 3.9999 or 4.0012 for 4: the level's size was rounded (up or down, to even numbers), its pixels are 4x. More
than this it is not rounding: the level was resized by another ratio, and its pixels lie where that ratio puts them."""


Source = Literal["cohort sheet", "vendor property", "OME-XML", "TIFF resolution"]


@dataclass(frozen=True)
class Scale:
    """um/px of level 0 and where it was read."""

    mpp: float
    source: Source
    warning: str | None = None


@dataclass(frozen=True)
class LevelPlan:
    """How one magnification is read.

    `downsample` level-0 pixels make one wanted pixel. They are read from slide level `level`, whose own downsample is
    `level_downsample`, and shrunk by the quotient. `native`: the scanner's own pixels, not resampled.
    """

    magnification: float
    downsample: float
    level: int
    level_downsample: float
    native: bool
    available: bool

    @property
    def enlarged(self) -> bool:
        """Whether the slide has no pixels as fine as wanted (`on_missing_scale: upsample`): they are interpolated here."""
        return self.level_downsample > self.downsample * (1 + SAME_DOWNSAMPLE)

    @property
    def pyramid(self) -> Literal["scanner", "area", "enlarged"]:
        """Whose pyramid the pixels come from: a level that the scanner wrote, area averages of level 0, or neither."""
        if self.enlarged:
            return "enlarged"
        return "scanner" if self.native or self.level > 0 else "area"


@dataclass(frozen=True)
class ScalePlan:
    """The grid's finest tile in level-0 pixels, and the plan of every magnification, coarsest first."""

    mpp: float
    keeps_pixel_grid: bool
    finest_px: float
    levels: tuple[LevelPlan, ...]


def read_scale(properties: Mapping[str, str], sheet_mpp: float | None, slide: str) -> Scale:
    """The scale of a slide: the cohort sheet's word, else what the file says.

    Of the file, the first that is a physical scale (`MIN_MPP` to `MAX_MPP` on both axes): the vendor property
    `openslide.mpp-x/y`, OME-XML's PhysicalSizeX/Y, the TIFF resolution. Nominal magnifications are never used. The scale is
    the geometric mean of both axes, which keeps areas. Pixels whose sides differ by more than `SQUARE` are warned of, by
    more than `NEARLY_SQUARE` refused: shapes would be distorted, and differently at every angle. The sheet's word overrides
    both, with a warning, and one where the file's scale is off it by more than `AGREES`.

    Raises:
        MadError: there is none, it is no physical scale, or the pixels are not square.
    """
    found, absurd = None, []
    for source, x, y in _told(properties):
        if _is_physical(x) and _is_physical(y):
            found = Scale(math.sqrt(x * y), source), max(x, y) / min(x, y), f"{x:.4g} x {y:.4g} um"
            break
        absurd.append(f"{source} {x:.4g} x {y:.4g} um/px")
    if sheet_mpp is not None:
        if not _is_physical(sheet_mpp):
            raise MadError(
                f"{slide}: the cohort sheet says {sheet_mpp:g} um/px; `mpp` must be {MIN_MPP:g} to {MAX_MPP:g}"
            )
        return Scale(sheet_mpp, "cohort sheet", _disagreement(sheet_mpp, found))
    if found is None:
        what = f"no physical scale, only {', '.join(absurd)}" if absurd else "no um/px"
        raise MadError(
            f"{slide}: the file tells {what} (looked for: vendor property, OME-XML, TIFF resolution); "
            "give it in the `mpp` column of the cohort sheet"
        )
    scale, ratio, pixel = found
    if ratio > 1 + NEARLY_SQUARE:
        raise MadError(
            f"{slide}: its pixels are {pixel} by its {scale.source}, not square; scan or export it anew, or, where they are "
            "square in truth, give their side in the `mpp` column of the cohort sheet"
        )
    if ratio > 1 + SQUARE:
        warning = f"pixels are {pixel} by the file's {scale.source}; taken as squares of {scale.mpp:.4g} um"
        return replace(scale, warning=warning)
    return scale


def _disagreement(sheet_mpp: float, found: tuple[Scale, float, str] | None) -> str | None:
    """Where the file contradicts the cohort sheet, a warning."""
    if found is None:
        return None
    scale, ratio, pixel = found
    faults = []
    if abs(scale.mpp / sheet_mpp - 1) > AGREES:
        faults.append(f"the cohort sheet says {sheet_mpp:g} um/px, the file's {scale.source} {scale.mpp:.4g}")
    if ratio > 1 + SQUARE:
        faults.append(f"pixels are {pixel} by the file's {scale.source}, squares by the cohort sheet")
    return f"{'; '.join(faults)}; the sheet wins" if faults else None


def _told(properties: Mapping[str, str]) -> Iterator[tuple[Source, float, float]]:
    """What a file tells of its scale: (source, um/px along x, along y), most trusted first; physical or not."""
    x, y = (_number(properties, f"openslide.mpp-{axis}") for axis in "xy")
    if x is not None and y is not None:
        yield "vendor property", x, y
    x, y = (_number(properties, f"ome.PhysicalSize{axis}") for axis in "XY")
    unit_x, unit_y = (MICRONS_PER_OME_UNIT.get(properties.get(f"ome.PhysicalSize{axis}Unit", "µm")) for axis in "XY")
    if x is not None and y is not None and unit_x and unit_y:
        yield "OME-XML", x * unit_x, y * unit_y
    x, y = (_number(properties, f"tiff.{axis}Resolution") for axis in "XY")
    unit = MICRONS_PER_UNIT.get(properties.get("tiff.ResolutionUnit", "").lower())
    if x and y and unit:
        yield "TIFF resolution", unit / x, unit / y


def _number(properties: Mapping[str, str], name: str) -> float | None:
    """A numeric property, decimal comma or point; None where it is missing or no number."""
    try:
        return float(properties[name].replace(",", "."))
    except (KeyError, ValueError):
        return None


def _is_physical(mpp: float) -> bool:
    """Whether um/px may be a microscope's: 72 dpi and the like are a default of the writing program, no measurement."""
    return MIN_MPP <= mpp <= MAX_MPP


def plan_scale(
    *,
    mpp: float,
    level_downsamples: Sequence[float],
    longer_px: float,
    magnifications: Sequence[float],
    tile_px: int,
    tolerance: float = 0.12,
    on_missing: Literal["drop", "upsample", "fail"] = "drop",
    pyramid: Literal["scanner", "area"] = "scanner",
    slide: str = "slide",
) -> ScalePlan:
    """Which slide level gives which magnification, and the side of a finest tile in level-0 pixels.

    A slide keeps its own pixel grid where a whole number of its pixels makes one of the finest magnification within
    `tolerance`: 1 for a 40x scan on a ladder that ends at 40x, 2 for an 80x scan, or for a 40x scan on one that ends at 20x.
    The coarser magnifications are then exact integer downsamples. Any other slide is laid on a grid in micrometres.

    Args:
        longer_px: level 0's longer side, which tells a level's rounded size from another ratio (`whole_downsample`).

    Raises:
        MadError: a magnification is finer than the slide and `on_missing` is "fail".
    """
    finest_mpp = 10 / magnifications[-1]
    unit = max(1.0, round(finest_mpp / mpp))  # level-0 pixels per pixel of the finest magnification
    keeps = abs(unit * mpp / finest_mpp - 1) <= tolerance
    if not keeps:
        unit = finest_mpp / mpp
    levels = []
    level_downsamples = [whole_downsample(value, longer_px) for value in level_downsamples]
    for magnification in magnifications:
        downsample = unit * magnifications[-1] / magnification
        available = downsample * (1 + tolerance) >= 1
        if not available and on_missing == "fail":
            raise MadError(
                f"{slide}: {magnification:g}x asks for {10 / magnification:.3g} um/px, the slide has {mpp:.3g}; "
                "set tile.on_missing_scale to drop or upsample, or take the slide off the sheet"
            )
        fit = [n for n, d in enumerate(level_downsamples) if d <= downsample * (1 + SAME_DOWNSAMPLE)]
        level = max(fit, key=lambda n: level_downsamples[n]) if fit and pyramid == "scanner" else 0
        native = keeps and math.isclose(level_downsamples[level], downsample)
        levels.append(
            LevelPlan(
                magnification=magnification,
                downsample=downsample,
                level=level,
                level_downsample=downsample if native else level_downsamples[level],
                native=native,
                available=available or on_missing == "upsample",
            )
        )
    if not any(level.available for level in levels):
        raise MadError(
            f"{slide}: at {mpp:.3g} um/px it is coarser than every magnification of the ladder {list(magnifications)}; is its "
            "`mpp` in the cohort sheet right? Otherwise extend tile.magnifications, or take it off the sheet"
        )
    return ScalePlan(mpp=mpp, keeps_pixel_grid=keeps, finest_px=tile_px * unit, levels=tuple(levels))


def whole_downsample(downsample: float, longer_px: float) -> float:
    """A level's downsample, a whole number where it is one but for the rounding of the level's size.

    That is where it moves no pixel of the level by more than `ROUNDING_PX`, up to the far end of `longer_px` level-0 pixels.
    """
    nearest = float(max(1, round(downsample)))
    return nearest if abs(longer_px / nearest - longer_px / downsample) <= ROUNDING_PX else downsample
