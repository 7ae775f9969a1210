"""Principal components against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from mad.metrics.pca import fit_pca


def test_equals_scikit_learn_up_to_sign() -> None:
    generator = np.random.default_rng(0)
    features = (generator.normal(size=(300, 12)) * np.linspace(5, 1, 12) + 100).astype(np.float32)
    ours, theirs = fit_pca(features, 3, chunk=64), PCA(3, svd_solver="full").fit(features.astype(np.float64))
    sign = np.sign((ours.components * theirs.components_).sum(1))
    assert ours.components * sign[:, None] == pytest.approx(theirs.components_, abs=1e-8)
    assert ours.explained == pytest.approx(theirs.explained_variance_ratio_)
    assert ours.project(features, chunk=50) * sign == pytest.approx(
        theirs.transform(features.astype(np.float64)), abs=1e-6
    )


def test_sign_is_fixed() -> None:
    features = np.random.default_rng(1).normal(size=(50, 4))
    components = fit_pca(features, 2).components
    assert (np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1) > 0).all()


def test_constant_rows_have_no_variance_and_one_row_is_refused() -> None:
    assert fit_pca(np.ones((4, 3)), 2).explained.tolist() == [0, 0]
    with pytest.raises(ValueError, match="two rows"):
        fit_pca(np.ones((1, 3)), 2)


def test_a_row_that_is_not_finite_is_named() -> None:
    features = np.ones((9, 3), np.float32)
    features[6, 1] = np.nan
    with pytest.raises(ValueError, match="row 6 holds NaN"):
        fit_pca(features, chunk=4)


def test_memory_mapped_embeddings_are_read_as_others(tmp_path) -> None:
    features = np.random.default_rng(2).normal(size=(50, 4)).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert (fit_pca(mapped, chunk=7).components == fit_pca(features, chunk=7).components).all()


def test_fewer_dimensions_than_components() -> None:
    assert fit_pca(np.random.default_rng(0).normal(size=(9, 1)), 2).components.shape == (1, 1)
