"""Generators for a whole batch are numpy's own, bit for bit."""

import numpy as np
import pytest

from mad.training.seeds import BLOCK, generators

NUMBERS = [0, 1, 7, 1000, 2**16, 2**31, 2**32 - 2, 2**32 - 1, *np.random.default_rng(0).integers(0, 2**32, 50).tolist()]


@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**32 - 1, 2**32, 2**40 + 1])
@pytest.mark.parametrize("numbers", [NUMBERS, NUMBERS[:1], [2**32, *NUMBERS], range(BLOCK - 3, 2 * BLOCK + 3)])
def test_states_are_those_of_default_rng(seed, numbers):
    for n, rng in zip(numbers, generators(seed, 2, numbers), strict=True):
        assert rng.bit_generator.state == np.random.default_rng([seed, 2, n]).bit_generator.state
