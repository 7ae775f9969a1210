"""Tokens of a network that learns with the attention head over them (end to end).

The published system (XMAG, 2025) trains student and attention pooling together on the slides' labels and describes no more; the
rest is our choice. Tokens are standardised by what the network told of the fitted slides before it learned, so that training
begins where a frozen one's does. The network stays in evaluation mode: no dropped paths, running statistics as they are.
Layer l of L learns at `lr * layer_decay ** (L - l)`, by a linear warm-up and a cosine to 0; the head at its own, constant rate.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mad.config.biomarkers import FinetuneConfig
from mad.evaluation.bags import Bag, Scaling
from mad.evaluation.tokens import Places, StoredTokens
from mad.files import MadError
from mad.training.schedule import warmup_cosine


class LearnedTokens(StoredTokens):
    """Standardised tokens of a network of its own.

    Raises:
        MadError: all layers of the network are frozen.
    """

    learner: str
    """What the network is, in words."""

    def __init__(
        self, scaling: Scaling, device: str, network: nn.Module, layers: dict[str, int], config: FinetuneConfig
    ) -> None:
        """`network` is copied; `layers` has the depth of its parameters, from 0; those that it lacks never learn."""
        super().__init__(scaling, device)
        self.network, self._config = copy.deepcopy(network), config
        self._top = max(layers.values())
        if config.frozen_layers > self._top:
            raise MadError(
                f"finetune.frozen_layers: {config.frozen_layers} leaves nothing to learn: the {self.learner} has {self._top + 1} "
                "layers; lr: 0 keeps all of it as it is"
            )
        self._layer, self._before = {}, {}
        initial = dict(network.named_parameters())
        for name, parameter in self.network.named_parameters():
            if name in layers:
                self._layer[parameter], self._before[parameter] = layers[name], initial[name]
            parameter.requires_grad_(config.lr > 0 and layers.get(name, -1) >= config.frozen_layers)
        mean, std = (torch.from_numpy(values).to(self.device) for values in (scaling.mean, scaling.std))
        self._mean, self._std = mean, std

    @property
    def learning(self) -> list[nn.Parameter]:
        """The network's parameters that are not frozen."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    @property
    @torch.no_grad()
    def change(self) -> float:
        """|weights - initial ones| / |initial ones|, of all layers together."""
        moved = sum(float((now.double() - before.double()).square().sum()) for now, before in self._before.items())
        return float(np.sqrt(moved / sum(float(before.double().square().sum()) for before in self._before.values())))

    @abstractmethod
    def vectors(self, bags: Sequence[Bag], places: Sequence[Places]) -> Tensor:
        """Some places of each bag, one after the other, as the network tells them now [sum m, d]; not standardised."""

    def embedded(self, tested: Sequence[Bag]) -> dict[str, Bag] | None:
        """Slide -> its whole bag as the network tells it now, not standardised; None: it is kept, and asked anew."""
        return None

    def forward(self, bags: Sequence[Bag], places: Sequence[Places]) -> list[Tensor]:
        kinds = [bag.kind[some] for bag, some in zip(bags, places, strict=True)]
        kind = torch.from_numpy(np.concatenate(kinds)).to(self.device)
        vectors = (self.vectors(bags, places) - self._mean[kind]) / self._std[kind]
        return list(vectors.split([len(part) for part in kinds]))

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

    def passed(self, function: Callable[[Any], Tensor], parts: Sequence[Any]) -> Tensor:
        """Vectors of parts of one forward pass each, joined; under `checkpointing` each is computed again for its gradient."""
        again = self._config.checkpointing and torch.is_grad_enabled() and bool(self.learning)
        return torch.cat(
            [
                checkpoint(function, part, use_reentrant=False, preserve_rng_state=False) if again else function(part)
                for part in parts
            ]
        ).to(self.device)
