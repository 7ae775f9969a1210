"""A slide's annotation as a layer of the viewer: what was drawn, beside the labels that the tiles were given from it.

Polygons are outlines in a GeoJSON file, which the page draws as lines and QuPath imports: every vertex at its own place, holes
kept, overlaps not settled. More than MAX_VERTICES would make the page slow: they are simplified to half a pixel of the slide's
picture and, where that leaves too many still, painted as a mask is: one class per cell, by the tile stage's own functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from PIL import Image

from mad.config.model import LabelConfig
from mad.files import Pathlike, atomic_path
from mad.reporting.map_polygons import write_areas
from mad.reporting.overlay import class_colours, rgb
from mad.slides.annotations import Region, is_mask, open_mask, read_annotation
from mad.tiles.annotated import named_regions
from mad.tiles.labels import NO_CLASS, class_raster, mask_raster
from mad.tiles.pyramid import Grid, Ladder

MAX_VERTICES = 20_000
MAX_SIDE = 4096  # cells of a painted annotation
KEY = "annotation"  # of its files; those of the other layers have a magnification


def write_annotation(
    folder: Path, path: Pathlike, label: LabelConfig, slide: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Write `annotation.geojson`, or `annotation.png` where the annotation is painted.

    Args:
        folder: of the slide's layers.
        path: the annotation, of any format that the tile stage reads.
        label: names and colours of the classes; areas of other names are left out.
        slide: its `slide.json`: `bounds`, `size`, `downsample` (level-0 px per pixel of the picture).

    Returns:
        What the page is told, as of `write_layer`, and a `note` on what it is; outlines have no `picture` and no `extent`, a
        painted annotation has no `geojson`. None where nothing of a known class is annotated.

    Raises:
        MadError: the file is missing or damaged, or a mask of another shape than the slide.
    """
    told = {"name": KEY, "magnification": None, "score": None}
    bounds, size = tuple(slide["bounds"]), tuple(slide["size"])
    if is_mask(path):
        mask, grid = open_mask(path, size), painted_grid(slide)
        raster, _ = mask_raster(mask, label.mask_values, label.classes, grid, 1)
        return _paint(folder, told, raster, grid, label, "a mask")

    annotation = read_annotation(path, bounds=bounds, size=size)
    regions = [region for region in named_regions(annotation, label) if region.name in label.classes]
    if not regions:
        return None
    drawn, reach = outlines(regions, slide["downsample"] / 2)
    if shapely.get_num_coordinates(drawn).sum() > MAX_VERTICES:
        grid = painted_grid(slide)
        raster = class_raster(regions, label.classes, grid, 1)
        return _paint(folder, told, raster, grid, label, f"{len(regions)} areas, too many vertices to draw")

    moved = shapely.transform(drawn, lambda points: points - bounds[:2])  # as QuPath counts, and the page
    areas = zip([region.name for region in regions], moved, strict=True)
    write_areas(folder / f"{KEY}.geojson", areas, class_colours(label))
    note = f"{len(regions)} area{'s' * (len(regions) > 1)}" + (f", simplified by at most {reach:g} px" if reach else "")
    return told | {"picture": None, "geojson": f"{KEY}.geojson", "note": note}


def outlines(regions: list[Region], reach: float) -> tuple[np.ndarray, float]:
    """The areas to draw, and by how many level-0 px their outlines are off.

    Args:
        regions: of known classes.
        reach: of the simplification in level-0 px, where there are more than MAX_VERTICES.

    Returns:
        Polygons and MultiPolygons, object [n], shells one way round and holes the other, so that the winding number tells
        what is inside; 0 or `reach`.
    """
    geometries = shapely.orient_polygons([region.geometry for region in regions])
    single = shapely.get_num_geometries(geometries) == 1
    geometries = np.where(single, shapely.get_geometry(geometries, 0), geometries)
    if shapely.get_num_coordinates(geometries).sum() <= MAX_VERTICES:
        return geometries, 0.0
    # GEOS first leaves points out between the ends of a ring, then an end itself: either time by its tolerance at most.
    return shapely.orient_polygons(shapely.simplify(geometries, reach / 2)), reach


def painted_grid(slide: Mapping[str, Any]) -> Grid:
    """The cells of a painted annotation over the slide's bounds: pixels of its picture, larger where that has too many."""
    left, top, width, height = slide["bounds"]
    side = max(slide["downsample"], max(width, height) / MAX_SIDE)
    return Grid(Ladder((1.0,)), side, width, height, left, top)


def _paint(
    folder: Path, told: dict[str, Any], raster: np.ndarray, grid: Grid, label: LabelConfig, what: str
) -> dict[str, Any] | None:
    """Write a class raster as a picture, transparent where there is no class."""
    if (raster == NO_CLASS).all():
        return None
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(label.classes)] = [rgb(colour) for colour in class_colours(label).values()]
    image = Image.fromarray(raster)
    image.putpalette(palette.tobytes())
    with atomic_path(folder / f"{KEY}.png") as temporary:
        image.save(temporary, transparency=NO_CLASS)
    rows, columns = raster.shape
    extent = [grid.left, grid.top, columns * grid.finest_px, rows * grid.finest_px]
    note = f"{what}: painted, a cell of {grid.finest_px:.3g} px"
    return told | {"picture": f"{KEY}.png", "geojson": None, "extent": extent, "note": note}
