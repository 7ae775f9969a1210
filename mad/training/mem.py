"""Masked embedding modelling on regions: which tiles are hidden, what is asked of their predictions, and InfoNCE on top.

    MEM  = 1/S sum_s mean over hidden tiles of magnification s of (1 - cos(prediction, standardised embedding))
    CMEM = MEM + weight * InfoNCE(vectors of two masked views of each region)

Nested tiles leak: a tile at 10x shows the tissue of its 16 children at 40x. So masks are a mix (`MaskMix`): random tiles at any
magnification; *tubes*, places that are hidden at every magnification, whatever covers them included; and whole magnifications.
Masks are pure functions of a region and a generator.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mad.config.regions import MaskMix
from mad.tiles.regions import EVERY_PLACE

Mask = NDArray[np.bool_]
Numbers = NDArray[np.int64]


def draw_mask(
    scale: Numbers, place: Numbers, masks: MaskMix, ratio: float, rng: np.random.Generator
) -> tuple[str, Mask]:
    """A way of masking, drawn by its share, and the hidden tiles [n] of a region; at least one is hidden, and one is seen.

    A region with one magnification, or with one place, that cannot be masked in the way that was drawn gets random tiles.

    Args:
        scale: magnification of each tile [n], n >= 2.
        place: of each tile [n], -1 where it covers the whole region.
    """
    shares = masks.shares()
    kind, hidden = str(rng.choice(list(shares), p=list(shares.values()))), None
    if kind == "tube":
        hidden = mask_tubes(place, ratio, rng)
    elif kind == "magnification":
        hidden = mask_magnifications(scale, rng)
    return (kind, hidden) if hidden is not None else ("random", mask_random(len(scale), ratio, rng))


def mask_random(tiles: int, ratio: float, rng: np.random.Generator) -> Mask:
    """`ratio` of the tiles, at least one and not all."""
    hidden = np.zeros(tiles, dtype=bool)
    hidden[rng.permutation(tiles)[: _share(tiles, ratio)]] = True
    return hidden


def mask_tubes(place: Numbers, ratio: float, rng: np.random.Generator) -> Mask | None:
    """Every tile that lies in, or covers, one of `ratio` of the places, at least one and not all. None: there is one only."""
    present = np.unique(place[place != EVERY_PLACE])
    if len(present) < 2:
        return None
    chosen = rng.permutation(present)[: _share(len(present), ratio)]
    return np.isin(place, [*chosen, EVERY_PLACE])


def mask_magnifications(scale: Numbers, rng: np.random.Generator) -> Mask | None:
    """All tiles of one or more magnifications, as many as are drawn, but not of all. None: there is one only."""
    present = np.unique(scale)
    if len(present) < 2:
        return None
    return np.isin(scale, rng.permutation(present)[: rng.integers(1, len(present))])


def _share(count: int, ratio: float) -> int:
    return min(max(1, round(ratio * count)), count - 1)


def mem_loss(predicted: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Mean over the magnifications that occur of the mean of 1 - cos over their tiles.

    Args:
        predicted, target: [M, D], M >= 1.
        scale: magnification of each tile [M].
    """
    apart = cosine_distance(predicted, target)
    return torch.stack([apart[scale == number].mean() for number in scale.unique()]).mean()


def cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cos of each pair of rows [M, D]."""
    return 1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1)


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each region [B, W] of one view among those of the other, by cosine; mean of both directions."""
    cosine = F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).T
    own = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(cosine / temperature, own) + F.cross_entropy(cosine.T / temperature, own)) / 2
