"""What a distillation aligns, as a picture: a coarse tile with the student's token blocks, the teacher's tiles in their places."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pandas as pd

from mad.files import Pathlike, atomic_path
from mad.training.fields import mosaic, turned_places
from mad.training.views import Image, turned

SHOWN = 3  # fields
WAY = (1, False)  # a quarter turn clockwise
GRID, NUMBER = "#ffd400", "white"


def lowest_parents(shard: pd.DataFrame) -> pd.DataFrame:
    """Of a slide's shard table (tile_id kind role status) the parents that may be shown, with their `hash`: of each kind those
    with the lowest."""
    parents = shard[(shard["role"] == "parent") & (shard["status"] == "ok")]
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in parents["tile_id"]]
    hashed = parents.assign(hash=pd.Series(digests, parents.index, dtype="string")).sort_values("hash")
    return hashed.groupby("kind").head(SHOWN).sort_index()


def choose_fields(parents: pd.DataFrame, kind: str) -> list[str]:
    """Ids of the parents to show, of all slides' `lowest_parents`: those of pairs of this kind with the lowest hash, of as many
    slides as there are."""
    hashed = parents[parents["kind"] == kind].sort_values("hash")
    slides = hashed["tile_id"].str.rsplit("_L", n=1).str[0]
    order = slides.groupby(slides).cumcount().sort_values(kind="stable").index
    return hashed.loc[order, "tile_id"].tolist()[:SHOWN]


def draw_fields(fields: list[tuple[str, Image, list[Image]]], kind: str, path: Pathlike) -> None:
    """One row per field (name, parent [P, P, 3], its children, row by row): both as they are stored, and both turned alike.

    A number is that of a child; it stands in the student's token block that learns from it. Nothing is drawn without fields.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 0.6 + 3.6 * max(1, len(fields))), layout="constrained")
    FigureCanvasAgg(figure)
    coarse, fine = kind.split("-")
    titles = (f"{coarse}: what the student sees", f"{fine}: what the teacher embeds")
    rows = figure.subplots(max(1, len(fields)), 4, squeeze=False)
    for axes in rows.flat:
        axes.set_axis_off()
    for line, (name, parent, children) in zip(rows, fields, strict=False):
        plain, moved = np.arange(len(children)), turned_places(len(children), *WAY)
        whole = mosaic(children)
        images = (parent, whole, turned(parent, *WAY), turned(whole, *WAY))
        for number, (axes, image, title) in enumerate(zip(line, images, titles * 2, strict=True)):
            _draw(axes, image, plain if number < 2 else moved)
            axes.set_title(title if number < 2 else f"{title}, turned", fontsize=10)
        line[0].text(-0.03, 0.5, name, rotation=90, ha="right", va="center", fontsize=8, transform=line[0].transAxes)
    figure.suptitle("Child k lies in token block k, before and after a turn")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})


def _draw(axes: Any, image: Image, places: np.ndarray) -> None:
    """An image with the borders of its s x s blocks, and in each block the number of the child that lies there."""
    side = math.isqrt(len(places))
    axes.imshow(image, extent=(0, side, side, 0), interpolation="nearest")
    for edge in range(1, side):
        axes.axhline(edge, color=GRID, linewidth=0.8)
        axes.axvline(edge, color=GRID, linewidth=0.8)
    for block, child in enumerate(places):
        row, column = divmod(block, side)
        box = {"facecolor": "black", "alpha": 0.45, "edgecolor": "none", "pad": 1}
        axes.text(column + 0.5, row + 0.5, str(child), color=NUMBER, ha="center", va="center", fontsize=9, bbox=box)
