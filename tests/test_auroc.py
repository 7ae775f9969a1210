import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import r2_score, roc_auc_score

from mad.evaluation.auroc import auroc, ones, pair_tables, r2, spearman
from mad.evaluation.bootstrap import patient_draws


def _tables(truth, scores, patients=None, heads=None):
    n = len(truth)
    patients = np.arange(n) if patients is None else patients
    heads = np.zeros(n, np.int64) if heads is None else heads
    return pair_tables(np.asarray(truth, bool), np.asarray(scores, float), patients, heads, patients.max() + 1)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_scikit_learn_with_many_ties(seed):
    rng = np.random.default_rng(seed)
    truth, scores = rng.integers(0, 2, 60), rng.integers(0, 7, 60)
    assert auroc(_tables(truth, scores), ones(60))[0] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)


def test_extremes_and_constant_scores():
    truth = np.array([0, 0, 1, 1])
    assert auroc(_tables(truth, [1, 2, 3, 4]), ones(4))[0] == 1
    assert auroc(_tables(truth, [4, 3, 2, 1]), ones(4))[0] == 0
    assert auroc(_tables(truth, [1, 1, 1, 1]), ones(4))[0] == 0.5
    assert np.isnan(auroc(_tables([1, 1, 1, 1], [1, 2, 3, 4]), ones(4))[0])


def test_macro_auroc_is_one_versus_rest():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 80)
    scores = rng.dirichlet(np.ones(3), 80)
    tables = np.stack([_tables(truth == code, scores[:, code]) for code in range(3)])
    expected = roc_auc_score(truth, scores, multi_class="ovr", average="macro")
    assert auroc(tables, ones(80))[0] == pytest.approx(expected, abs=1e-12)


def test_only_pairs_of_one_head_count():
    rng = np.random.default_rng(4)
    truth, scores, heads = rng.integers(0, 2, 90), rng.normal(size=90), np.arange(90) % 3
    scores += 100 * heads  # each head has a scale of its own
    parts = [(roc_auc_score(truth[heads == h], scores[heads == h]), heads == h) for h in range(3)]
    pairs = [truth[mask].sum() * (1 - truth[mask]).sum() for _, mask in parts]
    expected = sum(value * n for (value, _), n in zip(parts, pairs, strict=True)) / sum(pairs)
    assert auroc(_tables(truth, scores, heads=heads), ones(90))[0] == pytest.approx(expected, abs=1e-12)


def test_weights_are_a_bootstrap_of_patients():
    """Patients with one slide each, repeated as often as they are drawn: pairs of a patient with itself cannot arise."""
    rng = np.random.default_rng(5)
    truth, scores = rng.integers(0, 2, 25), rng.integers(0, 9, 25).astype(float)
    predicted = truth + rng.normal(size=25)
    draws = patient_draws(25, 20, seed=1)
    values = auroc(_tables(truth, scores), draws.astype(float))
    same = np.arange(25)
    explained, ranked = (f(scores, predicted, same, draws.astype(float)) for f in (r2, spearman))
    for row, draw in enumerate(draws):
        drawn = np.repeat(np.arange(25), draw)
        assert values[row] == pytest.approx(roc_auc_score(truth[drawn], scores[drawn]), abs=1e-12)
        assert explained[row] == pytest.approx(r2_score(scores[drawn], predicted[drawn]), abs=1e-9)
        assert ranked[row] == pytest.approx(spearmanr(scores[drawn], predicted[drawn]).statistic, abs=1e-9)


def test_slides_of_one_patient_are_drawn_together():
    truth, scores = np.array([1, 0, 1, 0]), np.array([2.0, 1.0, 0.0, 3.0])
    tables = _tables(truth, scores, patients=np.array([0, 0, 1, 1]))
    # patient 0 alone, twice: its own pair is won, whatever its weight
    assert auroc(tables, np.array([[2.0, 0.0], [0.0, 2.0]])).tolist() == [1.0, 0.0]


def test_constant_sides_have_no_number():
    same, values = np.arange(4), np.array([1.0, 2.0, 3.0, 4.0])
    assert np.isnan(r2(np.full(4, 2.5), values, same, ones(4))[0])
    assert np.isnan(spearman(values, np.full(4, 2.5), same, ones(4))[0])
    assert r2(values, values, same, ones(4))[0] == 1 and spearman(values, -values, same, ones(4))[0] == -1
