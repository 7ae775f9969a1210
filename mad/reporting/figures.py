"""Figure 3 of the MAD paper from the tables of coordinates, and what several figures share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from mad.files import Pathlike, atomic_path
from mad.metrics.maps import cell_numbers

MARKERS = ["o", "s", "^", "D", "P", "v", "X", "*", "h", "<"]
COARSE, FINE, LINE, FAMILY = "#2166ac", "#d6303a", "#8c8c8c", "#000000"
STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 9, "axes.linewidth": 0.6, "savefig.facecolor": "white"}


def figure3(
    panels: Sequence[tuple[str, pd.DataFrame, Sequence[float]]],
    *,
    classes: Sequence[str],
    transition: tuple[float, float],
    path: Pathlike,
) -> None:
    """PCA of coarse (blue) and fine (red) embeddings, one panel per encoder, lines from parent to child.

    All of them in grey, as in the paper; on top, in black, those of one parent of each class, the same in every panel: with
    thousands of children they alone can be followed.

    Args:
        panels: encoder, its table (tile_id parent_id role label x y), explained shares of the two components.
        classes: give the markers, from the eleventh on the class's number; an unlabelled tile is a dot.
        transition: coarse and fine magnification, for the legend.
        path: PNG.
    """
    if not panels:
        save_message("No encoder has parents and children to draw: Table 4 tells why.", path)
        return
    lines = -(-len(panels) // 4)
    columns = -(-len(panels) // lines)
    families = _families(panels[0][1], classes)
    labels = [frame["label"].dropna() for _, frame, _ in panels]
    present = [name for name in classes if any((column == name).any() for column in labels)]
    marks: list[Any] = [
        Line2D([], [], color=colour, marker="o", linestyle="", markersize=6, label=f"{magnification:g}x")
        for colour, magnification in zip((COARSE, FINE), transition, strict=True)
    ]
    marks.append(Line2D([], [], color=LINE, linewidth=1, label="parent – child"))
    whose = "of one parent per class" if present else "of one parent"
    marks.append(Line2D([], [], color=FAMILY, linewidth=1, label=f"… {whose}"))
    marks += [
        Line2D([], [], color="#444444", marker=_marker(name, classes), linestyle="", markersize=5.5, label=name)
        for name in present
    ]
    if present and any(frame["label"].isna().any() for _, frame, _ in panels):
        marks.append(Line2D([], [], color="#444444", marker=".", linestyle="", markersize=5.5, label="no label"))
    with plt.rc_context(STYLE):
        size = (3.4 * columns, 3.35 * lines + 0.4)
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for number, (axis, (name, table, explained)) in enumerate(zip(axes.flat, panels, strict=False)):
            _scatter(axis, table, classes, families)
            axis.set_title(f"({chr(97 + number % 26)}) {name}", fontsize=10)
            axis.set_xlabel(f"PC 1 ({100 * explained[0]:.0f} %)", labelpad=2)
            axis.set_ylabel(f"PC 2 ({100 * explained[1]:.0f} %)", labelpad=2)
        legend_below(figure, marks)
        save(figure, path)


def paint_raster(tiles: pd.DataFrame, column: str, colours: dict[str, str]) -> tuple[NDArray[np.float64], list[float]]:
    """Tiles as an image of one pixel per tile.

    Args:
        tiles: x y side in level-0 px, all of one magnification, and `column` with class names or null.
        column: to paint.
        colours: class -> colour; what has none stays transparent.

    Returns:
        RGBA [rows, columns, 4] and its extent [left, right, bottom, top] in level-0 px.
    """
    side = float(tiles["side"].median())
    left, top = float(tiles["x"].min()), float(tiles["y"].min())
    place = np.stack([cell_numbers(tiles[axis].to_numpy(), side) for axis in ("y", "x")], axis=1)
    image = np.zeros((*(place.max(axis=0) + 1), 4))
    for name, colour in colours.items():
        mine = place[(tiles[column] == name).fillna(False).to_numpy(bool)]
        image[mine[:, 0], mine[:, 1]] = (*to_rgb(colour), 1.0)
    return image, [left, float(tiles["x"].max()) + side, float(tiles["y"].max()) + side, top]


def _families(table: pd.DataFrame, classes: Sequence[str]) -> list[str]:
    """The first parent of each class that there is (of all where none has a class), by tile id."""
    parents = table[table["role"] == "parent"].sort_values("tile_id")
    first = parents[parents["label"].isin(list(classes))].groupby("label")["tile_id"].first()
    return list(first) or list(parents["tile_id"][:1])


def _scatter(axis: Any, table: pd.DataFrame, classes: Sequence[str], families: Sequence[str]) -> None:
    """One panel; the tiles of `families`, parents' ids, stand out."""
    places = table.set_index("tile_id")[["x", "y"]]
    children = table[table["role"] == "child"]
    ends = np.stack([places.loc[children["parent_id"]].to_numpy(), children[["x", "y"]].to_numpy()], axis=1)
    chosen = children["parent_id"].isin(list(families)).to_numpy()
    faint = float(np.clip(8 / np.sqrt(max(len(ends), 1)), 0.12, 0.5))
    axis.add_collection(LineCollection(list(ends[~chosen]), colors=LINE, linewidths=0.4, alpha=faint, zorder=1))
    axis.add_collection(LineCollection(list(ends[chosen]), colors=FAMILY, linewidths=0.5, alpha=0.6, zorder=3))
    groups = (
        (children[~chosen], FINE, 7, 0.35, 2, "none"),
        (children[chosen], FINE, 11, 1.0, 4, FAMILY),
        (table[(table["role"] == "parent") & ~table["tile_id"].isin(list(families))], COARSE, 18, 0.75, 5, "white"),
        (table[table["tile_id"].isin(list(families))], COARSE, 30, 1.0, 6, FAMILY),
    )
    for mine, colour, size, alpha, layer, edge in groups:
        look = {"c": colour, "alpha": alpha, "zorder": layer, "edgecolors": edge, "linewidths": 0.5 * (edge != "none")}
        for name in [*classes, None]:
            points = mine[mine["label"].isna()] if name is None else mine[mine["label"] == name]
            area = size * (2 if name is None else 1)  # a dot is drawn at half of its size
            axis.scatter(points["x"], points["y"], s=area, marker=_marker(name, classes), **look)
    axis.autoscale_view()
    axis.margins(0.06)
    axis.tick_params(labelsize=7, length=2)
    axis.spines[["top", "right"]].set_visible(False)


def _marker(name: str | None, classes: Sequence[str]) -> str:
    if name is None:
        return "."
    number = list(classes).index(name)
    return MARKERS[number] if number < len(MARKERS) else f"${number + 1}$"


def legend_below(figure: Any, marks: Sequence[Any], **pads: float) -> None:
    """Lay the axes out above a legend of as few lines as fit the width; the figure grows by what exceeds one line."""
    width, height = figure.get_size_inches()
    for per_line in range(len(marks), 0, -1):
        legend = figure.legend(handles=marks, loc="lower center", ncol=per_line, frameon=False, fontsize=8.5)
        box = legend.get_window_extent(figure.canvas.get_renderer()).transformed(figure.dpi_scale_trans.inverted())
        if box.width <= width or per_line == 1:
            break
        legend.remove()
    height += max(0.0, box.height - 0.35)
    figure.set_size_inches(width, height)
    figure.tight_layout(rect=(0, box.height / height, 1, 1), **pads)


def scale_bar(axis: Any, bounds: tuple[float, float, float, float], mpp: float) -> None:
    """A bar of a round length, about a fifth of the width."""
    left, right, bottom, top = bounds
    wanted = (right - left) * mpp / 5
    power = 10 ** np.floor(np.log10(wanted))
    length_um = float(max(step for step in (1, 2, 5) if step * power <= wanted) * power)
    x, y = left + 0.05 * (right - left), bottom - 0.08 * (bottom - top)
    text = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    for width, colour in ((4.5, "white"), (2.5, "black")):
        axis.plot([x, x + length_um / mpp], [y, y], color=colour, linewidth=width, solid_capstyle="butt", zorder=5)
    axis.annotate(
        text, (x + length_um / mpp / 2, y), xytext=(0, 4), textcoords="offset points", ha="center", va="bottom", fontsize=7.5,
        zorder=6, bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def save_message(text: str, path: Pathlike) -> None:
    """A picture that says why there is none."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(6, 1))
        figure.text(0.5, 0.5, text, ha="center", va="center", color="#555555", fontsize=10)
        save(figure, path)


def save(figure: Any, path: Pathlike) -> None:
    """Write a figure as PNG, the same bytes every time, and close it."""
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=200, metadata={"Software": None})
    plt.close(figure)
