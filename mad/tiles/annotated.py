"""A slide's annotation, polygons or mask, on its grid: the class raster, what was found in the file, what to warn about."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mad.config.model import LabelConfig
from mad.files import Pathlike
from mad.slides.annotations import Annotation, Region, check_file, is_mask, num_off_slide, open_mask, read_annotation
from mad.tiles.labels import NO_CLASS, class_raster, mask_raster, raster_shape
from mad.tiles.pyramid import Grid

Annotated = tuple[np.ndarray, dict[str, Any] | None, list[str]]


def annotated_raster(
    path: Pathlike | None,
    label: LabelConfig,
    grid: Grid,
    cells: int,
    *,
    bounds: tuple[int, int, int, int],
    size: tuple[int, int],
) -> Annotated:
    """The annotation of a slide with `bounds` and level-0 `size` (`Reader`).

    Returns:
        Index into `label.classes` per cell, uint8 [rows, columns], NO_CLASS where there is none; facts for the tile stage's
        JSON, None without annotation; warnings.

    Raises:
        MadError: the file is missing, damaged, of no known format, or a mask of another shape than the slide.
    """
    if path is None:
        return np.full(raster_shape(grid, cells), NO_CLASS, np.uint8), None, []
    if is_mask(path):
        return _from_mask(path, label, grid, cells, size)
    regions, facts, warnings = _polygons(path, label, bounds, size)
    return class_raster(regions, label.classes, grid, cells), facts, warnings


def check_annotation(
    path: Pathlike, label: LabelConfig, *, bounds: tuple[int, int, int, int], size: tuple[int, int], parse: bool
) -> list[str]:
    """Refuse what `annotated_raster` would refuse, before anything is made of it; of a mask the pixels are left unread.

    Args:
        parse: read polygons, some seconds per 100,000; else only see that their file can be opened.

    Returns:
        What `annotated_raster` would warn of, as far as it was read.

    Raises:
        MadError: as `annotated_raster`.
    """
    if is_mask(path):
        open_mask(path, size)
    elif parse:
        return _polygons(path, label, bounds, size)[2]
    else:
        check_file(Path(path))
    return []


def named_regions(annotation: Annotation, label: LabelConfig) -> list[Region]:
    """The areas under the names that `label.rename` gives them; those that are still no class stay as they are."""
    return [Region(label.rename.get(r.name, r.name), r.geometry) for r in annotation.regions]


def _polygons(
    path: Pathlike, label: LabelConfig, bounds: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[list[Region], dict[str, Any], list[str]]:
    """The areas of an annotation; facts and warnings as `annotated_raster` gives them."""
    annotation = read_annotation(path, bounds=bounds, size=size)
    regions = named_regions(annotation, label)
    areas = Counter(region.name for region in regions)
    unknown = {name: count for name, count in areas.items() if name not in label.classes}
    off, partly = num_off_slide(regions, size)
    facts = {
        "path": str(path),
        "kind": "polygons",
        "areas": {name: count for name, count in areas.items() if name not in unknown},
        "unknown": unknown,
        "repaired": annotation.num_repaired,
        "without_class": annotation.num_unnamed,
        "without_area": annotation.num_without_area,
        "off_slide": off,
        "partly_off_slide": partly,
    }
    warnings = []
    if unknown:
        warnings.append(
            f"annotation classes not in label.classes, left out: {_listed(unknown)}; map them with label.rename"
        )
    if off:
        warnings.append(f"{off} of {len(regions)} annotated areas lie wholly off the slide: drawn on another one?")
    if partly:
        warnings.append(f"{partly} annotated area(s) reach beyond the slide, cut at its border")
    if annotation.num_repaired:
        warnings.append(f"{annotation.num_repaired} self-crossing annotated area(s) repaired")
    if annotation.num_unnamed:
        warnings.append(f"{annotation.num_unnamed} annotated area(s) without a class left out")
    return regions, facts, warnings


def _from_mask(path: Pathlike, label: LabelConfig, grid: Grid, cells: int, size: tuple[int, int]) -> Annotated:
    mask = open_mask(path, size)
    raster, num_px = mask_raster(mask, label.mask_values, label.classes, grid, cells)
    unknown = {str(value): count for value, count in num_px.items() if value and value not in label.mask_values}
    areas = {name: sum(num_px.get(v, 0) for v, of in label.mask_values.items() if of == name) for name in label.classes}
    facts = {
        "path": str(path),
        "kind": "mask",
        "pixels": {name: count for name, count in areas.items() if count},
        "unknown": unknown,
        "width": mask.width,
        "height": mask.height,
        "downsample": list(mask.downsample),
    }
    warnings = []
    if unknown:
        warnings.append(
            f"mask values not in label.mask_values, left out (pixels): {_listed(unknown)}; give each its class there"
        )
    return raster, facts, warnings


def _listed(counts: dict[str, int], most: int = 10) -> str:
    """`{'a': 3, 'b': 1}`, the most frequent first, and how many more there are."""
    shown = dict(Counter(counts).most_common(most))
    return f"{shown}" + (f" and {len(counts) - most} more" if len(counts) > most else "")
