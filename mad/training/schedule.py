"""Schedules: pure functions of the step."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at the last step, `steps - 1`; `end` after it."""
    progress = min(max(step / max(steps - 1, 1), 0.0), 1.0)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, end: float) -> float:
    """Linear rise to `peak` over `warmup` steps (step 0 already moves: `peak / warmup`), then a cosine to `end`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, steps - warmup, peak, end)


def linear(step: int, steps: int, start: float, end: float) -> float:
    """A straight line from `start` at step 0 to `end` at step `steps` and after; `end` at once where `steps` is 0."""
    return end if step >= steps else start + (end - start) * step / steps


def ramp(step: int, steps: int) -> float:
    """A factor that rises linearly over `steps` steps from `1 / steps` at step 0; 1 after it."""
    return 1.0 if step + 1 >= steps else (max(step, 0) + 1) / steps
