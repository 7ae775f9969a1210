"""Where an attention head's tokens come from: stored embeddings, or a network that learns (`mad.evaluation.learned_tokens`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mad.evaluation.bags import Bag, Scaling

Places = NDArray[np.int64] | slice
EVERY = slice(None)


class StoredTokens(nn.Module):
    """Standardised tokens as they were embedded: nothing learns."""

    def __init__(self, scaling: Scaling, device: str) -> None:
        super().__init__()
        self.scaling, self.device = scaling, torch.device(device)

    def forward(self, bags: Sequence[Bag], places: Sequence[Places]) -> list[Tensor]:
        """Tokens [m, d] of some places of each bag, on the head's device."""
        found = [self.scaling(bag, some) for bag, some in zip(bags, places, strict=True)]
        return [torch.from_numpy(np.asarray(values, np.float32)).to(self.device) for values in found]

    def draw(self, rng: np.random.Generator, bag: Bag, most: int | None) -> Places:
        """Which tokens of a bag a training step sees, `most` of them at most."""
        return EVERY if most is None or len(bag) <= most else rng.choice(len(bag), most, replace=False)

    def groups(self) -> list[dict[str, Any]]:
        """For the optimiser, beside the head's."""
        return []

    def before_step(self, optimiser: torch.optim.Optimizer, step: int, steps: int) -> None:
        """Rates and gradients of step 0, 1, ... of `steps`, when the gradients are there."""
