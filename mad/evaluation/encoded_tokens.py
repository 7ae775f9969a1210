"""Tokens of a tile encoder that learns, from pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mad.config.biomarkers import FinetuneConfig
from mad.evaluation.bags import Bag, Scaling
from mad.evaluation.learned_tokens import LearnedTokens
from mad.evaluation.tokens import EVERY, Places
from mad.models.encoders import TimmEncoder
from mad.training.optimiser import layer_of
from mad.training.views import draw_turn, turned

Pixels = Callable[[Bag, Places], NDArray[np.uint8]]
"""Tiles RGB [m, h, w, 3] of some places of a bag."""


class EncodedTokens(LearnedTokens):
    """Each tile on its own, `pass_tiles` at a time."""

    learner = "encoder"

    def __init__(
        self, scaling: Scaling, device: str, encoder: TimmEncoder, pixels: Pixels, config: FinetuneConfig, seed: int
    ) -> None:
        """`encoder` is copied; `seed` is that of the flips and turns."""
        super().__init__(scaling, device, encoder.model, layer_of(encoder.model), config)
        self._encoder = copy.deepcopy(encoder, {id(encoder.model): self.network})  # around the copy that learns
        self._pixels = pixels
        self._rng = np.random.default_rng([seed, 1])

    def vectors(self, bags: Sequence[Bag], places: Sequence[Places]) -> Tensor:
        tiles = [self._pixels(bag, some) for bag, some in zip(bags, places, strict=True)]
        if torch.is_grad_enabled() and self._config.turns:
            tiles = [np.stack([turned(tile, *draw_turn(self._rng)) for tile in part]) for part in tiles]
        return self.passed(self._encoder.embed, torch.from_numpy(np.concatenate(tiles)).split(self._config.pass_tiles))

    @torch.no_grad()
    def embedded(self, tested: Sequence[Bag]) -> dict[str, Bag]:
        stores = {bag.slide_id: self.vectors([bag], [EVERY]).cpu().numpy() for bag in tested}
        return {bag.slide_id: replace(bag, store=stores[bag.slide_id], rows=np.arange(len(bag))) for bag in tested}
