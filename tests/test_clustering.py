"""K-Means protocol of Table 3: AMI against scikit-learn's, DBI of clusters, counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_results import fake_config, fake_results
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, davies_bouldin_score

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.clustering import evaluate_clustering
from mad.evaluation.data import Embedded, NotApplicableError
from mad.stages.evaluate import load

CONFIG = EvaluationConfig(runs=2, kmeans_starts=10)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    folder = tmp_path_factory.mktemp("results")
    fake_results(folder, {"mad": 0.3}, columns=2, noise=2)
    return load(fake_config(folder, ["mad"]), "mad")


def test_equals_scikit_learn_on_the_test_tiles(data: Embedded) -> None:
    report = evaluate_clustering(data, CONFIG, seed=0)
    rows = data.rows("test")
    assert sum(report["counts"]["test"].values()) == len(rows)
    theirs = KMeans(5, n_init=20, random_state=0).fit(data.features[rows])
    assert report["global"]["inertia"]["mean"] == pytest.approx(theirs.inertia_, rel=2e-3)
    expected = adjusted_mutual_info_score(data.codes[rows], theirs.labels_, average_method="arithmetic")
    assert report["global"]["ami"]["mean"] == pytest.approx(expected, abs=0.03)
    assert report["global"]["dbi"]["mean"] == pytest.approx(
        davies_bouldin_score(data.features[rows], theirs.labels_), abs=0.05
    )
    assert report["dbi_classes"] == pytest.approx(davies_bouldin_score(data.features[rows], data.codes[rows]), rel=1e-4)
    assert len(report["global"]["ami"]["values"]) == 2


def test_magnifications_apart_hold_no_gap(data: Embedded) -> None:
    report = evaluate_clustering(data, CONFIG, seed=0)
    assert set(report["by_magnification"]) == {"10x", "40x"}  # two 2.5x tiles per slide are fewer than five clusters


def test_length_of_embeddings_only_matters_without_normalisation(data: Embedded) -> None:
    scale = np.where(np.arange(len(data.features)) % 2, 1, 30)[:, None].astype(np.float32)
    plain, scaled = (
        evaluate_clustering(d, CONFIG, seed=0) for d in (data, replace(data, features=data.features * scale))
    )
    assert scaled["unit"]["ami"]["mean"] == pytest.approx(plain["unit"]["ami"]["mean"], abs=0.02)
    assert scaled["global"]["ami"]["mean"] < plain["global"]["ami"]["mean"] - 0.1


def test_no_labels_is_not_applicable(data: Embedded) -> None:
    with pytest.raises(NotApplicableError, match="0 labelled test tiles"):
        evaluate_clustering(replace(data, tiles=data.tiles.assign(code=-1)), CONFIG, seed=0)
