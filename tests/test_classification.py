"""Table 3, upper part: scores against scikit-learn, intervals against repeated patients, adversarial data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_results import fake_config, fake_results
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mad.config.evaluation import EvaluationConfig
from mad.evaluation import classification
from mad.evaluation.by_patient import classification_statistics
from mad.evaluation.classification import evaluate_classification
from mad.evaluation.data import Embedded, NotApplicableError
from mad.stages.evaluate import load

CONFIG = EvaluationConfig(runs=2, probe_steps=100, probe_lr=1e-2, sound_strength=1e-2, bootstrap_resamples=100)
CLASSIFIERS = {"linear": "linear", "knn": "knn", "sound": "sound", "whole_bank": "knn whole_bank"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    folder = tmp_path_factory.mktemp("results")
    fake_results(folder, {"mad": 0.5}, patients=9, columns=3, noise=4, splits={f"S0{n}": "test" for n in range(3, 8)})
    return load(fake_config(folder, ["mad"]), "mad")


@pytest.fixture(scope="module")
def report(data: Embedded) -> dict[str, Any]:
    return evaluate_classification(data, CONFIG, seed=0)


def references(truth: np.ndarray, guess: np.ndarray) -> dict[str, float]:
    names = np.unique(truth)
    return {
        "macro_f1": f1_score(truth, guess, labels=names, average="macro"),
        "accuracy": accuracy_score(truth, guess),
        "balanced_accuracy": np.mean([(guess[truth == name] == name).mean() for name in names]),
    }


def spied(data: Embedded) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The report and the predictions [runs, n] of every classifier behind it."""
    kept: list[np.ndarray] = []
    count = classification.matrices_by_patient

    def spy(patient, num_patients, truth, predicted, num_classes):
        kept.append(predicted)
        return count(patient, num_patients, truth, predicted, num_classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classification, "matrices_by_patient", spy)
        found = evaluate_classification(data, CONFIG, seed=0)
    return found, dict(zip(("linear", "knn", "whole_bank", "sound"), kept, strict=True))


def test_scores_equal_scikit_learn(data: Embedded) -> None:
    found, predicted = spied(data)
    truth = data.codes[data.rows("test")]
    for name, runs in predicted.items():
        part = found["knn"]["whole_bank"] if name == "whole_bank" else found[name]
        for run, guess in enumerate(runs):
            expected = references(truth, guess)
            assert balanced_accuracy_score(truth, guess) == pytest.approx(expected["balanced_accuracy"])
            for key, value in expected.items():
                assert part[key]["values"][run] == pytest.approx(value)
            f1, iou = f1_score(truth, guess, average=None), jaccard_score(truth, guess, average=None)
            for code, label in enumerate(data.classes):
                assert part["f1"][label]["values"][run] == pytest.approx(f1[code])
                assert part["iou"][label]["values"][run] == pytest.approx(iou[code])


def test_classifiers_are_those_of_scikit_learn(data: Embedded) -> None:
    _, predicted = spied(data)
    train, test = data.rows("train"), data.rows("test")
    knn = KNeighborsClassifier(20, metric="cosine").fit(data.features[train], data.codes[train])
    assert (predicted["whole_bank"][0] == knn.predict(data.features[test])).mean() > 0.98  # but for its ties
    scaler = StandardScaler().fit(data.features[train])
    model = LogisticRegression(C=100 / len(train), max_iter=3000).fit(
        scaler.transform(data.features[train]), data.codes[train]
    )
    assert (predicted["sound"][0] == model.predict(scaler.transform(data.features[test]))).mean() > 0.995


def test_intervals_equal_scikit_learn_on_repeated_patients(data: Embedded, report: dict[str, Any]) -> None:
    _, predicted = spied(data)
    rows = data.rows("test")
    names = np.unique(data.patients[rows])
    weights = np.array([2, 0, 1, 1, 1, 1] + [0] * (len(names) - 6))
    drawn = np.concatenate(
        [np.flatnonzero(data.patients[rows] == n) for n, w in zip(names, weights, strict=True) for _ in range(w)]
    )
    found = classification_statistics(report["by_patient"], weights[None].astype(float))
    truth = data.codes[rows][drawn]
    for name, place in CLASSIFIERS.items():
        for key in ("macro_f1", "accuracy", "balanced_accuracy"):
            expected = np.mean([references(truth, guess[drawn])[key] for guess in predicted[name]])
            assert found[f"{place} {key}"][0] == pytest.approx(expected), (place, key)


def test_every_number_has_its_interval(data: Embedded, report: dict[str, Any]) -> None:
    boot = report["bootstrap"]
    assert boot["patients"] == report["patients"]["test"] >= 5 and boot["resamples"] == 100
    for place in CLASSIFIERS.values():
        part = report
        for key in place.split(" "):
            part = part[key]
        names = [(key, part[key]) for key in ("macro_f1", "accuracy", "balanced_accuracy")]
        names += [(f"{key} {label}", part[key][label]) for key in ("f1", "iou") for label in data.classes]
        for key, number in names:
            low, high = boot["intervals"][f"{place} {key}"]
            assert low <= high and low - 0.1 < number["mean"] < high + 0.1
    few = evaluate_classification(data, CONFIG.model_copy(update={"min_patients": 99}), seed=0)["bootstrap"]
    assert few["intervals"] is None and few["reason"].endswith("test patient(s), an interval needs 99")


def test_class_that_the_test_lacks_has_no_score_and_no_weight(data: Embedded) -> None:
    gone = np.where((data.tiles["split"] == "test") & (data.codes == 1), -1, data.codes)
    found = evaluate_classification(replace(data, tiles=data.tiles.assign(code=gone)), CONFIG, seed=0)
    assert found["absent_in_test"] == [data.classes[1]] and found["counts"]["test"][data.classes[1]] == 0
    for kind in ("linear", "knn", "sound"):
        f1 = {label: part["mean"] for label, part in found[kind]["f1"].items()}
        assert f1.pop(data.classes[1]) is None
        assert found[kind]["macro_f1"]["mean"] == pytest.approx(np.mean(list(f1.values())))
        assert found["bootstrap"]["intervals"][f"{kind} f1 {data.classes[1]}"] is None


def test_class_that_the_training_lacks_scores_zero(data: Embedded) -> None:
    gone = np.where((data.tiles["split"] == "train") & (data.codes == 1), -1, data.codes)
    found = evaluate_classification(replace(data, tiles=data.tiles.assign(code=gone)), CONFIG, seed=0)
    assert found["absent_in_train"] == [data.classes[1]]
    assert found["knn"]["f1"][data.classes[1]]["mean"] == found["sound"]["f1"][data.classes[1]]["mean"] == 0


def test_constant_embeddings_predict_one_class(data: Embedded) -> None:
    found = evaluate_classification(replace(data, features=np.ones_like(data.features)), CONFIG, seed=0)
    for kind in ("linear", "sound"):
        assert found[kind]["balanced_accuracy"]["mean"] == pytest.approx(1 / 5)
        assert sum(any(column) for column in zip(*found[kind]["confusion"][0], strict=True)) == 1


def test_one_test_slide_has_scores_and_no_interval(data: Embedded) -> None:
    split = data.tiles["split"].where((data.tiles["split"] != "test") | (data.tiles["slide_id"] == "S03"), "none")
    found = evaluate_classification(replace(data, tiles=data.tiles.assign(split=split)), CONFIG, seed=0)
    assert found["patients"]["test"] == 1 and found["sound"]["macro_f1"]["mean"] > 0.2
    assert found["bootstrap"]["reason"] == "1 test patient(s), an interval needs 5"


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_side_without_labels_is_not_applicable(data: Embedded, side: str) -> None:
    gone = data.tiles.assign(code=np.where(data.tiles["split"] == side, -1, data.codes))
    with pytest.raises(NotApplicableError, match=f"0 labelled {side}"):
        evaluate_classification(replace(data, tiles=gone), CONFIG, seed=0)
