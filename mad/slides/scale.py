"""Physical scale: from a slide's metadata to which of its pixels make which magnification. Pure, no I/O.

A magnification is a name for a scale: mpp = 10 / magnification, so 40x = 0.25 um/px. What a scanner calls "20x" is at most
a label. The scale of a slide is never guessed: a slide without one fails with a message that tells how to give it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mad.files import MadError

MICRONS_PER_UNIT = {"centimeter": 10_000.0, "inch": 25_400.0}
SAME_DOWNSAMPLE = 0.005  # scanners print 3.9999 or 4.0012 for 4: the level's size was rounded, its pixels are 4x


@dataclass(frozen=True)
class Scale:
    """um/px of level 0 and where it was read."""

    mpp: float
    source: Literal["cohort sheet", "vendor property", "TIFF resolution"]
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


@dataclass(frozen=True)
class ScalePlan:
    """The grid's finest tile in level-0 pixels, and the plan of every magnification, coarsest first."""

    mpp: float
    keeps_pixel_grid: bool
    finest_px: float
    levels: tuple[LevelPlan, ...]


def read_scale(properties: Mapping[str, str], sheet_mpp: float | None, slide: str) -> Scale:
    """The scale of a slide: the cohort sheet's word, else the vendor property `openslide.mpp-x/y`, else the TIFF tags.

    Raises:
        MadError: there is none, or it is no physical scale.
    """
    vendor = _mpp(properties, "openslide.mpp-x", "openslide.mpp-y")
    source: Literal["vendor property", "TIFF resolution"] = "vendor property"
    if vendor is None:
        unit = MICRONS_PER_UNIT.get(properties.get("tiff.ResolutionUnit", "").lower())
        per_unit = _mpp(properties, "tiff.XResolution", "tiff.YResolution")
        vendor = unit / per_unit if unit and per_unit else None
        source = "TIFF resolution"
    if vendor is not None and not 0.02 <= vendor <= 20:
        vendor = None  # 72 dpi and the like: a default of the writing program, no measurement
    if sheet_mpp is not None:
        warning = None
        if vendor is not None and abs(vendor / sheet_mpp - 1) > 0.1:
            warning = f"the cohort sheet says {sheet_mpp:g} um/px, the file's {source} {vendor:.4g}; the sheet wins"
        return Scale(sheet_mpp, "cohort sheet", warning)
    if vendor is None:
        raise MadError(
            f"{slide}: the file tells no um/px (neither openslide.mpp-x nor a physical TIFF resolution); "
            "give it in the `mpp` column of the cohort sheet"
        )
    return Scale(vendor, source)


def _mpp(properties: Mapping[str, str], x: str, y: str) -> float | None:
    """Mean of two numeric properties; None where either is missing or no positive number."""
    try:
        values = [float(properties[x]), float(properties[y])]
    except (KeyError, ValueError):
        return None
    return sum(values) / 2 if min(values) > 0 else None


def plan_scale(
    *,
    mpp: float,
    level_downsamples: Sequence[float],
    magnifications: Sequence[float],
    tile_px: int,
    tolerance: float = 0.12,
    on_missing: Literal["drop", "upsample", "fail"] = "drop",
    pyramid: Literal["scanner", "area"] = "scanner",
    slide: str = "slide",
) -> ScalePlan:
    """Which slide level gives which magnification, and the side of a finest tile in level-0 pixels.

    A slide within `tolerance` of the finest wanted um/px keeps its own pixel grid: the finest magnification is level 0 and
    the others its exact integer downsamples. Any other slide is laid on a grid in micrometres.

    Raises:
        MadError: a magnification is finer than the slide and `on_missing` is "fail".
    """
    finest_mpp = 10 / magnifications[-1]
    keeps = abs(mpp / finest_mpp - 1) <= tolerance
    unit = 1.0 if keeps else finest_mpp / mpp  # level-0 pixels per pixel of the finest magnification
    levels = []
    for magnification in magnifications:
        downsample = unit * magnifications[-1] / magnification
        available = downsample >= 1 - tolerance
        if not available and on_missing == "fail":
            raise MadError(
                f"{slide}: {magnification:g}x asks for {10 / magnification:.3g} um/px, the slide has {mpp:.3g}; "
                "set tile.on_missing_scale to drop or upsample, or take the slide off the sheet"
            )
        fit = [n for n, d in enumerate(level_downsamples) if d <= downsample * (1 + SAME_DOWNSAMPLE)]
        level = max(fit, key=lambda n: level_downsamples[n]) if fit and pyramid == "scanner" else 0
        native = keeps and abs(level_downsamples[level] / downsample - 1) <= SAME_DOWNSAMPLE
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
    return ScalePlan(mpp=mpp, keeps_pixel_grid=keeps, finest_px=tile_px * unit, levels=tuple(levels))
