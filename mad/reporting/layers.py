"""A class map of one slide and magnification as a layer of the viewer: a picture of one pixel per tile, and QuPath polygons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mad.files import atomic_path
from mad.reporting.figures import paint_raster
from mad.reporting.map_polygons import write_map

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Layer:
    """One map."""

    encoder: str | None
    """Whose predictions; None: the labels."""
    magnification: float
    tiles: pd.DataFrame
    """x y side (level-0 px) and `class` (name or null)."""
    score: float | None = None
    """Mean IoU of its test tiles."""

    @property
    def key(self) -> str:
        """Its files' name; no encoder's has a dot."""
        return f"{self.encoder}_{self.magnification:g}x" if self.encoder else f"labels.{self.magnification:g}x"


def write_layer(
    folder: Path, layer: Layer, colours: dict[str, str], bounds: Sequence[int], size: Sequence[int]
) -> dict[str, Any]:
    """Write `{key}.png` and `{key}.geojson`.

    Args:
        folder: of the slide's layers.
        layer: what to write.
        colours: `#rrggbb` per class; tiles without a class are transparent.
        bounds: x, y, width, height of the scanned area in level-0 px: QuPath counts from its corner where it is smaller than
            the slide.
        size: width and height of the slide.

    Returns:
        What the page is told: name, magnification, score, the files' names and `extent`, the picture's left, top, width and
        height in level-0 px.
    """
    image, (left, right, bottom, top) = paint_raster(layer.tiles, "class", colours)
    with atomic_path(folder / f"{layer.key}.png") as temporary:
        Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(temporary, optimize=True)
    origin = (0, 0) if list(bounds[2:]) == list(size) else (bounds[0], bounds[1])
    write_map(folder / f"{layer.key}.geojson", layer.tiles.assign(predicted=layer.tiles["class"]), colours, origin)
    return {
        "name": layer.encoder or "labels",
        "magnification": layer.magnification,
        "score": layer.score,
        "picture": f"{layer.key}.png",
        "geojson": f"{layer.key}.geojson",
        "extent": [left, top, right - left, bottom - top],
    }
