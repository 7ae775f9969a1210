"""RankMe against its formula and its limits."""

import numpy as np
import pytest

from mad.metrics.rankme import rankme


def test_equals_the_formula_from_the_eigenvalues_of_the_gram_matrix():
    z = np.random.default_rng(0).normal(size=(50, 7)) @ np.diag([9.0, 5, 3, 1, 0.5, 0.1, 0.01])
    sigma = np.sqrt(np.linalg.eigvalsh(z.T @ z))
    p = [value / sum(sigma) + 1e-7 for value in sigma]
    assert rankme(z) == pytest.approx(np.exp(-sum(value * np.log(value) for value in p)), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_orthogonal_directions_of_equal_length_count_one_each(rank):
    z = np.zeros((40, 8))
    z[np.arange(40), np.arange(40) % rank] = 2.0
    expected = {1: 1, 3: 3, 8: 8}[rank]
    assert rankme(z[: 40 // rank * rank]) == pytest.approx(expected, rel=1e-4)


def test_does_not_depend_on_the_scale_and_takes_float32():
    z = np.random.default_rng(1).normal(size=(30, 5)).astype(np.float32)
    assert rankme(z * 1000) == pytest.approx(rankme(z), rel=1e-5)


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((0, 3)), np.full((2, 2), np.nan)])
def test_refuses_what_has_no_rank(bad):
    with pytest.raises(ValueError, match="rankme|row 0 holds NaN"):
        rankme(bad)
