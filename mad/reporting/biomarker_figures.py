"""The figures of the slide-level evaluation from `report/biomarkers.json`. No number is computed here."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from mad.files import Pathlike, atomic_path
from mad.reporting.biomarker_table import NAMES
from mad.reporting.evidence import BASELINE, METHOD, STYLE
from mad.reporting.overlay import PALETTE

CHANCE = {"auroc": 0.5, "r2": 0.0}
MARKERS = "osD^vP*Xph<>"
TITLE_WIDTH = 6.6  # inches that the title takes


def biomarker_figure(found: dict[str, Any], path: Pathlike) -> None:
    """Dots and intervals: a panel per target, an aggregator per height; below, differences to the baseline."""
    targets, baseline = found["targets"], found["baseline"]
    names = list(dict.fromkeys(name for part in targets.values() for name in part["aggregators"]))
    lines = 1 if baseline is None else 2
    with plt.rc_context(STYLE):
        size = max(2.4 * len(targets) + 1.4, TITLE_WIDTH), (0.19 * len(names) + 0.75) * lines
        figure, axes = plt.subplots(lines, len(targets), figsize=size, squeeze=False, layout="constrained")
        for column, (target, part) in enumerate(targets.items()):
            metric = part["metric"]
            for line in range(lines):
                axis = axes[line][column]
                for height, name in enumerate(names):
                    whole = part["aggregators"].get(name, {}).get("by_share", {}).get("1", {})
                    numbers = whole if line == 0 else whole.get("difference")
                    if not numbers or numbers["metrics"][metric]["value"] is None:
                        continue
                    value, interval = (numbers["metrics"][metric][key] for key in ("value", "interval"))
                    colour = BASELINE if name == baseline else METHOD
                    if interval:
                        axis.plot(interval, [height] * 2, color=colour, linewidth=1.6, alpha=0.55)
                    axis.plot(value, height, "o", color=colour, markersize=5, markeredgecolor="white")
                axis.axvline(CHANCE[metric] if line == 0 else 0, color="black", linewidth=0.8, linestyle=":", zorder=0)
                axis.set_title(f"{target}: {NAMES[metric]}" if line == 0 else f"less {baseline}", fontsize=8)
                axis.set_ylim(len(names) - 0.4, -0.6)
                axis.set_yticks(range(len(names)), names if column == 0 else [])
                axis.grid(axis="x", color="#e5e5e5", linewidth=0.5)
                axis.set_axisbelow(True)
        figure.suptitle(
            "bar: 95 % interval over patients, orange: the baseline, dotted: chance, or no difference", fontsize=9
        )
        _save(figure, path)


def tile_figure(found: dict[str, Any], path: Pathlike) -> None:
    """Encoded tiles per slide against accuracy: a panel per target, a line per aggregator, a dot per share of its finest tiles."""
    targets = found["targets"]
    names = list(dict.fromkeys(name for part in targets.values() for name in part["aggregators"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(targets), figsize=(2.9 * len(targets) + 1.7, 2.9), squeeze=False, layout="constrained"
        )
        for axis, (target, part) in zip(axes[0], targets.items(), strict=True):
            metric = part["metric"]
            for number, name in enumerate(names):
                shares = part["aggregators"].get(name, {}).get("by_share", {}).values()
                points = [(each["tiles"], each["metrics"][metric]["value"]) for each in shares]
                points = sorted(point for point in points if point[1] is not None)
                if points:
                    colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
                    axis.plot(
                        *zip(*points, strict=True), marker=marker, color=colour, markersize=4, linewidth=1, label=name
                    )
            axis.axhline(CHANCE[metric], color="black", linewidth=0.8, linestyle=":", zorder=0)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set(xlabel="tiles encoded per slide", ylabel=NAMES[metric])
            axis.set_title(target, fontsize=8)
            axis.grid(color="#e5e5e5", linewidth=0.5)
            axis.set_axisbelow(True)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        _save(figure, path)


def _save(figure: Any, path: Pathlike) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, metadata={"Software": None})
    plt.close(figure)
