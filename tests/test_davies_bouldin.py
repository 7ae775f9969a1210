"""The Davies-Bouldin index against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import davies_bouldin_score

from mad.metrics.davies_bouldin import davies_bouldin


@pytest.mark.parametrize(("seed", "offset"), [(0, 0.0), (1, 0.0), (2, 1e4)])
def test_equals_scikit_learn(seed: int, offset: float) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, 257)
    features = (generator.normal(size=(257, 7)) + 2 * labels[:, None] + offset).astype(np.float32)
    expected = davies_bouldin_score(features.astype(np.float64), labels)
    assert davies_bouldin(features, labels, chunk=50) == pytest.approx(expected, rel=1e-9)


def test_any_integers_may_be_labels() -> None:
    features = np.random.default_rng(0).normal(size=(60, 3))
    labels = np.arange(60) % 3
    assert davies_bouldin(features, labels * 10 - 7) == pytest.approx(davies_bouldin(features, labels))


def test_one_cluster_has_no_index() -> None:
    assert np.isnan(davies_bouldin(np.ones((5, 2)), np.zeros(5, int)))


def test_classes_of_one_row_and_collapsed_embeddings() -> None:
    features = np.random.default_rng(1).normal(size=(9, 3))
    labels = np.array([0, 1, 1, 1, 2, 2, 2, 2, 2])
    assert davies_bouldin(features, labels, chunk=2) == pytest.approx(davies_bouldin_score(features, labels))
    assert davies_bouldin(np.ones((9, 3)), labels) == davies_bouldin_score(np.ones((9, 3)), labels) == 0


def test_a_row_that_is_not_finite_is_named() -> None:
    features = np.ones((9, 3), np.float32)
    features[4, 1] = np.nan
    with pytest.raises(ValueError, match="row 4 holds NaN"):
        davies_bouldin(features, np.arange(9) % 2, chunk=2)


def test_points_on_their_centroids() -> None:
    features = np.repeat(np.eye(3), 4, axis=0)
    labels = np.repeat(np.arange(3), 4)
    assert davies_bouldin(features, labels) == davies_bouldin_score(features, labels) == 0
