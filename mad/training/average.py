"""The moving average of what learns, for loops that hold one copy of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class MovingAverage:
    """The moving average of a network's learning parameters; without momentum the parameters themselves."""

    def __init__(self, network: nn.Module, momentum: float | None) -> None:
        self._momentum = momentum
        self._live = [] if momentum is None else [p for p in network.parameters() if p.requires_grad]
        self._average = [parameter.detach().clone() for parameter in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimiser step: average = momentum * average + (1 - momentum) * parameter."""
        if self._momentum is not None:
            for average, parameter in zip(self._average, self._live, strict=True):
                average.lerp_(parameter, 1 - self._momentum)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the average's values meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self._average, self._live, strict=True):
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)
