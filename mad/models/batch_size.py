"""How many tiles an encoder takes at once: twice as many while that pays, half as many where memory ends.

The search knows nothing of a device: it is told of passes and their seconds, and says the size of the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GAIN = 1.05
"""Of tiles per second, that twice the tiles must bring."""
PASSES = 4
"""By which a size is judged: by the fastest of them but the first, in which kernels are chosen and memory is taken."""
MOST = 2048
"""Tiles: two stacks of them at 224 px are 0.6 GB beside the device."""


@dataclass(kw_only=True)
class BatchSize:
    """The size of an encoder's batches, which remembers what was tried."""

    size: int
    """Tiles of the next pass."""
    grows: bool = False
    """Whether larger sizes are still tried."""
    short: bool = False
    """Whether memory did not suffice for more."""
    rates: dict[int, float] = field(default_factory=dict)
    """Tiles per second by size."""
    _passes: list[float] = field(default_factory=list)

    def passed(self, tiles: int, seconds: float) -> bool:
        """Take note of a pass; whether the search has ended with it. Passes of other than `size` tiles tell nothing."""
        if not self.grows or tiles != self.size:
            return False
        self._passes.append(tiles / seconds)
        if len(self._passes) < PASSES:
            return False
        rate = self.rates[self.size] = max(self._passes[1:])
        self._passes.clear()
        if rate < GAIN * self.rates.get(self.size // 2, 0.0):
            self.size //= 2
        elif 2 * self.size <= MOST:
            self.size *= 2
            return False
        self.grows = False
        return True

    def refused(self) -> None:
        """Memory did not suffice for a pass: half the tiles, and no more is tried again."""
        self.size, self.grows, self.short = self.size // 2, False, True
