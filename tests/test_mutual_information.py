"""AMI of contingency tables against scikit-learn's, which works on labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score

from mad.metrics.mutual_information import adjusted_mutual_information


def table(truth: np.ndarray, clusters: np.ndarray, shape: tuple[int, int] = (5, 6)) -> np.ndarray:
    found = np.zeros(shape, np.int64)
    np.add.at(found, (truth, clusters), 1)
    return found


@given(st.integers(0, 10_000), st.integers(1, 400), st.integers(1, 5), st.integers(1, 6))
def test_equals_scikit_learn(seed: int, tiles: int, classes: int, clusters: int) -> None:
    generator = np.random.default_rng(seed)
    truth, found = generator.integers(0, classes, tiles), generator.integers(0, clusters, tiles)
    found = np.where(generator.random(tiles) < generator.random(), truth, found)
    expected = adjusted_mutual_info_score(truth, found)
    singles = len(set(truth)) == len(set(found)) == tiles  # 0 / 0, which scikit-learn rounds either way
    assert adjusted_mutual_information(table(truth, found)[None])[0] == (
        1.0 if singles else pytest.approx(expected, abs=1e-9)
    )


def test_many_tables_at_once_and_large_ones() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 5, (3, 200_000))
    found = np.where(generator.random(truth.shape) < 0.4, truth, generator.integers(0, 6, truth.shape))
    tables = np.stack([table(a, b) for a, b in zip(truth, found, strict=True)])
    expected = [adjusted_mutual_info_score(a, b) for a, b in zip(truth, found, strict=True)]
    assert adjusted_mutual_information(tables) == pytest.approx(expected, rel=1e-9)
    assert adjusted_mutual_information(np.concatenate([tables[:1]] * 250))[-1] == pytest.approx(expected[0], rel=1e-9)


def test_limits() -> None:
    identical, one = np.diag([5, 3, 2]), np.array([[7, 0], [0, 0]])
    split = np.array([[4, 3], [0, 0]])  # one class in two clusters
    empty = np.zeros((2, 2), int)
    found = [adjusted_mutual_information(part[None])[0] for part in (identical, one, split, empty)]
    assert found[:2] == pytest.approx([1, 1]) and found[2] == pytest.approx(0, abs=1e-9) and np.isnan(found[3])
