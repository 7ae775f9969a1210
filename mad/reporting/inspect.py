"""What `mad` makes of a slide: its own data, its scale, and the grid of tiles that a configuration would lay over it.

`describe` opens the file and gives plain values, `render` draws them; nothing is read but metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tifffile
from rich.table import Table
from rich.text import Text

from mad.config.model import TileConfig
from mad.files import MadError, Pathlike
from mad.slides.readers import Reader, open_slide
from mad.slides.scale import Scale, read_scale
from mad.tiles.aligned import AlignedSlide, open_aligned


def describe(path: Pathlike, tile_config: TileConfig, mpp: float | None = None) -> dict[str, Any]:
    """Everything about one slide that decides how it is tiled, JSON-able.

    Args:
        mpp: um/px of level 0 as the cohort sheet would give it; None takes the file's own.

    Returns:
        `error` is None, or why the slide cannot be tiled as it is and what mends it (its scale is unknown, say); `grid` is
        then None, `magnifications` is empty, and the rest stands. Sizes are (width, height) in px, `bounds` (x, y, width,
        height) in level-0 px, grid shapes (rows, columns) of coarsest tiles.

    Raises:
        MadError: the file is missing or no slide.
    """
    reader = open_slide(path, tile_config.icc)
    try:
        facts = _facts(reader)
        scale = read_scale(reader.properties, mpp, str(path))
    except MadError as error:
        return {**facts, **_scale(facts, None), "grid": None, "magnifications": [], "error": str(error)}
    finally:
        reader.close()
    facts |= _scale(facts, scale)
    try:
        with open_aligned(path, tile_config, mpp) as slide:
            return {**facts, **_tiling(slide), "error": None}
    except MadError as error:
        return {**facts, "grid": None, "magnifications": [], "error": str(error)}


def describe_each(paths: Sequence[Pathlike], tile_config: TileConfig, mpp: float | None = None) -> list[dict[str, Any]]:
    """`describe` of each slide; of one that cannot be opened `path` and `error` alone."""
    found = []
    for path in paths:
        try:
            found.append(describe(path, tile_config, mpp))
        except (MadError, OSError) as error:
            found.append({"path": str(path), "error": str(error)})
    return found


def _facts(reader: Reader) -> dict[str, Any]:
    """What the file tells of itself."""
    properties = reader.properties
    levels = [
        {"width": width, "height": height, "downsample": float(downsample)}
        for (width, height), downsample in zip(reader.level_dimensions, reader.level_downsamples, strict=True)
    ]
    return {
        "path": str(reader.path),
        "vendor": properties.get("openslide.vendor"),
        "reader": type(reader).__name__,
        "dimensions": list(reader.level_dimensions[0]),
        "levels": levels,
        "bounds": list(reader.bounds),
        "icc": reader.icc,
        "icc_profile_bytes": len(reader.profile) if reader.profile else None,
        "compression": _compression(reader),
        "storage_tile": list(tile) if (tile := reader.storage_tile(0)) else None,
    }


def _compression(reader: Reader) -> str | None:
    """The compression of level 0: TIFF's name, or DICOM's; None where the file tells neither."""
    if dicom := reader.properties.get("dicom.LossyImageCompressionMethod"):
        return dicom
    try:
        with tifffile.TiffFile(reader.path) as file:
            pages: list[Any] = list(file.pages)
            for page in pages:
                if (page.imagewidth, page.imagelength) == reader.level_dimensions[0]:
                    return tifffile.COMPRESSION(page.compression).name
    except Exception:  # tifffile fails in many ways on what is no TIFF; OpenSlide has opened the slide
        return None
    return None


def _scale(facts: dict[str, Any], scale: Scale | None) -> dict[str, Any]:
    """um/px of the slide and of its levels; None where it is unknown."""
    mpp = scale.mpp if scale else None
    return {
        "mpp": mpp,
        "mpp_source": scale.source if scale else None,
        "warning": scale.warning if scale else None,
        "levels": [{**level, "mpp": mpp * level["downsample"] if mpp else None} for level in facts["levels"]],
    }


def _tiling(slide: AlignedSlide) -> dict[str, Any]:
    """The grid, and per magnification the level it is read from and how many tiles it has."""
    grid, plan = slide.grid, slide.plan
    magnifications = []
    for number, level in enumerate(plan.levels):
        touching, whole = _tile_shapes(slide, number)
        magnifications.append(
            {
                "magnification": level.magnification,
                "mpp": plan.mpp * level.downsample,
                "available": level.available,
                "native": level.native,
                "level": level.level,
                "shrink": level.downsample / level.level_downsample,
                "tile_side_px": grid.ladder.span(number) * grid.finest_px,
                "tiles": touching[0] * touching[1] if level.available else 0,
                "tiles_whole": whole[0] * whole[1] if level.available else 0,
            }
        )
    touching, whole = _tile_shapes(slide, 0)
    return {
        "grid": {
            "touching": touching,
            "whole": whole,
            "left": grid.left,
            "top": grid.top,
            "tile_px": slide.tile_px,
            "keeps_pixel_grid": plan.keeps_pixel_grid,
        },
        "magnifications": magnifications,
    }


def _tile_shapes(slide: AlignedSlide, level: int) -> tuple[list[int], list[int]]:
    """(rows, columns) of the tiles that hold a pixel of the slide, and of those that lie wholly inside it."""
    grid = slide.grid
    rows, columns = (np.arange(count) for count in grid.level_shape(level))
    counts = [
        [int(test(level, rows, 0).sum()), int(test(level, 0, columns).sum())] for test in (grid.touches, grid.contains)
    ]
    return counts[0], counts[1]


def render(facts: dict[str, Any]) -> list[Table | Text]:
    """What `describe` found, for a rich console: the slide's data, its levels, its magnifications, and its fault."""
    parts: list[Table | Text] = [Text(facts["path"], style="bold")]
    if "vendor" in facts:
        parts += [_summary(facts), _levels(facts)]
    if facts.get("magnifications"):
        parts.append(_magnifications(facts))
    if facts["error"]:
        parts.append(Text(f"FAILED: {facts['error']}", style="red"))
    return parts


def _summary(facts: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    tile = facts["storage_tile"]
    storage = f"{facts['compression'] or 'not told'}, {f'pieces of {_size(tile)} px' if tile else 'pieces not told'}"
    lines = {
        "vendor": f"{facts['vendor']}, read by {facts['reader']}",
        "level 0": f"{_size(facts['dimensions'])} px, compression {storage}",
        "bounds": "{2} x {3} px at ({0}, {1})".format(*facts["bounds"]),
        "ICC profile": facts["icc"],
        "um/px": f"{facts['mpp']:.4g} ({facts['mpp_source']})" if facts["mpp"] else "unknown; --mpp tries one",
    }
    if facts["warning"]:
        lines["warning"] = facts["warning"]
    if grid := facts["grid"]:
        kept = "the slide's own pixel grid" if grid["keeps_pixel_grid"] else "a grid in micrometres"
        lines["grid"] = (
            f"{_size(grid['touching'])} coarsest tiles (rows x columns), of which {_size(grid['whole'])} whole; "
            f"tiles of {grid['tile_px']} px on {kept}"
        )
    for name, text in lines.items():
        table.add_row(Text(name, style="dim"), Text(text))
    return table


def _levels(facts: dict[str, Any]) -> Table:
    table = _headed("Level", "Size (px)", "Downsample", "um/px")
    for number, level in enumerate(facts["levels"]):
        mpp = f"{level['mpp']:.4g}" if level["mpp"] else "-"
        table.add_row(str(number), f"{level['width']} x {level['height']}", f"{level['downsample']:.4g}", mpp)
    return table


def _magnifications(facts: dict[str, Any]) -> Table:
    table = _headed("Magnification", "um/px", "Pixels", "From level", "Tile side (level-0 px)", "Tiles", "Whole")
    for row in facts["magnifications"]:
        shrink = row["shrink"]
        pixels = (
            "native" if row["native"] else f"shrunk {shrink:.4g}x" if shrink >= 1 else f"enlarged {1 / shrink:.4g}x"
        )
        cells = [f"{row['magnification']:g}x", f"{row['mpp']:.4g}"]
        if row["available"]:
            cells += [
                pixels,
                str(row["level"]),
                f"{row['tile_side_px']:.6g}",
                str(row["tiles"]),
                str(row["tiles_whole"]),
            ]
        else:
            cells += ["dropped: finer than the slide"]
        table.add_row(*cells)
    return table


def _headed(*headers: str) -> Table:
    table = Table()
    for header in headers:
        table.add_column(header, justify="right")
    return table


def _size(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))
