"""Linear decodability of magnification against scikit-learn, and at its limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_results import fake_config, fake_results
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.data import Embedded, NotApplicableError
from mad.evaluation.magnification import evaluate_magnification
from mad.metrics.rankme import rankme
from mad.stages.evaluate import load

CONFIG = EvaluationConfig(sound_strengths=[1e-2], bootstrap_resamples=50, min_patients=2)


def make(folder: Path, shift: float, **options) -> Embedded:
    fake_results(folder, {"mad": shift}, **({"columns": 3, "noise": 2} | options))
    return load(fake_config(folder, ["mad"]), "mad")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    return make(tmp_path_factory.mktemp("results"), 0.3)


def test_equals_scikit_learn_on_the_same_draw(data: Embedded) -> None:
    report = evaluate_magnification(data, CONFIG, seed=4)
    train = {m: data.rows("train", m, labelled=False) for m in (2.5, 10, 40)}
    fewest = min(map(len, train.values()))
    assert report["counts"]["train"] == {"2.5x": fewest, "10x": fewest, "40x": fewest}
    generator = np.random.default_rng(4)
    rows = np.concatenate([np.sort(generator.choice(part, fewest, replace=False)) for part in train.values()])
    test = data.rows("test", labelled=False)
    magnification = data.tiles["magnification"].to_numpy(float)
    scaler = StandardScaler().fit(data.features[rows])
    model = LogisticRegression(C=100 / len(rows), max_iter=3000).fit(
        scaler.transform(data.features[rows]), magnification[rows].astype(str)
    )
    truth, guess = magnification[test].astype(str), model.predict(scaler.transform(data.features[test]))
    found = report["decodability"]
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, guess), abs=0.01)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess), abs=0.01)
    assert (
        found["chance"] == pytest.approx(1 / 3)
        and sum(map(sum, found["confusion"])) == len(test) == report["n"]["tiles"]
    )
    low, high = report["bootstrap"]["intervals"]["balanced_accuracy"]
    assert low <= found["balanced_accuracy"] <= high
    for m in (2.5, 10, 40):
        mine = data.rows("test", m, labelled=False)
        assert report["rankme"][f"{m:g}x"] == pytest.approx(rankme(data.features[mine]))


def test_an_offset_of_the_magnifications_is_read_and_none_is_not(data: Embedded, tmp_path: Path) -> None:
    apart = make(tmp_path, 3.0)
    assert evaluate_magnification(apart, CONFIG, seed=0)["decodability"]["balanced_accuracy"] > 0.99
    generator = np.random.default_rng(0)
    blind = replace(data, features=generator.normal(size=data.features.shape).astype(np.float32))
    assert evaluate_magnification(blind, CONFIG, seed=0)["decodability"]["balanced_accuracy"] == pytest.approx(
        1 / 3, abs=0.12
    )


def test_constant_embeddings_are_at_chance(data: Embedded) -> None:
    report = evaluate_magnification(replace(data, features=np.ones_like(data.features)), CONFIG, seed=0)
    assert report["decodability"]["balanced_accuracy"] == pytest.approx(1 / 3)
    assert report["rankme"]["40x"] == pytest.approx(1, abs=1e-3)


def test_labels_are_not_asked_for_and_one_magnification_is_not_enough(data: Embedded) -> None:
    bare = replace(data, tiles=data.tiles.assign(code=-1, label=None))
    assert evaluate_magnification(bare, CONFIG, seed=0) == evaluate_magnification(data, CONFIG, seed=0)
    kept = (data.tiles["magnification"] == 40).to_numpy()
    alone = replace(data, tiles=data.tiles[kept].reset_index(drop=True), features=data.features[kept])
    with pytest.raises(NotApplicableError, match="1 magnification"):
        evaluate_magnification(alone, CONFIG, seed=0)


def test_few_patients_give_no_interval(data: Embedded) -> None:
    boot = evaluate_magnification(data, EvaluationConfig(sound_strengths=[1e-2]), seed=0)["bootstrap"]
    assert boot["intervals"] is None and boot["reason"] == "2 test patient(s), an interval needs 5"
