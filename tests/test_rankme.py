"""RankMe against its formula and its limits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mad.metrics.rankme import rankme


def by_svd(z: np.ndarray) -> float:
    sigma = np.linalg.svd(z.astype(np.float64), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


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


@given(st.integers(1, 90), st.integers(1, 60), st.integers(1, 60), st.floats(0, 12), st.booleans(), st.integers(0, 999))
def test_equals_that_of_the_singular_values(rows, dim, rank, decades, single, seed):
    """Tall and wide, well and badly conditioned, of full and of lower rank, with and without a large mean."""
    generator = np.random.default_rng(seed)
    rank = min(rank, rows, dim)
    left = np.linalg.qr(generator.normal(size=(rows, rank)))[0]
    right = np.linalg.qr(generator.normal(size=(dim, rank)))[0]
    z = left * np.logspace(0, -decades, rank) @ right.T
    z = (z + (seed % 3) * 10).astype(np.float32 if single else np.float64)
    assert rankme(z) == pytest.approx(by_svd(z), rel=1e-7)


@pytest.mark.parametrize("rank", [1, 2, 768])
def test_directions_that_are_not_there_count_nothing(rank):
    """The eigenvalues of a Gram matrix alone were off by 2e-5: a rounded 0 of 1e-16 is a singular value of 1e-8."""
    generator = np.random.default_rng(0)
    z = generator.normal(size=(1200, rank)) @ generator.normal(size=(rank, 768))
    assert rankme(z) == pytest.approx(by_svd(z), rel=1e-9)


@pytest.mark.parametrize("bad", [np.zeros(3), np.zeros((0, 3)), np.full((2, 2), np.nan)])
def test_refuses_what_has_no_rank(bad):
    with pytest.raises(ValueError, match="rankme|row 0 holds NaN"):
        rankme(bad)
