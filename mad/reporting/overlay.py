"""A picture of one slide as the pipeline sees it: thumbnail, tissue outline, coarsest grid, class colours."""

from __future__ import annotations

import cv2
import numpy as np

from mad.config.model import LabelConfig
from mad.files import Pathlike, atomic_path
from mad.tiles.pyramid import Grid

PALETTE = ["#d1495b", "#edae49", "#00798c", "#7a5195", "#9aa0a6", "#66a182", "#2e4057", "#f28e2b", "#4e79a7", "#b07aa1"]
MAX_SIDE = 1400


def class_colours(label: LabelConfig) -> dict[str, str]:
    """`#rrggbb` per class, in class order: the configured colour, else one of the default palette."""
    return {name: label.colours.get(name, PALETTE[n % len(PALETTE)]) for n, name in enumerate(label.classes)}


def rgb(colour: str) -> tuple[int, int, int]:
    """`#rrggbb` as three bytes."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def write_overlay(
    path: Pathlike,
    overview: np.ndarray,
    *,
    title: str,
    tissue: np.ndarray | None = None,
    raster: np.ndarray | None = None,
    grid: Grid | None = None,
    label: LabelConfig | None = None,
) -> None:
    """Write the picture as PNG.

    Args:
        overview: RGB thumbnail [h, w, 3] over the whole grid.
        tissue: boolean mask [h, w], outlined in black.
        raster: class per cell (any multiple of the thumbnail's size), tinted in the class colours, with a legend.
        grid: its coarsest tiles are drawn as lines.
    """
    factor = min(3.0, MAX_SIDE / max(overview.shape[:2]))
    size = (max(1, round(overview.shape[1] * factor)), max(1, round(overview.shape[0] * factor)))
    image = cv2.resize(overview, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    legend: list[tuple[str, tuple[int, int, int]]] = []
    if raster is not None and label is not None:
        small = cv2.resize(raster, size, interpolation=cv2.INTER_NEAREST)
        for number, (name, colour) in enumerate(class_colours(label).items()):
            where = small == number
            if where.any():
                image[where] = (0.7 * image[where] + 0.3 * np.array(rgb(colour))).astype(np.uint8)
                legend.append((name, rgb(colour)))
    if tissue is not None:
        small = cv2.resize(tissue.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours(small, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(image, outlines, -1, (0, 0, 0), 1, cv2.LINE_AA)
    if grid is not None:
        rows, columns = grid.shape
        for row in range(rows + 1):
            y = min(round(row * size[1] / rows), size[1] - 1)
            cv2.line(image, (0, y), (size[0], y), (30, 90, 200), 1)
        for column in range(columns + 1):
            x = min(round(column * size[0] / columns), size[0] - 1)
            cv2.line(image, (x, 0), (x, size[1]), (30, 90, 200), 1)
    band = np.full((26 * (1 + len(legend)), image.shape[1], 3), 255, np.uint8)
    cv2.putText(band, title, (6, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    for n, (name, paint) in enumerate(legend, start=1):
        cv2.rectangle(band, (8, 26 * n + 5), (24, 26 * n + 21), paint, -1)
        cv2.putText(band, name, (32, 26 * n + 19), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    with atomic_path(path) as temporary:
        cv2.imwrite(str(temporary), cv2.cvtColor(np.concatenate([band, image]), cv2.COLOR_RGB2BGR))
