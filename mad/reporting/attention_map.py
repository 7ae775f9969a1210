"""Where a head looks: its attention over a slide, one panel per magnification, over the slide's thumbnail.

Attention is shown as a multiple of what each token would have if all had the same, on a logarithmic scale in the colours of
viridis, which are in one order for every kind of colour vision, over a pale grey picture that adds none of its own. It tells what
the head has weighed, not what is cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mad.files import Pathlike, atomic_path
from mad.reporting.evidence import STYLE
from mad.reporting.figures import scale_bar

RANGE = (1 / 8, 8.0)
"""Multiples of equal attention at the ends of the scale."""
COLOURS = "viridis"
WIDTH = 3.2  # inches of a panel


@dataclass(frozen=True)
class AttentionMap:
    """One slide."""

    slide_id: str
    caption: str
    tokens: pd.DataFrame
    """kind ("40x", "region"), attention (sum 1), x, y, side in level-0 px."""
    thumbnail: NDArray[np.uint8] | None
    extent: Sequence[float] | None
    """Left, right, bottom, top of the thumbnail in level-0 px."""
    mpp: float | None


def attention_figure(title: str, maps: Sequence[AttentionMap], path: Pathlike) -> None:
    """A line per slide: the slide, then its attention at each kind of token."""
    kinds = list(dict.fromkeys(kind for each in maps for kind in _kinds(each.tokens)))
    columns, lines = 1 + max(len(kinds), 1), max(len(maps), 1)
    frames = [_frame(each) for each in maps] or [(0.0, 1.0, 1.0, 0.0)]
    height = WIDTH * max((bottom - top) / (right - left) for left, right, bottom, top in frames)
    norm = LogNorm(*RANGE)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            lines,
            columns,
            figsize=(WIDTH * columns + 0.9, (height + 0.25) * lines + 0.4),
            squeeze=False,
            layout="constrained",
        )
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[], aspect="equal")
        for line, each in enumerate(maps):
            left, right, bottom, top = frames[line]
            uniform = 1 / len(each.tokens)
            for axis, kind in zip(axes[line], [None, *kinds], strict=False):
                if each.thumbnail is not None and each.extent is not None:
                    shown = each.thumbnail if kind is None else _pale(each.thumbnail)
                    axis.imshow(shown, extent=each.extent, interpolation="antialiased")
                if kind is not None:
                    _lay(axis, each.tokens[each.tokens["kind"] == kind], uniform, norm)
                axis.set_xlim(left, right)
                axis.set_ylim(bottom, top)
                if line == 0:
                    axis.set_title("Slide" if kind is None else f"Attention, {kind}")
            axes[line][0].set_ylabel(each.caption)
            if each.mpp:
                scale_bar(axes[line][0], frames[line], each.mpp)
        bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, shrink=0.8, extend="both", pad=0.02)
        ticks = [2.0**n for n in range(-3, 4)]
        bar.set_ticks(ticks, labels=[f"{tick:g} ×" if tick >= 1 else f"1/{1 / tick:g} ×" for tick in ticks])
        bar.ax.minorticks_off()
        bar.set_label("attention, multiple of an equal share")
        figure.suptitle(title, fontsize=10)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150, metadata={"Software": None})
        plt.close(figure)


def _kinds(tokens: pd.DataFrame) -> list[str]:
    """The kinds of a slide's tokens, the largest tiles first."""
    sides = tokens.groupby("kind", sort=False)["side"].median().sort_values(ascending=False, kind="stable")
    return [str(kind) for kind in sides.index]


def _frame(each: AttentionMap) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of what is shown, level-0 px."""
    if each.extent is not None:
        left, right, bottom, top = each.extent
        return left, right, bottom, top
    tokens = each.tokens
    far = [float((tokens[axis] + tokens["side"]).max()) for axis in ("x", "y")]
    return float(tokens["x"].min()), far[0], far[1], float(tokens["y"].min())


def _pale(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture without colour, its contrast stretched into the brighter half."""
    grey = image.mean(-1)
    low, high = np.percentile(grey, [1, 99])
    light = 110 + 145 * np.clip((grey - low) / max(high - low, 1), 0, 1)
    return np.repeat(light[..., None], 3, axis=-1).astype(np.uint8)


def _lay(axis: Any, tokens: pd.DataFrame, uniform: float, norm: LogNorm) -> None:
    """Half-transparent squares over the slide."""
    squares = [Rectangle((x, y), side, side) for x, y, side in tokens[["x", "y", "side"]].itertuples(index=False)]
    values = np.clip(tokens["attention"].to_numpy() / uniform, *RANGE)
    axis.add_collection(PatchCollection(squares, cmap=COLOURS, norm=norm, array=values, alpha=0.6, linewidth=0))
