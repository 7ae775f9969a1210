"""K-Means protocol of Table 3: AMI against scikit-learn's, DBI of clusters, counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_results import fake_config, fake_results
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, davies_bouldin_score

from mad.config.evaluation import EvaluationConfig
from mad.evaluation import clustering
from mad.evaluation.clustering import cluster_scores, evaluate_clustering
from mad.evaluation.data import Embedded, NotApplicableError
from mad.metrics.kmeans import kmeans
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


def test_every_part_has_ami_dbi_and_the_interval_of_ami_alone(data: Embedded) -> None:
    report = evaluate_clustering(data, CONFIG.model_copy(update={"min_patients": 2, "bootstrap_resamples": 40}), seed=0)
    for part in (report["global"], report["unit"], *report["by_magnification"].values()):
        assert set(part["bootstrap"]["intervals"]) == {"ami"} and part["dbi"]["mean"] > 0
        low, high = part["bootstrap"]["intervals"]["ami"]
        assert low <= high
    few = evaluate_clustering(data, CONFIG, seed=0)["global"]["bootstrap"]
    assert few["intervals"] is None and few["reason"] == "2 test patient(s), an interval needs 5"


def test_ami_of_resampled_patients_equals_scikit_learn_on_repeated_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 3, 300)
    features = (generator.normal(size=(300, 4)) + 2 * np.eye(4)[codes]).astype(np.float32)
    patients = np.array([f"P{n}" for n in generator.integers(0, 4, 300)])
    weights = np.array([2, 0, 1, 1])
    kept = {}

    def spy(statistic, num_patients, **_):
        kept["ami"] = float(statistic(weights[None].astype(float))["ami"][0])
        return {}

    monkeypatch.setattr(clustering, "patient_intervals", spy)
    cluster_scores(features, codes, 3, patients, CONFIG, seeds=[0, 1], resample_seed=0)
    rows = np.concatenate([np.flatnonzero(patients == f"P{n}") for n, w in enumerate(weights) for _ in range(w)])
    runs = [kmeans(features, 3, starts=CONFIG.kmeans_starts, seed=seed).labels[rows] for seed in (0, 1)]
    assert kept["ami"] == pytest.approx(np.mean([adjusted_mutual_info_score(codes[rows], run) for run in runs]))


def test_constant_embeddings_agree_with_nothing(data: Embedded) -> None:
    report = evaluate_clustering(replace(data, features=np.ones_like(data.features)), CONFIG, seed=0)
    assert report["global"]["ami"]["mean"] == pytest.approx(0, abs=1e-6)
    assert report["global"]["inertia"]["mean"] == 0 and report["dbi_classes"] == 0


def test_class_that_the_test_lacks_and_one_slide(data: Embedded) -> None:
    gone = data.tiles.assign(code=np.where(data.codes == 1, -1, data.codes))
    report = evaluate_clustering(replace(data, tiles=gone), CONFIG, seed=0)
    assert report["k"] == 5 and report["counts"]["test"][data.classes[1]] == 0
    one = data.tiles["split"].where((data.tiles["split"] != "test") | (data.tiles["slide_id"] == "S07"), "none")
    assert (
        evaluate_clustering(replace(data, tiles=data.tiles.assign(split=one)), CONFIG, seed=0)["patients"]["test"] == 1
    )
