"""Limited-memory BFGS that is told values instead of calling a function, so that several minimisations share passes over data."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

ARMIJO, CURVATURE = 1e-4, 0.9
MOST_TRIALS = 20


class Lbfgs:
    """Minimises a smooth convex function: evaluate it at `point`, `tell` value and gradient, until `done`.

    Directions by the two-loop recursion (Nocedal & Wright 2006, algorithm 7.4), step lengths by bisection to the weak Wolfe
    conditions (Lewis & Overton 2013).
    """

    def __init__(self, start: Tensor, *, memory: int = 20, tolerance: float = 1e-9):
        """From `start` [m] float64; done where an iteration gains less than `tolerance` of the value, or no step does."""
        self.point = self.best = start
        self.done = False
        self.tolerance = tolerance
        self.pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=memory)
        self.value = float("inf")
        self.gradient = self.direction = torch.zeros_like(start)
        self.slope, self.step, self.low, self.high, self.trials = 0.0, 0.0, 0.0, float("inf"), 0

    def tell(self, value: float, gradient: Tensor) -> None:
        """Value and gradient [m] at `point`; sets the next `point`, or `done`."""
        if value > self.value + ARMIJO * self.step * self.slope:
            self.high = self.step
        elif self.slope < 0 and float(gradient @ self.direction) < CURVATURE * self.slope:
            self.low = self.step
        else:
            return self._accept(value, gradient)
        self.trials += 1
        self.done = self.trials == MOST_TRIALS
        self.step = (self.low + self.high) / 2 if self.high < float("inf") else 2 * self.low
        self.point = self.best + self.step * self.direction
        return None

    def _accept(self, value: float, gradient: Tensor) -> None:
        first = self.slope == 0
        if not first:
            self.done = self.value - value <= self.tolerance * abs(value)
            change = gradient - self.gradient
            if float(change @ self.direction) > 0:
                self.pairs.append((self.point - self.best, change))
        self.best, self.value, self.gradient = self.point, value, gradient
        self.direction = self._two_loops()
        self.slope = float(gradient @ self.direction)
        self.done |= self.slope >= 0
        self.step = min(1.0, 1 / float(gradient.abs().sum().clamp(min=1e-300))) if first else 1.0
        self.low, self.high, self.trials = 0.0, float("inf"), 0
        self.point = self.best + self.step * self.direction

    def _two_loops(self) -> Tensor:
        vector, shares = self.gradient.clone(), []
        for moved, change in reversed(self.pairs):
            shares.append(float(moved @ vector) / float(moved @ change))
            vector -= shares[-1] * change
        if self.pairs:
            moved, change = self.pairs[-1]
            vector *= float(moved @ change) / float(change @ change)
        for (moved, change), share in zip(self.pairs, reversed(shares), strict=True):
            vector += (share - float(change @ vector) / float(moved @ change)) * moved
        return -vector
