"""K-Means against scikit-learn with as many starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from mad.metrics.kmeans import _compare, _move, kmeans
from mad.metrics.kmeans_screen import Screen, Start
from mad.metrics.rows import CentredRows


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


@pytest.mark.parametrize("step", [0.0, 0.02, 0.3])
def test_rows_that_the_screen_is_sure_of_are_right(step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mad.metrics.kmeans_screen.AXES", 3)
    features, _ = blobs(8, num_rows=2000, dim=40, spread=0.7)
    data, generator = CentredRows(features, "cpu", 300), torch.Generator().manual_seed(0)
    screen, start = Screen(data), Start(torch.randn(5, 40, generator=generator, dtype=torch.float64))
    assert len(screen.compare(start)[1]) == 2000
    _compare(data, [start], screen)
    start.centres = start.centres + step * torch.randn(5, 40, generator=generator, dtype=torch.float64)
    labels, doubtful = screen.compare(start)
    nearest = torch.cdist(torch.from_numpy(features).double() - data.mean, start.centres).argmin(1)
    sure = torch.ones(2000, dtype=torch.bool)
    sure[doubtful] = False
    assert (labels[sure] == nearest[sure]).all()
    assert {0.0: sure.all(), 0.02: 0.5 < sure.double().mean() < 1, 0.3: sure.double().mean() < 0.5}[step]


@pytest.mark.parametrize("spread", [0.7, 0.1])
def test_the_screen_leads_where_comparing_every_row_leads(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few axes, so that much is left to the bound; then as if the screen were never good enough."""
    features, _ = blobs(5, num_rows=3000, dim=40, spread=spread)
    monkeypatch.setattr("mad.metrics.kmeans_screen.AXES", 3)
    screened = kmeans(features, 5, starts=4, tolerance=0, chunk=500)
    monkeypatch.setattr("mad.metrics.kmeans.STALE", -1.0)
    whole = kmeans(features, 5, starts=4, tolerance=0, chunk=500)
    assert adjusted_rand_score(screened.labels, whole.labels) > 0.999  # a row between two centres may fall either way
    assert screened.inertias == pytest.approx(whole.inertias, rel=1e-5)


def test_from_its_result_scikit_learn_goes_nowhere() -> None:
    features, _ = blobs(6, num_rows=2000, dim=20, spread=0.5)
    ours = kmeans(features, 5, starts=3, tolerance=0)
    theirs = KMeans(5, init=ours.centres.astype(np.float32), n_init=1, tol=0).fit(features)
    assert theirs.n_iter_ <= 2 and (theirs.labels_ == ours.labels).mean() > 0.999
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-6)


def test_an_emptied_cluster_restarts_at_the_farthest_row() -> None:
    rows = np.array([[0.0], [0.1], [10.0], [10.1], [30.0]])
    start = Start(torch.tensor([[0.0], [10.0], [-50.0]], dtype=torch.float64) - rows.mean())
    data = CentredRows(rows, "cpu", 2)
    _compare(data, [start])
    assert start.labels.tolist() == [0, 0, 1, 1, 1]
    _move(data, start)
    assert float(start.centres[2]) == pytest.approx(30 - rows.mean(), abs=1e-5)


def test_collapsed_embeddings_have_no_inertia() -> None:
    found = kmeans(np.full((50, 3), 7, np.float32), 4, starts=3)
    assert found.inertia == 0 and (found.centres[found.labels] == 7).all()


def test_a_row_that_is_not_finite_is_named() -> None:
    features, _ = blobs(7)
    features[301, 4] = np.nan
    with pytest.raises(ValueError, match="row 301 holds NaN"):
        kmeans(features, 5, chunk=100)


def test_fewer_distinct_points_than_clusters() -> None:
    found = kmeans(np.repeat(np.eye(2, dtype=np.float32), 10, axis=0), 4, starts=2)
    assert found.inertia == pytest.approx(0, abs=1e-6)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows"):
        kmeans(np.ones((3, 2), np.float32), 5)


@pytest.mark.parametrize(("apart", "within", "k"), [(3000, 1, 6), (1, 1e-4, 5)])
def test_inertias_are_no_differences_of_large_numbers(apart: float, within: float, k: int) -> None:
    """Two tight groups far apart: nearly all variance is between them."""
    generator = np.random.default_rng(0)
    rows = (within * generator.normal(size=(400, 8)) + apart * np.repeat([[-1], [1]], 200, 0)).astype(np.float32)
    found = kmeans(rows, k)
    moved = rows.astype(np.float64) - found.centres[found.labels]
    assert found.inertias.min() == pytest.approx((moved**2).sum(), rel=1e-2)
    assert found.inertia == pytest.approx(found.inertias.min(), rel=1e-9)


def test_rows_beyond_float32_are_named() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 4))
    rows[7, 2] = 1e20
    with pytest.raises(ValueError, match="row 7 holds numbers of 1e"):
        kmeans(rows, 3)
