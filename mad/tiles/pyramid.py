"""The index (i, j, k, m): which tile is where, whose child it is, and what it is called. Pure geometry, no I/O.

A coarsest tile has an index (i, j), row i and column j of the slide's grid. A tile splits into s x s children at the next
finer magnification, numbered row-major: k = s * (row in the parent) + (column in the parent). So (i, j, k) is a tile at
10x and (i, j, k, m) one at 40x (MAD paper, Methods: multi-scale indexing; there s = 4 at both steps). Any ladder of
integer steps works: [2.5, 10, 40] has steps (4, 4), [5, 20] has (4,), [5, 10, 20] has (2, 2).

Beside the index, a tile has a *position* (level, row, column): its row and column in the grid of its own magnification.
Functions take integers or integer arrays alike.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

Index = tuple[int, ...]
TILE_ID = re.compile(r"(?P<slide>.+)_L(?P<level>\d+)(?P<index>(_\d+)+)")


@dataclass(frozen=True)
class Ladder:
    """Magnifications, coarsest first, each an integer multiple of the one before."""

    magnifications: tuple[float, ...]

    def __post_init__(self) -> None:
        for coarse, fine in pairwise(self.magnifications):
            if fine / coarse < 2 or abs(fine / coarse - round(fine / coarse)) > 1e-9:
                raise ValueError(
                    f"neighbouring magnifications must differ by an integer factor >= 2: {self.magnifications}"
                )

    def __len__(self) -> int:
        return len(self.magnifications)

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Linear factor s from each magnification to the next finer one."""
        return tuple(round(fine / coarse) for coarse, fine in pairwise(self.magnifications))

    @cached_property
    def _spans(self) -> tuple[int, ...]:
        return tuple(math.prod(self.steps[level:]) for level in range(len(self)))

    def span(self, level: int) -> int:
        """Side of a tile at `level` in finest tiles."""
        return self._spans[level]

    def name(self, level: int) -> str:
        """`10x` and the like."""
        return f"{self.magnifications[level]:g}x"

    def transition(self, level: int) -> str:
        """Name of the pair kind whose parents are at `level`: `10x-40x`."""
        return f"{self.name(level)}-{self.name(level + 1)}"

    def mpp(self, level: int) -> float:
        """Nominal um/px: 10 / magnification."""
        return 10 / self.magnifications[level]

    def index(self, level: int, row: Any, column: Any) -> tuple[Any, ...]:
        """The index (i, j[, k[, m]]) of the tile at `row`, `column` of `level`'s own grid."""
        digits: list[Any] = []
        for step in reversed(self.steps[:level]):
            digits.append((row % step) * step + column % step)
            row, column = row // step, column // step
        return (row, column, *reversed(digits))

    def position(self, index: tuple[Any, ...]) -> tuple[int, Any, Any]:
        """The (level, row, column) of an index; inverse of `index`."""
        row, column, *digits = index
        for step, digit in zip(self.steps, digits, strict=False):
            row, column = row * step + digit // step, column * step + digit % step
        return len(digits), row, column

    def children(self, index: Index) -> list[Index]:
        """The s² children, row-major; none at the finest level."""
        level = len(index) - 2
        return [(*index, child) for child in range(self.steps[level] ** 2)] if level < len(self) - 1 else []


def parent(index: Index) -> Index | None:
    """The index of the parent; None at the coarsest level."""
    return index[:-1] if len(index) > 2 else None


def tile_id(slide_id: str, index: Index) -> str:
    """`{slide}_L{ladder level}_{i}_{j}[_{k}[_{m}]]`."""
    return f"{slide_id}_L{len(index) - 2}_" + "_".join(map(str, index))


def parse_tile_id(text: str) -> tuple[str, Index]:
    """Slide id and index of a tile id; inverse of `tile_id`.

    Raises:
        ValueError: the text is no tile id.
    """
    match = TILE_ID.fullmatch(text)
    index = tuple(int(part) for part in match["index"][1:].split("_")) if match else ()
    if not match or len(index) != int(match["level"]) + 2:
        raise ValueError(f"{text!r} is no tile id; one looks like 'S01_L1_0_2_13'")
    return match["slide"], index


@dataclass(frozen=True)
class Grid:
    """The grid of one slide: coarsest tiles from the top left corner of its bounds, as many as touch the slide.

    `finest_px` is the exact side of a finest tile in level-0 pixels, a whole number where the slide keeps its own pixel
    grid. Every edge is a whole number of finest tiles and is rounded once, from its exact place: nothing drifts, and the
    edges of children coincide with those of their parent.
    """

    ladder: Ladder
    finest_px: float
    width: int
    height: int
    left: int = 0
    top: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of coarsest tiles."""
        side = self.finest_px * self.ladder.span(0)
        return int(np.ceil(self.height / side - 1e-9)), int(np.ceil(self.width / side - 1e-9))

    def level_shape(self, level: int) -> tuple[int, int]:
        """Rows and columns of tiles at a level, those beyond the slide's border included."""
        factor = self.ladder.span(0) // self.ladder.span(level)
        return self.shape[0] * factor, self.shape[1] * factor

    def edge(self, level: int, position: Any) -> Any:
        """Level-0 pixels from the grid's origin to the near edge of row (or column) `position` of `level`."""
        exact = position * self.ladder.span(level) * self.finest_px + 0.5
        return np.floor(exact).astype(np.int64) if isinstance(exact, np.ndarray) else math.floor(exact)

    def rectangle(self, level: int, row: Any, column: Any) -> tuple[Any, Any, Any, Any]:
        """(x, y, width, height) in level-0 pixels of the slide."""
        x, y = self.edge(level, column), self.edge(level, row)
        return (
            x + self.left,
            y + self.top,
            self.edge(level, column + 1) - x,
            self.edge(level, row + 1) - y,
        )

    def touches(self, level: int, row: Any, column: Any) -> Any:
        """Whether a tile holds at least one pixel of the slide."""
        return (self.edge(level, column) < self.width) & (self.edge(level, row) < self.height)

    def holds(self, index: Index) -> bool:
        """Whether an index names a tile of this grid with at least one pixel of the slide."""
        digits = index[2:]
        if len(digits) >= len(self.ladder) or min(index) < 0:
            return False
        if any(digit >= step**2 for digit, step in zip(digits, self.ladder.steps, strict=False)):
            return False
        return bool(self.touches(*self.ladder.position(index)))

    def contains(self, level: int, row: Any, column: Any) -> Any:
        """Whether a tile lies wholly inside the slide."""
        return (self.edge(level, column + 1) <= self.width) & (self.edge(level, row + 1) <= self.height)
