"""Numbers in cells, coloured by value: what the figures of matrices share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
COLOURS = "viridis"  # perceptually uniform, read by the colour-blind too, and its lightness rises in grey print
NONE = "#e6e6e6"
CELL_PT, TICK_PT, LABEL_PT, TITLE_PT = 7.5, 7.5, 8.0, 9.0


def draw_heat_map(axis: Any, matrix: Floats, names: Sequence[str], limits: tuple[float, float]) -> Any:
    """A square matrix [n, n], rows and columns named, each number in its cell and NaN as a dash; returns the image."""
    colours = plt.get_cmap(COLOURS).with_extremes(bad=NONE)
    image = axis.imshow(matrix, cmap=colours, vmin=limits[0], vmax=limits[1])
    for (row, column), value in np.ndenumerate(matrix):
        text, ink = ("–", "black") if math.isnan(value) else (f"{value:.2f}", _ink(image.cmap(image.norm(value))))
        axis.text(column, row, text, ha="center", va="center", fontsize=CELL_PT, color=ink)
    axis.set_xticks(range(len(names)), names, fontsize=TICK_PT)
    axis.set_yticks(range(len(names)), names, fontsize=TICK_PT)
    axis.tick_params(length=0)
    return image


def _ink(colour: tuple[float, ...]) -> str:
    """Black or white, whichever stands out more from an RGBA colour (WCAG 2.1, relative luminance)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return "black" if float(np.dot(linear, (0.2126, 0.7152, 0.0722))) > 0.179 else "white"
