"""Where a child lies in its parent, as shares of the parent's tokens: for targets from a part of it (`targets: cell`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch import nn

from mad.config.kinds import STANDALONE
from mad.config.training import RunConfig
from mad.files import MadError
from mad.models.cells import feature_grid
from mad.training.pairing import steps_of

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
    for place, step in zip(path, steps[: len(path)], strict=True):
        side /= step
        top, left = top + place // step * side, left + place % step * side
    weights = np.outer(_overlaps(top, side, grid[0]), _overlaps(left, side, grid[1])).astype(np.float32)
    weights.flags.writeable = False
    return weights


def needed_grid(entry: RunConfig, backbone: nn.Module, tile_px: int) -> tuple[int, int] | None:
    """Rows and columns of a tile's tokens; None where the run need not know them.

    Raises:
        MadError: the backbone has none.
    """
    if not entry.ibot.weight and entry.targets == "tile":
        return None
    if (grid := feature_grid(backbone, tile_px)) is None:
        raise MadError(
            f"runs.{entry.name}.targets: {entry.backbone.model} has neither patch tokens nor a feature map that tell the parts of "
            "a tile apart; set targets: tile, or take a vision transformer"
        )
    return grid


def check_grid(grid: tuple[int, int], kinds: Sequence[str], where: str) -> None:
    """Refuse tokens so large that children of one parent would share them. Grandchildren may share their parent's.

    Raises:
        MadError: a kind of pair has more children side by side than the grid has tokens.
    """
    for kind in kinds:
        if kind != STANDALONE and min(grid) < (step := steps_of(kind)[0]):
            raise MadError(
                f"{where}: its {grid[0]} x {grid[1]} tokens do not tell the {step} x {step} children of {kind} apart; set "
                "targets: tile, or take smaller patches, larger tiles or a network with a finer last map"
            )


def _overlaps(start: float, length: float, count: int) -> npt.NDArray[np.float64]:
    """Share of [start, start + length] in each of `count` equal parts of [0, 1]."""
    edges = np.arange(count + 1) / count
    return (np.minimum(edges[1:], start + length) - np.maximum(edges[:-1], start)).clip(0) / length
