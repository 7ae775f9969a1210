"""K-Means against scikit-learn with as many starts."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from mad.metrics.kmeans import kmeans


def blobs(seed: int, num_rows: int = 600, dim: int = 10, spread: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 5, num_rows)
    centres = spread * generator.normal(size=(5, dim))
    return (centres[labels] + generator.normal(size=(num_rows, dim))).astype(np.float32), labels


@pytest.mark.parametrize(("seed", "spread"), [(0, 2.5), (1, 0.7), (2, 0.0)])
def test_inertia_is_as_low_as_that_of_scikit_learn(seed: int, spread: float) -> None:
    features, _ = blobs(seed, spread=spread)
    theirs = KMeans(5, n_init=20, random_state=0).fit(features)
    ours = kmeans(features, 5, starts=20, chunk=128)
    assert ours.inertia <= theirs.inertia_ * 1.005
    assert ours.inertia == pytest.approx(((features - ours.centres[ours.labels]) ** 2).sum(), rel=1e-6)
    assert ours.inertias.min() == pytest.approx(ours.inertia, rel=1e-5) and len(ours.inertias) == 20


def test_finds_separated_blobs_far_from_the_origin() -> None:
    features, labels = blobs(3, spread=8)
    assert adjusted_rand_score(labels, kmeans(features + 1000, 5, starts=5).labels) == pytest.approx(1)


def test_same_seed_same_clusters_and_order_of_chunks_does_not_matter() -> None:
    features, _ = blobs(4)
    first, again = (kmeans(features, 5, starts=3, seed=1, chunk=chunk) for chunk in (100, 10_000))
    assert adjusted_rand_score(first.labels, again.labels) == pytest.approx(1)
    assert (kmeans(features, 5, starts=3, seed=1).labels == again.labels).all()


def test_fewer_distinct_points_than_clusters() -> None:
    found = kmeans(np.repeat(np.eye(2, dtype=np.float32), 10, axis=0), 4, starts=2)
    assert found.inertia == pytest.approx(0, abs=1e-6)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows"):
        kmeans(np.ones((3, 2), np.float32), 5)
