"""Metrics on every device that is there, against scikit-learn and NumPy; and that the protocols hand their device on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fake_results import fake_config, fake_results
from sklearn.decomposition import PCA
from sklearn.metrics import davies_bouldin_score

from mad.config.evaluation import EvaluationConfig
from mad.evaluation import clustering, projection, transfer
from mad.metrics.davies_bouldin import davies_bouldin
from mad.metrics.moments import moments
from mad.metrics.pca import fit_pca
from mad.stages import evaluate

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")),
]


def embeddings(dtype: str = "float32") -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.normal(size=(900, 12)) * np.linspace(5, 1, 12) + 100).astype(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_metrics_equal_their_references(device: str, dtype: str, tmp_path) -> None:
    features, labels = embeddings(dtype), np.arange(900) % 4
    np.save(tmp_path / "features.npy", features)
    mapped, wide = np.load(tmp_path / "features.npy", mmap_mode="r"), features.astype(np.float64)
    assert davies_bouldin(mapped, labels, device=device) == pytest.approx(davies_bouldin_score(wide, labels), rel=1e-9)
    found = moments(mapped, chunk=100, device=device)
    assert found.mean == pytest.approx(wide.mean(0)) and found.covariance == pytest.approx(np.cov(wide.T, bias=True))
    ours, theirs = fit_pca(mapped, 3, chunk=64, device=device), PCA(3, svd_solver="full").fit(wide)
    assert np.abs((ours.components * theirs.components_).sum(1)) == pytest.approx(np.ones(3))
    assert ours.explained == pytest.approx(theirs.explained_variance_ratio_)
    assert (features == embeddings(dtype)).all(), "what is centred is a copy"


def test_protocols_hand_their_device_on(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, set[str]] = {}

    def watch(module: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def call(*given: Any, device: str = "none given", **options: Any) -> Any:
            told.setdefault(name, set()).add(device)
            return real(*given, device=device, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in ((clustering, "davies_bouldin"), (transfer, "moments"), (projection, "fit_pca")):
        watch(module, name)
    monkeypatch.setattr(evaluate, "choose_device", lambda wanted: "cpu:0")  # the CPU by a name that is no default
    fake_results(tmp_path, {"mad": 0.3}, columns=2, noise=2)
    quick = EvaluationConfig(runs=2, probe_steps=10, kmeans_starts=2, sound_strengths=[1e-2], bootstrap_resamples=20)
    evaluate.run(fake_config(tmp_path, ["mad"], evaluate=quick.model_dump(exclude_unset=True)), "mad")
    assert told == {name: {"cpu:0"} for name in ("davies_bouldin", "moments", "fit_pca")}
