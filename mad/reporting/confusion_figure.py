"""What is taken for what: the confusion matrices of the sound probe and of the paper's linear probe, a panel per encoder."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from mad.files import Pathlike
from mad.reporting.figures import STYLE, save, save_message
from mad.reporting.from_json import Reports, first_report, lookup
from mad.reporting.heat_map import LABEL_PT, TICK_PT, TITLE_PT, Floats, draw_heat_map

CELL_IN = 0.36
PAGE_IN = 7.2
FIGURES = {"confusion": ("sound", "the sound probe"), "confusion_linear": ("linear", "the paper's linear probe")}
"""File name: the classifier's key in classification.json, and what it is called."""


def confusion_figures(reports: Reports, folder: Pathlike) -> None:
    """Draw `FIGURES` from `confusion` of every encoder's classification.json, the mean of its runs; without one it has no panel."""
    first = first_report(reports, "classification")
    for name, (probe, title) in FIGURES.items():
        panels = {
            encoder: np.array(found, np.float64).mean(axis=0)
            for encoder, parts in reports.items()
            if (found := lookup(parts.get("classification"), (probe, "confusion")))
        }
        path = Path(folder) / f"{name}.png"
        if first is None or not panels:
            save_message("No encoder was tested on labelled tiles: Table 3 tells why.", path)
        else:
            save(draw_confusion(panels, first["classes"], title), path)


def draw_confusion(panels: Mapping[str, Floats], classes: list[str], probe: str) -> Any:
    """A heat map per encoder under one colour scale: rows are the truth, as shares that sum to 1, columns what was said.

    Args:
        panels: encoder -> counts of test tiles [truth, said].
        classes: of rows and columns; under a row's name stands the number of its tiles, of one without tiles there are dashes.
        probe: who says it, as the axis tells.
    """
    names = [textwrap.fill(name, 14) for name in classes]
    side = CELL_IN * len(classes)
    margin = 0.12 + 0.075 * max(len(line) for name in names for line in name.splitlines())  # of names beside a panel
    columns = max(1, min(len(panels), int((PAGE_IN - margin) / (side + 0.25))))
    lines = -(-len(panels) // columns)
    columns = -(-len(panels) // lines)
    named = 1 + (len(panels) % columns > 0)  # lines with the classes' names below
    width, height = margin + columns * (side + 0.25) + 0.6, lines * (side + 0.6) + named * margin
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(lines, columns, figsize=(width, height), squeeze=False, layout="constrained")
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for number, (axis, (encoder, counts)) in enumerate(zip(axes.flat, panels.items(), strict=False)):
            total = counts.sum(axis=1, keepdims=True)
            shares = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
            image = draw_heat_map(axis, shares, names, (0, 1))
            title = textwrap.fill(f"({chr(97 + number % 26)}) {encoder}", 10 + 5 * len(classes))
            axis.set_title(title, fontsize=TITLE_PT)
            if number % columns == 0:
                told = [f"{name}\n{round(n):,}" for name, n in zip(names, total[:, 0], strict=True)]
                axis.set_yticks(range(len(names)), told, fontsize=TICK_PT)
                axis.set_ylabel("truth, tiles", fontsize=LABEL_PT)
            else:
                axis.set_yticks([])
            below = number + columns >= len(panels)
            axis.set_xticks(range(len(names)), names if below else [""] * len(names), rotation=90, fontsize=TICK_PT)
        figure.supxlabel(f"said by {probe}", fontsize=LABEL_PT)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=18 * lines)
        bar.set_label("share of a class's test tiles", fontsize=LABEL_PT)
        bar.ax.tick_params(labelsize=TICK_PT, length=2)
    return figure
