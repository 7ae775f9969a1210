"""Tokens of an encoder that learns with the attention head over them (end to end).

The published system (XMAG, 2025) trains student and attention pooling together on the slides' labels and describes no more; the
rest is our choice. Tokens are standardised by what the encoder told of the fitted slides before it learned, so that training
begins where a frozen encoder's does. The encoder stays in evaluation mode: no dropped paths, running statistics as they are.
Layer l of L learns at `lr * layer_decay ** (L - l)`, by a linear warm-up and a cosine to 0; the head at its own, constant rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mad.config.biomarkers import FinetuneConfig
from mad.evaluation.bags import Bag, Scaling
from mad.evaluation.tokens import EVERY, Places, StoredTokens
from mad.files import MadError
from mad.models.encoders import TimmEncoder
from mad.training.optimiser import layer_of
from mad.training.schedule import warmup_cosine
from mad.training.views import draw_turn, turned

Pixels = Callable[[Bag, Places], NDArray[np.uint8]]
"""Tiles RGB [m, h, w, 3] of some places of a bag."""


class LearnedTokens(StoredTokens):
    """Standardised tokens of an encoder of its own, from pixels.

    Raises:
        MadError: all layers of the encoder are frozen.
    """

    def __init__(
        self, scaling: Scaling, device: str, encoder: TimmEncoder, pixels: Pixels, config: FinetuneConfig, seed: int
    ) -> None:
        """`encoder` is copied; `seed` is that of the flips and turns."""
        super().__init__(scaling, device)
        self._encoder, self._pixels, self._config = copy.deepcopy(encoder), pixels, config
        self.network = self._encoder.model
        self._rng = np.random.default_rng([seed, 1])
        layers = layer_of(self.network)
        self._top = max(layers.values())
        if config.frozen_layers > self._top:
            raise MadError(
                f"finetune.frozen_layers: {config.frozen_layers} leaves nothing to learn: the encoder has {self._top + 1} "
                "layers; lr: 0 keeps all of it as it is"
            )
        self._layer = {}
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(config.lr > 0 and layers[name] >= config.frozen_layers)
            self._layer[parameter] = layers[name]
        mean, std = (torch.from_numpy(values).to(self.device) for values in (scaling.mean, scaling.std))
        self._mean, self._std = mean, std

    @property
    def learning(self) -> list[nn.Parameter]:
        """The encoder's parameters that are not frozen."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def forward(self, bags: Sequence[Bag], places: Sequence[Places]) -> list[Tensor]:
        learns = torch.is_grad_enabled()
        tiles = [self._pixels(bag, some) for bag, some in zip(bags, places, strict=True)]
        if learns and self._config.turns:
            tiles = [np.stack([turned(tile, *draw_turn(self._rng)) for tile in part]) for part in tiles]
        vectors = self._encode(torch.from_numpy(np.concatenate(tiles)))
        kinds = np.concatenate([bag.kind[some] for bag, some in zip(bags, places, strict=True)])
        kind = torch.from_numpy(kinds).to(self.device)
        return list(((vectors - self._mean[kind]) / self._std[kind]).split([len(part) for part in tiles]))

    def groups(self) -> list[dict[str, Any]]:
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for parameter in self.learning:
            groups.setdefault((self._layer[parameter], parameter.ndim >= 2), []).append(parameter)
        decay = self._config.layer_decay
        return [
            {"params": parameters, "scale": decay ** (self._top - layer), **({} if matrices else {"weight_decay": 0.0})}
            for (layer, matrices), parameters in sorted(groups.items(), key=lambda group: group[0])
        ]

    def before_step(self, optimiser: torch.optim.Optimizer, step: int, steps: int) -> None:
        config = self._config
        rate = warmup_cosine(step, steps, min(config.warmup, steps - 1), config.lr, 0.0)
        for group in optimiser.param_groups:
            if "scale" in group:
                group["lr"] = rate * group["scale"]
        if self.learning:
            nn.utils.clip_grad_norm_(self.learning, config.clip)

    @torch.no_grad()
    def embedded(self, bag: Bag) -> Bag:
        """The same tiles with what the encoder tells of them now, not standardised."""
        vectors = self._encode(torch.from_numpy(self._pixels(bag, EVERY))).cpu().numpy()
        return replace(bag, store=vectors, rows=np.arange(len(bag)))

    def _encode(self, tiles: Tensor) -> Tensor:
        """uint8 [m, h, w, 3] to embeddings [m, d] on the head's device, so many tiles at a time."""
        again = self._config.checkpointing and torch.is_grad_enabled() and bool(self.learning)
        parts = [
            checkpoint(self._encoder.embed, part, use_reentrant=False, preserve_rng_state=False)
            if again
            else self._encoder.embed(part)
            for part in tiles.split(self._config.pass_tiles)
        ]
        return torch.cat(parts).to(self.device)
