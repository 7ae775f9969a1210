"""Figure 4 of the MAD paper from the tables of painted tiles."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mad.files import Pathlike
from mad.reporting.figures import STYLE, legend_below, paint_raster, save, save_message, scale_bar

COLUMNS = 8  # of pictures; what is more goes on in a further line
LETTERS_PER_INCH = 10  # of a title


def figure4(
    rows: Sequence[dict[str, Any]],
    encoders: Sequence[str],
    *,
    colours: dict[str, str],
    path: Pathlike,
) -> None:
    """Thumbnail, ground truth and one map per encoder; one row per slide and magnification.

    Where a slide is cut into a training and a test part, a line bounds the test part, which alone is scored.

    Args:
        rows: slide_id, magnification, mpp (level-0 um/px or None), thumbnail (RGB [h, w, 3] or None), extent (left, right,
            bottom, top of the thumbnail in level-0 px), truth (tiles: x y side label, and split if known) and maps (encoder ->
            tiles: x y side predicted; one may lack), scores (encoder -> mean IoU or None).
        encoders: columns in order; where there are many, a row goes on in further lines.
        colours: class -> colour.
        path: PNG.
    """
    if not rows:
        save_message("No slide has a map: the table of maps tells why.", path)
        return
    width = 2.5
    titles = [_wrap(title, width) for title in ("Slide", "Ground truth", *encoders)]
    lines = -(-len(titles) // COLUMNS)
    columns = -(-len(titles) // lines)
    shapes = [_bounds(row) for row in rows]
    heights = [min(max(width * (bottom - top) / (right - left), 0.9), 5.0) for left, right, bottom, top in shapes]
    borders = [_test_border(row["truth"]) for row in rows]
    with plt.rc_context(STYLE):
        titled = (len(rows) * lines if lines > 1 else 1) * (1 + max(title.count("\n") for title in titles))
        size = (width * columns + 0.5, (sum(heights) + 0.28 * len(rows)) * lines + 0.17 * titled + 0.48)
        ratios = np.repeat(heights, lines).tolist()
        figure, grid = plt.subplots(len(rows) * lines, columns, figsize=size, height_ratios=ratios, squeeze=False)
        for axis in grid.reshape(len(rows), -1)[:, len(titles) :].flat:
            axis.axis("off")
        for number, row in enumerate(rows):
            left, right, bottom, top = shapes[number]
            axes = grid.reshape(len(rows), -1)[number, : len(titles)]
            for title, axis in zip(titles, axes, strict=True):
                axis.set_xlim(left, right)
                axis.set_ylim(bottom, top)
                axis.set_aspect("equal")
                axis.set_xticks([])
                axis.set_yticks([])
                for spine in axis.spines.values():
                    spine.set_color("#999999")
                if number == 0 or lines > 1:
                    axis.set_title(title, fontsize=10, pad=5)
            if row["thumbnail"] is None:
                _say(axes[0], "slide cannot\nbe read")
            else:
                axes[0].imshow(row["thumbnail"], extent=row["extent"], interpolation="antialiased")
            whose = f"{_wrap(row['slide_id'], heights[number])}\n{row['magnification']:g}x"
            for axis in axes[::columns]:
                axis.set_ylabel(whose, fontsize=9.5)
            if row["mpp"]:
                scale_bar(axes[0], (left, right, bottom, top), row["mpp"])
            _paint(axes[1], row["truth"], "label", colours)
            for axis, encoder in zip(axes[2:], encoders, strict=True):
                tiles = row["maps"].get(encoder)
                if tiles is None or not len(tiles):
                    _say(axis, "absent")
                    continue
                _paint(axis, tiles, "predicted", colours)
                score = row["scores"].get(encoder)
                if score is not None:
                    axis.set_xlabel(f"mIoU {score:.3f}", fontsize=8.5, labelpad=3)
            for axis in axes:
                for colour, wide in (("white", 2.6), ("black", 1.2)):
                    axis.add_collection(
                        LineCollection(borders[number], colors=colour, linewidths=wide, capstyle="projecting", zorder=4)
                    )
        patches: list[Any] = [
            Patch(facecolor=colour, edgecolor="#777777", linewidth=0.5, label=name) for name, colour in colours.items()
        ]
        patches.append(Patch(facecolor="white", edgecolor="#777777", linewidth=0.5, label="no label"))
        if any(borders):
            patches.append(Line2D([], [], color="black", linewidth=1.2, label="test part: what is scored"))
        legend_below(figure, patches, h_pad=0.6, w_pad=0.6)
        save(figure, path)


def _bounds(row: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, right, bottom, top in level-0 px of what a row of Figure 4 shows."""
    tiles = row["truth"]
    left, top = float(tiles["x"].min()), float(tiles["y"].min())
    right, bottom = float((tiles["x"] + tiles["side"]).max()), float((tiles["y"] + tiles["side"]).max())
    if row["thumbnail"] is not None:
        edge = row["extent"]
        left, right, bottom, top = min(left, edge[0]), max(right, edge[1]), max(bottom, edge[2]), min(top, edge[3])
    return left, right, bottom, top


def _paint(axis: Any, tiles: pd.DataFrame, column: str, colours: dict[str, str]) -> None:
    image, extent = paint_raster(tiles, column, colours)
    limits = axis.get_xlim(), axis.get_ylim()
    axis.imshow(image, extent=extent, interpolation="nearest")
    axis.set_xlim(limits[0])
    axis.set_ylim(limits[1])


def _test_border(tiles: pd.DataFrame) -> list[Any]:
    """Segments ((x, y), (x, y)) in level-0 px between tiles of the test part and others; none where all are of one kind."""
    if "split" not in tiles or (tiles["split"] == "test").fillna(False).nunique() < 2:
        return []
    image, (left, right, bottom, top) = paint_raster(tiles, "split", {"test": "#000000"})
    inside = np.pad(image[..., 3] > 0, 1)
    width, height = (right - left) / image.shape[1], (bottom - top) / image.shape[0]
    segments = []
    for row, column in np.argwhere(inside[1:, :] != inside[:-1, :]):
        x, y = left + (column - 1) * width, top + row * height
        segments.append(((x, y), (x + width, y)))
    for row, column in np.argwhere(inside[:, 1:] != inside[:, :-1]):
        x, y = left + column * width, top + (row - 1) * height
        segments.append(((x, y), (x, y + height)))
    return segments


def _say(axis: Any, text: str) -> None:
    axis.set_facecolor("#f4f4f4")
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="#777777", fontsize=9)


def _wrap(name: str, inches: float) -> str:
    """A name in two lines of this length; of a longer one the middle is left out, since names differ at their ends."""
    width = max(int(inches * LETTERS_PER_INCH), 4)
    kept = name if len(name) <= 2 * width else f"{name[: width - 1]}…{name[-width:]}"
    return textwrap.fill(kept, width, break_on_hyphens=False)
