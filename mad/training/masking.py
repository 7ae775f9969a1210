"""Which patches of a student's global view are hidden: blocks, as iBOT and DINOv2 draw them (BEiT, Bao et al. 2022, algorithm 1).

Of all global views of a step a fixed share is masked; the masked ones divide the range of ratios into equal strata, one
each, so that every step holds light and heavy masks. Which view gets which stratum is a function of (seed, step), the rest
comes from the sample's own generator: masks depend neither on the number of processes nor on where a run was resumed. Where
samples of one step have different numbers of views (`mix_mode: within`), the share holds on average only.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mad.config.training import MaskConfig

Mask = npt.NDArray[np.bool_]
MASK_STREAM = 3  # beside the streams of order and views
MIN_BLOCK = 4  # patches
ASPECT = 3.3  # largest; the smallest is its inverse
ATTEMPTS = 10  # to place one more block


class Masking:
    """Masks of the global views of sample n of a run with `batch` samples per step, for a grid of (rows, columns) patches."""

    def __init__(self, grid: tuple[int, int], config: MaskConfig, batch: int, seed: int) -> None:
        self.grid, self.config, self.batch, self.seed = grid, config, batch, seed

    def masks(self, n: int, views: int, rng: np.random.Generator) -> Mask:
        """[views, rows * columns]; `rng` is the sample's own."""
        step, place = divmod(n, self.batch)
        strata = _strata(self.seed, step, self.batch * views)[place * views :][:views]
        masked = max(1, round(self.config.probability * self.batch * views))
        low, high = self.config.ratio
        shares = np.where(strata < masked, low + (high - low) * (strata + rng.random(views)) / masked, 0.0)
        return block_masks(shares, self.grid, rng)


@lru_cache(maxsize=4)
def _strata(seed: int, step: int, views: int) -> npt.NDArray[np.int64]:
    """A permutation of the views of a step: the lowest numbers are strata, the others mean no mask."""
    return np.random.default_rng([seed, MASK_STREAM, step]).permutation(views)


def block_masks(shares: npt.NDArray[np.float64], grid: tuple[int, int], rng: np.random.Generator) -> Mask:
    """Booleans [B, N], row-major patches: of view b exactly int(shares[b] N) are true, at least one where the share is not 0."""
    size = grid[0] * grid[1]
    targets = [max(1, int(share * size)) if share > 0 else 0 for share in shares]
    return np.stack([block_mask(target, grid, rng) for target in targets])


def block_mask(target: int, grid: tuple[int, int], rng: np.random.Generator) -> Mask:
    """Booleans [N] with exactly `target` true ones in rectangles of at least 4 patches, aspect 1/3.3 to 3.3.

    What is left when no further rectangle fits is filled by single patches at random.
    """
    rows, columns = grid
    mask = np.zeros(grid, dtype=bool)
    while (left := target - int(mask.sum())) >= MIN_BLOCK:
        for _ in range(ATTEMPTS):
            area, aspect = rng.uniform(MIN_BLOCK, left), np.exp(rng.uniform(-np.log(ASPECT), np.log(ASPECT)))
            h, w = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
            if not (0 < h <= rows and 0 < w <= columns and h * w >= MIN_BLOCK and 1 / ASPECT <= h / w <= ASPECT):
                continue
            top, start = int(rng.integers(rows - h + 1)), int(rng.integers(columns - w + 1))
            block = mask[top : top + h, start : start + w]
            if 0 < block.size - int(block.sum()) <= left:
                block[:] = True
                break
        else:
            break
    free = np.flatnonzero(~mask)
    mask.flat[rng.permutation(free)[: target - int(mask.sum())]] = True
    return mask.ravel()
