"""Subsets of rows: what the metrics find on them is what they find on arrays, and no second array is made."""

import numpy as np
import pandas as pd
import pytest

from mad.config.evaluation import EvaluationConfig
from mad.evaluation import standardised
from mad.evaluation.classification import evaluate_classification
from mad.evaluation.data import Embedded
from mad.evaluation.probe import paper_probe, sound_probes
from mad.metrics.knn import knn_predict
from mad.metrics.rows import RowSubset, refuse_not_finite


def test_a_subset_is_read_like_an_array() -> None:
    rng = np.random.default_rng(0)
    features, rows = rng.normal(size=(50, 3)).astype(np.float32), rng.permutation(50)[:20]
    subset, array = RowSubset(features, rows), features[rows]
    assert subset.shape == array.shape and subset.size == array.size and len(subset) == len(array)
    for places in (slice(3, 9), slice(None, None, 4), np.array([5, 5, 0]), array[:, 0] > 0):
        assert np.array_equal(subset[places], array[places])
    assert np.array_equal(np.asarray(subset), array) and np.asarray(subset, np.float64).dtype == np.float64
    features[rows[7], 1] = np.nan
    with pytest.raises(ValueError, match="row 7 "):
        refuse_not_finite(subset)


def test_classifiers_find_the_same_on_a_subset() -> None:
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(300, 8)).astype(np.float32), rng.integers(0, 3, 300)
    features[np.arange(300), labels] += 2
    train, test = np.split(rng.permutation(300), [200])
    bank, queries = RowSubset(features, train), RowSubset(features, test)
    options = {"k": 5, "num_classes": 3, "query_chunk": 30, "bank_chunk": 70}
    expected = knn_predict(features[train], labels[train], features[test], **options)
    assert np.array_equal(knn_predict(bank, labels[train], queries, **options), expected)
    for fit, own in ((paper_probe, {"seeds": [0, 1], "steps": 50}), (sound_probes, {"strengths": [0.1, 1.0]})):
        found, known = (fit(rows, labels[train], num_classes=3, **own) for rows in (bank, features[train]))
        for one, other in zip(np.atleast_1d(found), np.atleast_1d(known), strict=True):
            assert np.array_equal(one.weight, other.weight) and np.array_equal(one.bias, other.bias)
            assert np.array_equal(one.predict(queries), other.predict(features[test]))


def test_the_bank_is_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training tiles are most of a cohort: beside it there is room for pieces of them only."""
    num_train, num_test = 17_000, 300
    rng = np.random.default_rng(2)
    tiles = pd.DataFrame({"magnification": 10.0, "code": rng.integers(0, 3, num_train + num_test)})
    tiles["split"] = np.repeat(["train", "test"], [num_train, num_test])
    tiles["patient_id"] = tiles["split"] + (tiles.index % 7).astype(str)
    features = rng.standard_normal((len(tiles), 4), dtype=np.float32)
    data = Embedded(tiles=tiles, features=features, pairs=pd.DataFrame(), classes=["a", "b", "c"])
    largest, get = [0], RowSubset.__getitem__

    def watched(self: RowSubset, places: slice | np.ndarray) -> np.ndarray:
        found = get(self, places)
        largest.append(len(found))
        return found

    monkeypatch.setattr(RowSubset, "__getitem__", watched)
    monkeypatch.setattr(standardised, "IN_MEMORY", 0)
    config = EvaluationConfig(runs=1, probe_steps=2, sound_strengths=[1.0], bootstrap_resamples=0, knn_k=3)
    report = evaluate_classification(data, config, seed=0)
    assert report["n"]["tiles"] == num_test and max(largest) <= 8192
