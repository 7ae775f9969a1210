"""Slides as bags of embedded tokens, and their standardisation by the slides that a head is trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mad.training.region_data import SlideRegions

CHUNK = 8192


@dataclass(frozen=True, kw_only=True)
class Bag:
    """The tokens of one slide."""

    slide_id: str
    store: NDArray[np.float32]
    """[N, d], a memory-mapped file perhaps; of it"""
    rows: NDArray[np.int64]
    """[n], the rows that are in the bag."""
    kind: NDArray[np.int64]
    """[n] codes of the token's magnification, or of the region tokens: each kind is standardised on its own."""
    names: NDArray[np.object_]
    """[n], the tile's id, or that of the region."""
    tiles: int
    """Tiles that have to be encoded for it: those that a mixer sees, whatever it hands on."""
    regions: SlideRegions | None = None
    """For a mixer that learns: what it mixes. Row by row its tokens are those of `store`: a region's own, then its tiles'."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
        """Embeddings [m, d] of some places of the bag."""
        return np.asarray(self.store[self.rows[places]], np.float32)

    @cached_property
    def moments(self) -> dict[int, tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
        """Kind -> number of tokens, their mean [d], and the sum of their squared deviations from it [d]."""
        found: dict[int, tuple[int, NDArray[np.float64], NDArray[np.float64]]] = {}
        for kind in np.unique(self.kind):
            places = np.flatnonzero(self.kind == kind)
            parts = [
                self.take(places[start : start + CHUNK]).astype(np.float64) for start in range(0, len(places), CHUNK)
            ]
            found[int(kind)] = _joined((len(x), x.mean(0), ((x - x.mean(0)) ** 2).sum(0)) for x in parts)
        return found


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Mean and deviation of each kind of token [kinds, d]."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def __call__(self, bag: Bag, places: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
        """Standardised embeddings [m, d] of some places of a bag."""
        kind = bag.kind[places]
        return (bag.take(places) - self.mean[kind]) / self.std[kind]


def fit_scaling(bags: Iterable[Bag], num_kinds: int) -> Scaling:
    """The scaling by all tokens of some slides; a constant dimension, or a kind that they lack, is divided by 1."""
    bags = list(bags)
    dim = bags[0].store.shape[1]
    mean, std = np.zeros((num_kinds, dim), np.float32), np.ones((num_kinds, dim), np.float32)
    for kind in range(num_kinds):
        parts = [bag.moments[kind] for bag in bags if kind in bag.moments]
        if parts:
            count, centre, squares = _joined(parts)
            deviation = np.sqrt(squares / count)
            mean[kind] = centre
            std[kind] = np.where(deviation > 1e-6 * np.maximum(np.abs(centre), 1e-6), deviation, 1)
    return Scaling(mean=mean, std=std)


def _joined(
    parts: Iterable[tuple[int, NDArray[np.float64], NDArray[np.float64]]],
) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Counts, means and squared deviations of parts as those of their union (Chan et al. 1983)."""
    total, mean, squares = 0, np.zeros(1), np.zeros(1)
    for count, centre, deviations in parts:
        gap, both = centre - mean, total + count
        mean = mean + gap * count / both
        squares = squares + deviations + gap**2 * total * count / both
        total = both
    return total, mean, squares
