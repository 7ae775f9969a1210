"""Unlabelled alignment of two magnifications, and the matrix of all magnifications."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_results import fake_config, fake_results
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.preprocessing import StandardScaler

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.data import Embedded
from mad.evaluation.scales import chance_iou, coral, crosses_scales, match_moments, scale_matrix
from mad.metrics.moments import moments
from mad.stages.evaluate import load


def two_sets(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(5, 5))
    return generator.normal(size=(900, 5)) @ mix + 3, generator.normal(size=(700, 5)) * np.arange(1, 6) - 2


def test_moments_equal_numpy() -> None:
    features, _ = two_sets()
    found = moments(features, chunk=100)
    assert found.mean == pytest.approx(features.mean(0))
    assert found.covariance == pytest.approx(np.cov(features.T, bias=True))


def test_matching_gives_mean_and_deviation_of_the_target() -> None:
    source, target = two_sets()
    mapped = match_moments(moments(source), moments(target))(source, chunk=64)
    assert mapped.mean(0) == pytest.approx(target.mean(0), abs=1e-4)
    assert mapped.std(0) == pytest.approx(target.std(0), rel=1e-4)


def test_coral_gives_the_covariance_of_the_target() -> None:
    source, target = two_sets()
    mapped = coral(moments(source), moments(target), ridge=1e-9)(source)
    assert mapped.mean(0) == pytest.approx(target.mean(0), abs=1e-4)
    assert np.cov(mapped.T, bias=True) == pytest.approx(np.cov(target.T, bias=True), abs=2e-3)


@pytest.mark.parametrize("scale", [100, 1, 0.1, 0.01])
def test_coral_does_not_depend_on_the_scale_of_the_source(scale: float) -> None:
    source, target = two_sets()
    plain = coral(moments(source), moments(target))(source)
    scaled = (scale * source).astype(np.float32)
    assert coral(moments(scaled), moments(target))(scaled) == pytest.approx(plain, abs=2e-3)


@pytest.mark.parametrize("align", [match_moments, coral])
def test_a_set_is_mapped_onto_itself(align) -> None:
    features, _ = two_sets()
    assert align(moments(features), moments(features))(features) == pytest.approx(features, abs=1e-4)


def test_constant_dimensions_stay_finite() -> None:
    source, target = two_sets()
    source[:, 1] = 4
    for align in (match_moments, coral):
        assert np.isfinite(align(moments(source), moments(target))(source)).all()


def test_chance_by_hand() -> None:
    assert chance_iou(np.array([3, 3, 3, 7])) == pytest.approx(((1.5 / (3 + 2 - 1.5)) + (0.5 / (1 + 2 - 0.5))) / 2)
    assert chance_iou(np.array([2, 2])) == 1 and chance_iou(np.array([], np.int64)) is None


def test_scales_are_crossed_by_training_at_one_and_testing_at_another(tmp_path) -> None:
    fake_results(tmp_path, {"mad": 0.5}, columns=2, patients=5)
    data = load(fake_config(tmp_path, ["mad"]), "mad")

    def labelled(**magnifications: float) -> Embedded:
        only = data.tiles["split"].map(magnifications) == data.tiles["magnification"]
        return replace(data, tiles=data.tiles.assign(code=np.where(only, data.codes, -1)))

    assert crosses_scales(data) and crosses_scales(labelled(train=2.5, test=40))
    assert not any(
        map(crosses_scales, (labelled(train=10, test=10), labelled(train=10), labelled(test=10), labelled()))
    )


def test_matrix_equals_scikit_learn_and_is_null_where_nothing_is(tmp_path) -> None:
    fake_results(tmp_path, {"mad": 0.5}, columns=2, noise=3)
    data = load(fake_config(tmp_path, ["mad"]), "mad")
    config = EvaluationConfig(sound_strengths=[1e-2])
    found = scale_matrix(data, config.model_copy(update={"min_patients": 2, "bootstrap_resamples": 40}))
    matrix = found["matrix"]
    for tested in ("2.5x", "10x", "40x"):
        for trained, (low, high) in found["matrix_bootstrap"][tested]["intervals"].items():
            assert low <= matrix[trained][tested] <= high
    assert scale_matrix(data, config)["matrix_bootstrap"]["40x"]["reason"] == "2 test patient(s), an interval needs 5"
    train, test = data.rows("train", 10), data.rows("test", 40)
    guess = np.random.default_rng(0).choice(np.unique(data.codes[test]), (400, len(test)))
    truth = np.tile(data.codes[test], 400)
    by_luck = jaccard_score(truth, guess.ravel(), labels=np.unique(truth), average="macro")
    assert found["matrix_chance"]["40x"] == pytest.approx(by_luck, abs=0.01) and set(found["matrix_chance"]) == set(
        matrix
    )
    scaler = StandardScaler().fit(data.features[train])
    model = LogisticRegression(C=100 / len(train), max_iter=2000).fit(
        scaler.transform(data.features[train]), data.codes[train]
    )
    predicted = model.predict(scaler.transform(data.features[test]))
    expected = jaccard_score(data.codes[test], predicted, labels=np.unique(data.codes[test]), average="macro")
    assert matrix["10x"]["40x"] == pytest.approx(expected, abs=0.01)
    fine = (data.tiles["magnification"] == 40) & (data.tiles["split"] == "train")
    without = scale_matrix(replace(data, tiles=data.tiles.assign(code=np.where(fine, -1, data.codes))), config)[
        "matrix"
    ]
    assert set(without["40x"].values()) == {None} and without["10x"]["40x"] == matrix["10x"]["40x"]
