"""The tile table: every tile of a slide's grid with its place, tissue and label. Pure, vectorised, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mad.slides.scale import ScalePlan
from mad.tiles.labels import block_sums, majority
from mad.tiles.pyramid import Grid, tile_id

DIGITS = ("i", "j", "k", "m")


def tile_columns(classes: Sequence[str]) -> list[str]:
    """Columns of a tile table, in order."""
    return [
        *("tile_id", "slide_id", "magnification", "mpp", *DIGITS, "x", "y", "side", "level", "native", "pyramid"),
        *("tissue", "pen", "label", "label_share", *(f"share_{name}" for name in classes), "parent_id", "status"),
    ]


def empty_table(classes: Sequence[str]) -> pd.DataFrame:
    """A tile table without a tile, with the columns and types of a full one."""
    return _typed(pd.DataFrame({name: [] for name in tile_columns(classes)}), classes)


def tile_table(
    slide_id: str,
    grid: Grid,
    plan: ScalePlan,
    tissue_counts: np.ndarray,
    class_counts: np.ndarray,
    cells: tuple[int, int],
    classes: Sequence[str],
    *,
    min_tissue: float,
    min_annotated: float,
    pen_counts: np.ndarray | None = None,
) -> pd.DataFrame:
    """All tiles that hold a pixel of the slide, at every available magnification.

    Args:
        tissue_counts: tissue raster cells per finest tile [rows, columns].
        class_counts: class raster cells per finest tile [rows, columns, num_classes].
        pen_counts: cells of ink per finest tile, of a raster like the tissue's; none: no ink.
        cells: raster cells along the side of a finest tile, of the tissue and of the class raster.

    Returns:
        One row per tile, sorted by (ladder level, i, j, k, m). `status`: "edge" where the tile crosses the slide's border,
        else "blank" where less than `min_tissue` of it is tissue, else "ok".
    """
    ink = np.zeros_like(tissue_counts) if pen_counts is None else pen_counts
    parts = []
    for number, level in enumerate(plan.levels):
        if not level.available:
            continue
        span = grid.ladder.span(number)
        rows, columns = np.indices(grid.level_shape(number)).reshape(2, -1)
        touches = grid.touches(number, rows, columns)
        rows, columns = rows[touches], columns[touches]
        digits = np.stack(np.broadcast_arrays(*grid.ladder.index(number, rows, columns)), axis=1)
        order = np.lexsort(digits.T[::-1])
        rows, columns, digits = rows[order], columns[order], digits[order]
        indices = [tuple(map(int, row)) for row in digits]
        tissue, pen = (
            block_sums(counts, span)[rows, columns] / (span * cells[0]) ** 2 for counts in (tissue_counts, ink)
        )
        counts = np.stack([block_sums(class_counts[..., c], span) for c in range(len(classes))], axis=-1)
        shares = counts[rows, columns] / (span * cells[1]) ** 2
        label, label_share = majority(shares, min_annotated)
        x, y, side, _ = grid.rectangle(number, rows, columns)
        inside = grid.contains(number, rows, columns)
        part = pd.DataFrame(
            {
                "tile_id": [tile_id(slide_id, index) for index in indices],
                "slide_id": slide_id,
                "magnification": level.magnification,
                "mpp": plan.mpp * level.downsample,
                "x": x,
                "y": y,
                "side": side,
                "level": level.level,
                "native": level.native,
                "pyramid": level.pyramid,
                "tissue": tissue.astype(np.float32),
                "pen": pen.astype(np.float32),
                "label": np.where(label < 0, None, np.array(classes, object)[label]),
                "label_share": label_share.astype(np.float32),
                "parent_id": [tile_id(slide_id, index[:-1]) if number else None for index in indices],
                "status": np.where(~inside, "edge", np.where(tissue < min_tissue, "blank", "ok")),
            }
        )
        for n, name in enumerate(DIGITS):
            part[name] = digits[:, n] if n < digits.shape[1] else None
        for n, name in enumerate(classes):
            part[f"share_{name}"] = shares[:, n].astype(np.float32)
        parts.append(part)
    return _typed(pd.concat(parts, ignore_index=True), classes) if parts else empty_table(classes)


def _typed(table: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    types = {
        **dict.fromkeys(("tile_id", "slide_id", "pyramid", "label", "parent_id", "status"), "string"),
        **dict.fromkeys(("magnification", "mpp"), "float64"),
        **dict.fromkeys(("tissue", "pen", "label_share", *(f"share_{name}" for name in classes)), "float32"),
        **dict.fromkeys(("i", "j", "level"), "int32"),
        **dict.fromkeys(("k", "m"), "Int16"),
        **dict.fromkeys(("x", "y", "side"), "int64"),
        "native": "bool",
    }
    return table[tile_columns(classes)].astype(types)
