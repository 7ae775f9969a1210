"""The matrix of magnifications as a picture: what a probe of each scale tells of every other, a panel per encoder."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from mad.files import Pathlike
from mad.reporting.figures import STYLE, save, save_message
from mad.reporting.from_json import Reports, first_report, lookup, magnification
from mad.reporting.heat_map import LABEL_PT, TICK_PT, TITLE_PT, Floats, draw_heat_map

PANEL_IN = 2.15  # three and the colour bar make the width of a printed page


def scale_figure(reports: Reports, path: Pathlike) -> None:
    """Draw `matrix` of every encoder's transfer.json; those without one have no panel."""
    first = first_report(reports, "transfer")
    names = sorted(lookup(first, ("matrix",)) or {}, key=magnification)
    panels = {
        encoder: np.array([[_number(parts["transfer"], trained, tested) for tested in names] for trained in names])
        for encoder, parts in reports.items()
        if parts.get("transfer", {}).get("status") == "ok"
    }
    if not names or not any(np.isfinite(matrix).any() for matrix in panels.values()):
        save_message("No encoder was probed at one magnification and tested at another: Table 5 tells why.", path)
        return
    save(draw_matrices(panels, names, lookup(first, ("matrix_chance",)) or {}), path)


def _number(report: dict[str, Any], trained: str, tested: str) -> float:
    value = lookup(report, ("matrix", trained, tested))
    return math.nan if value is None else float(value)


def draw_matrices(panels: Mapping[str, Floats], names: list[str], chance: Mapping[str, float | None]) -> Any:
    """A heat map per encoder under one colour scale, the number in each cell, the diagonal framed.

    The figure is made to be printed at its own size, at most 7.2 inches wide: no text is smaller than 7 points then.

    Args:
        panels: encoder -> mean IoU [trained on, tested on], NaN where there is none.
        names: magnifications of rows and columns, as "10x".
        chance: tested on -> mean IoU of a guess, told under the panels.
    """
    lines = -(-len(panels) // 3)
    columns = -(-len(panels) // lines)
    width = PANEL_IN * columns + 0.75
    titles = [textwrap.fill(f"({chr(97 + n % 26)}) {name}", 26) for n, name in enumerate(panels)]
    title_lines = max(title.count("\n") for title in titles) + 1
    below = _chance_text(names, chance, width)
    height = (PANEL_IN + 0.1 + 0.17 * title_lines) * lines + 0.15 + 0.15 * len(below.splitlines())
    found = np.concatenate([matrix[np.isfinite(matrix)] for matrix in panels.values()])
    low = math.floor(10 * found.min()) / 10
    high = max(math.ceil(10 * found.max()) / 10, low + 0.1)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(lines, columns, figsize=(width, height), squeeze=False, layout="constrained")
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for number, (axis, matrix) in enumerate(zip(axes.flat, panels.values(), strict=False)):
            image = _draw_panel(axis, matrix, names, (low, high))
            axis.set_title(titles[number], fontsize=TITLE_PT)
            if number % columns == 0:
                axis.set_ylabel("trained on", fontsize=LABEL_PT)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=18 * lines)
        bar.set_label("mean IoU of test tiles", fontsize=LABEL_PT)
        bar.ax.tick_params(labelsize=TICK_PT, length=2)
        figure.supxlabel(below, fontsize=LABEL_PT)
    return figure


def _chance_text(names: list[str], chance: Mapping[str, float | None], width: float) -> str:
    """Lines for a figure of this width in inches; none where chance is not known."""
    told = [f"{name}\N{NO-BREAK SPACE}{chance[name]:.2f}" for name in names if chance.get(name) is not None]
    text = f"Chance, by the magnification tested on: {', '.join(told)}" if told else ""
    return textwrap.fill(text, int(13 * width))


def _draw_panel(axis: Any, matrix: Floats, names: list[str], limits: tuple[float, float]) -> Any:
    """One matrix, its diagonal framed; returns its image, which gives the colour bar."""
    image = draw_heat_map(axis, matrix, names, limits)
    for place in range(len(names)):
        for colour, thick in (("white", 2.4), ("black", 1.0)):
            frame = Rectangle((place - 0.46, place - 0.46), 0.92, 0.92, fill=False, edgecolor=colour, linewidth=thick)
            axis.add_patch(frame)
    axis.set_xlabel("tested on", fontsize=LABEL_PT)
    return image
