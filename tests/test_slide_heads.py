import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mad.config.biomarkers import BiomarkersConfig
from mad.evaluation.bags import Bag, fit_scaling
from mad.evaluation.slide_heads import Task, fit_head
from mad.files import MadError

SETTINGS = BiomarkersConfig(steps=120, lr=5e-3, hidden=16, max_tiles=20, batch=8, dropout=0.1)


def _bag(name: str, features: np.ndarray, kind: np.ndarray | None = None) -> Bag:
    n = len(features)
    kind = np.zeros(n, np.int64) if kind is None else kind
    names = np.array([f"{name}_{i}" for i in range(n)], object)
    return Bag(slide_id=name, store=features.astype(np.float32), rows=np.arange(n), kind=kind, names=names, tiles=n)


def _planted(count: int, *, found: int, seed: int = 0) -> tuple[list[Bag], Task]:
    """Slides of 40 tiles; in every other one `found` tiles bear the signal, the rest is noise."""
    rng, bags = np.random.default_rng(seed), []
    for n in range(count):
        tiles = rng.normal(size=(40, 12))
        if n % 2:
            tiles[:found, 0] += 4
        bags.append(_bag(f"S{n}", tiles))
    return bags, Task(truth={f"S{n}": float(n % 2) for n in range(count)}, classes=["0", "1"])


def test_scaling_is_of_each_kind_alone():
    rng = np.random.default_rng(0)
    kinds = [rng.integers(0, 2, 30) for _ in range(3)]
    features = [rng.normal(size=(30, 4)) * (1 + 9 * k[:, None]) + 100 * k[:, None] for k in kinds]
    bags = [_bag(f"S{n}", x, k) for n, (x, k) in enumerate(zip(features, kinds, strict=True))]
    scaling = fit_scaling(bags, 3)
    everything, kind = np.concatenate(features).astype(np.float32), np.concatenate(kinds)
    for code in (0, 1):
        np.testing.assert_allclose(scaling.mean[code], everything[kind == code].mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(scaling.std[code], everything[kind == code].std(0), rtol=1e-5)
    assert not scaling.mean[2].any() and (scaling.std[2] == 1).all()
    scaled = np.concatenate([scaling(bag) for bag in bags])
    np.testing.assert_allclose(scaled[kind == 1].std(0), 1, rtol=1e-4)


def test_constant_dimensions_stay_finite():
    bag = _bag("S0", np.full((5, 3), 7.0))
    assert not fit_scaling([bag], 1)(bag).any()


def test_attention_finds_the_tiles_that_bear_the_signal():
    bags, task = _planted(60, found=4)
    head = fit_head("attention", bags[:36], bags[36:46], task, SETTINGS, num_kinds=1, seed=0)
    for bag in bags[46:]:
        scores, attention = head.predict(bag)
        assert scores.sum() == pytest.approx(1) and attention.sum() == pytest.approx(1, abs=1e-5)
        assert (scores[1] > 0.5) == (task.truth[bag.slide_id] == 1)
        if task.truth[bag.slide_id]:
            assert attention[:4].sum() > 3 * 4 / 40
    assert 1 <= head.facts["steps"] <= SETTINGS.steps


def test_attention_is_deterministic_and_leaves_the_random_stream_alone():
    import torch

    bags, task = _planted(20, found=8)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, other, third = (
        fit_head("attention", bags[:12], bags[12:16], task, SETTINGS, num_kinds=1, seed=seed).predict(bags[17])[0]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(one, other) and not np.array_equal(one, third)
    assert torch.equal(before, torch.random.get_rng_state())


def test_mean_head_is_logistic_regression_on_the_mean():
    bags, task = _planted(40, found=20)
    settings = BiomarkersConfig(strengths=[0.1])
    head = fit_head("mean", bags[:30], bags[30:36], task, settings, num_kinds=1, seed=0)
    scaling = fit_scaling(bags[:30], 1)
    x = np.stack([scaling(bag).mean(0, dtype=np.float64) for bag in bags])
    x = (x - x[:30].mean(0)) / x[:30].std(0)
    model = LogisticRegression(C=1 / (0.1 * 30), max_iter=1000).fit(x[:30], [n % 2 for n in range(30)])
    np.testing.assert_allclose(head.predict(bags[38])[0], model.predict_proba(x[38:39])[0], atol=1e-6)
    assert (head.predict(bags[38])[1] == np.float32(1 / 40)).all()


@pytest.mark.parametrize("kind", ["attention", "mean"])
def test_regression_answers_in_its_own_unit(kind):
    rng, bags = np.random.default_rng(1), []
    truth = {f"S{n}": float(500 + 100 * rng.normal()) for n in range(60)}
    for name, value in truth.items():
        tiles = rng.normal(size=(30, 6))
        tiles[:, 2] += (value - 500) / 100
        bags.append(_bag(name, tiles))
    task = Task(truth=truth, classes=None)
    head = fit_head(kind, bags[:40], bags[40:50], task, SETTINGS, num_kinds=1, seed=0)
    predicted = np.array([head.predict(bag)[0][0] for bag in bags[50:]])
    assert np.corrcoef(predicted, task.of(bags[50:]))[0, 1] > 0.9
    assert np.abs(predicted - task.of(bags[50:])).mean() < 50


def test_penalty_is_chosen_on_validation_slides_alone():
    bags, task = _planted(40, found=1, seed=3)
    weak = fit_head("mean", bags[:30], bags[30:], task, SETTINGS, num_kinds=1, seed=0)
    assert weak.facts["strength"] in SETTINGS.strengths
    with pytest.raises(MadError, match="it has 30 and 0"):
        fit_head("mean", bags[:30], [], task, SETTINGS, num_kinds=1, seed=0)
