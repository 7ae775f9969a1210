"""Block masks: exact counts, shapes of blocks, strata over a step, and independence of processes."""

import numpy as np
import pytest

from mad.config.training import MaskConfig
from mad.training.masking import Masking, block_mask, block_masks


@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (4, 4), (7, 3)])
def test_every_target_is_met_exactly(grid):
    rng, size = np.random.default_rng(0), grid[0] * grid[1]
    for target in range(size + 1):
        mask = block_mask(target, grid, rng)
        assert mask.shape == (size,) and mask.dtype == bool and mask.sum() == target


def test_shares_become_counts():
    masks = block_masks(np.array([0.0, 0.1, 0.499, 0.001]), (16, 16), np.random.default_rng(1))
    assert masks.sum(axis=1).tolist() == [0, 25, 127, 1]


def test_masks_are_blocks_not_scattered_patches():
    """A hidden patch has a hidden neighbour far more often than if as many were drawn at random."""

    def neighbours(masks):
        m = masks.reshape(-1, 16, 16)
        return (m[:, :, 1:] & m[:, :, :-1]).sum() + (m[:, 1:] & m[:, :-1]).sum()

    rng = np.random.default_rng(2)
    blocks = np.stack([block_mask(64, (16, 16), rng) for _ in range(200)])
    scattered = np.stack([rng.permutation(np.arange(256) < 64) for _ in range(200)])
    assert neighbours(blocks) > 2.2 * neighbours(scattered)
    assert blocks.any(axis=0).all()  # corners have their turn too, if less often than the centre


def test_a_first_block_is_a_rectangle_of_the_wanted_shape():
    sizes = set()
    for seed in range(300):
        mask = block_mask(9, (16, 16), np.random.default_rng(seed)).reshape(16, 16)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        if h * w == 9:  # one rectangle alone
            sizes.add((int(h), int(w)))
    assert sizes == {(3, 3)}  # 1 x 9 and 9 x 1 are too long


def test_half_of_a_step_is_masked_with_one_ratio_per_stratum():
    masking = Masking((16, 16), MaskConfig(weight=1), batch=16, seed=4)
    for step in (0, 7):
        masks = np.concatenate(
            [masking.masks(n, 2, np.random.default_rng(n)) for n in range(step * 16, step * 16 + 16)]
        )
        counts = np.sort(masks.sum(axis=1))
        assert (counts[:16] == 0).all() and (counts[16:] > 0).all()
        edges = 256 * (0.1 + 0.4 * np.arange(17) / 16)
        assert ((counts[16:] >= np.floor(edges[:-1])) & (counts[16:] <= edges[1:])).all()
    whole = Masking((4, 4), MaskConfig(weight=1, probability=1.0, ratio=(0.5, 0.5)), batch=4, seed=4)
    assert whole.masks(2, 2, np.random.default_rng(0)).sum(axis=1).tolist() == [8, 8]


def test_a_small_share_of_a_small_step_still_masks_one_view():
    masking = Masking((4, 4), MaskConfig(weight=1, probability=0.05), batch=2, seed=0)
    masks = np.concatenate([masking.masks(n, 2, np.random.default_rng(n)) for n in (0, 1)])
    assert masks.any(axis=1).sum() == 1


def test_samples_with_different_numbers_of_views_are_masked_in_the_wanted_share_on_average():
    masking = Masking((4, 4), MaskConfig(weight=1), batch=8, seed=0)
    masks = np.concatenate([masking.masks(n, 2 + n % 2, np.random.default_rng(n)) for n in range(800)])
    assert 0.46 < masks.any(axis=1).mean() < 0.54


def test_masks_are_a_function_of_seed_and_sample():
    def draw(n, seed=4):
        masking = Masking((8, 8), MaskConfig(weight=1), batch=8, seed=seed)
        return masking.masks(n, 2, np.random.default_rng([1, n]))

    everything = [draw(n) for n in range(32)]
    assert all((draw(n) == everything[n]).all() for n in (17, 3, 31))  # in any order, by any process
    assert any((draw(n, seed=5) != everything[n]).any() for n in range(8))
    masked = np.array([mask.any(axis=1) for mask in everything]).reshape(4, 16)
    assert (masked.sum(axis=1) == 8).all() and len({tuple(row) for row in masked}) == 4  # other views at every step


def test_wrong_ratios_and_sizes_are_refused():
    for wrong in (
        {"ratio": (0.5, 0.1)},
        {"ratio": (0.0, 0.1)},
        {"head": "shared", "prototypes": 8},
        {"probability": 0},
    ):
        with pytest.raises(ValueError):
            MaskConfig(**wrong)
