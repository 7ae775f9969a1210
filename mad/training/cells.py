"""Where a child lies in its parent, as shares of the parent's tokens: for targets from a part of it (`targets: cell`)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float32]


@lru_cache(maxsize=4096)
def cell_weights(path: tuple[int, ...], steps: tuple[int, ...], grid: tuple[int, int]) -> Weights:
    """Shares [rows, columns], summing to 1, that the tokens of a tile have in the area of a tile below it; not to be written to.

    Args:
        path: places below the tile, row-major in a step x step grid each: (k,) of a child, (k, m) of a grandchild.
        steps: linear factor of each of these magnifications to the one before it.
        grid: rows and columns of tokens, each of the same area.
    """
    top = left = 0.0
    side = 1.0
    for place, step in zip(path, steps, strict=False):
        side /= step
        top, left = top + place // step * side, left + place % step * side
    weights = np.outer(_overlaps(top, side, grid[0]), _overlaps(left, side, grid[1])).astype(np.float32)
    weights.flags.writeable = False
    return weights


def _overlaps(start: float, length: float, count: int) -> npt.NDArray[np.float64]:
    """Share of [start, start + length] in each of `count` equal parts of [0, 1]."""
    edges = np.arange(count + 1) / count
    return (np.minimum(edges[1:], start + length) - np.maximum(edges[:-1], start)).clip(0) / length
