"""The paper's probe against torch's own layer and optimiser, the sound probe against scikit-learn's optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mad.evaluation.probe import (
    Probe,
    _Order,
    choose_sound_probe,
    cross_entropy,
    paper_probe,
    sound_probe,
    sound_probes,
)
from mad.evaluation.standardised import standardisation


def make(seed: int, num_rows: int = 400, dim: int = 6, gap: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, num_rows)
    features = gap * np.eye(dim)[labels] + generator.normal(size=(num_rows, dim))
    return (features * np.linspace(1, 20, dim) + 5).astype(np.float32), labels


def above_optimum(ours: Probe, rows: np.ndarray, labels: np.ndarray, strength: float, tol: float) -> float:
    """A sound probe's objective less that of scikit-learn's optimum, in float64."""
    scaled = StandardScaler().fit_transform(rows.astype(np.float64))
    theirs = LogisticRegression(C=1 / (len(labels) * strength), max_iter=20_000, tol=tol).fit(scaled, labels)

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        loss = torch.nn.functional.cross_entropy(torch.from_numpy(scaled @ weight + bias), torch.from_numpy(labels))
        return float(loss) + strength / 2 * float((weight**2).sum())

    found = objective(ours.weight[0].double().numpy(), ours.bias[0].double().numpy())
    return found - objective(theirs.coef_.T, theirs.intercept_)


def test_learns_separable_data() -> None:
    features, labels = make(0, gap=60)
    probe = paper_probe(features, labels, num_classes=3, seeds=[0, 1], steps=1500, lr=1e-2)
    assert probe.predict(features).shape == (2, 400)
    assert (probe.predict(features, chunk=33) == labels).mean(axis=1).min() > 0.99


def test_every_run_is_what_torch_trains_alone() -> None:
    features, labels = make(1)
    steps, lr, batch = 150, 1e-2, 32
    ours = paper_probe(features, labels, num_classes=3, seeds=[4, 5], steps=steps, lr=lr, batch=batch)
    order = _Order(len(labels), 5)
    layer = torch.nn.Linear(6, 3)
    bound = 6**-0.5
    with torch.no_grad():
        layer.weight.copy_((torch.rand(3, 6, generator=order.generator) * 2 - 1) * bound)
        layer.bias.copy_(((torch.rand(3, 1, generator=order.generator) * 2 - 1) * bound)[:, 0])
    optimiser = torch.optim.Adam(layer.parameters(), lr=lr)
    data, codes = torch.from_numpy(features), torch.from_numpy(labels)
    for _ in range(steps):
        index = order.take(batch)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(layer(data[index]), codes[index]).backward()
        optimiser.step()
    assert ours.weight[1].T.numpy() == pytest.approx(layer.weight.detach().numpy(), abs=2e-4)
    assert ours.bias[1, 0].numpy() == pytest.approx(layer.bias.detach().numpy(), abs=2e-4)


def test_seeds_differ_and_repeat() -> None:
    features, labels = make(2)
    first = paper_probe(features, labels, num_classes=3, seeds=[0, 1], steps=20)
    again = paper_probe(features, labels, num_classes=3, seeds=[1], steps=20)
    assert not torch.equal(first.weight[0], first.weight[1])
    assert torch.allclose(first.weight[1], again.weight[0], atol=1e-6)


def test_an_epoch_holds_every_tile_once() -> None:
    order = _Order(10, 0)
    assert sorted(torch.cat([order.take(4), order.take(6)]).tolist()) == list(range(10))
    assert sorted(order.take(10).tolist()) == list(range(10))


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_sound_probe_is_the_optimum_of_scikit_learn(strength: float) -> None:
    features, labels = make(3)
    ours = sound_probe(features, labels, num_classes=3, strength=strength, chunk=128)
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    theirs = LogisticRegression(C=1 / (len(labels) * strength), max_iter=5000, tol=1e-9).fit(scaled, labels)
    assert ours.weight[0].T.numpy() == pytest.approx(theirs.coef_, abs=2e-3)
    assert (ours.predict(features)[0] == theirs.predict(scaled)).mean() > 0.995


def test_sound_probe_does_not_care_for_scale_or_offset() -> None:
    features, labels = make(4)
    moved = features * np.float32(37) - np.float32(1000)
    first, second = (sound_probe(x, labels, num_classes=3, strength=1e-2) for x in (features, moved))
    assert (first.predict(features) == second.predict(moved)).mean() > 0.995


def test_warm_start_ends_at_the_same_optimum() -> None:
    features, labels = make(5)
    cold = sound_probe(features, labels, num_classes=3, strength=1e-3)
    warm = sound_probe(
        features, labels, num_classes=3, strength=1e-3, start=sound_probe(features, labels, num_classes=3, strength=1)
    )
    assert warm.weight.numpy() == pytest.approx(cold.weight.numpy(), abs=2e-3)


def test_strength_is_chosen_on_validation_tiles() -> None:
    features, labels = make(6, num_rows=60, gap=0.5)
    val, val_labels = make(7, gap=0.5)
    strengths = [1.0, 1e-2, 1e-5]
    options = {"num_classes": 3, "strengths": strengths, "fallback": 0.5}
    probe, chosen, how = choose_sound_probe(features, labels, val_features=val, val_labels=val_labels, **options)
    losses = [
        cross_entropy(sound_probe(features, labels, num_classes=3, strength=s), val, val_labels) for s in strengths
    ]
    assert chosen == strengths[int(np.argmin(losses))]
    assert cross_entropy(probe, val, val_labels) == pytest.approx(min(losses), abs=1e-3)
    assert "400 validation tiles" in how


def test_without_validation_tiles_the_strength_is_fixed_and_said_so() -> None:
    features, labels = make(8)
    _, chosen, how = choose_sound_probe(
        features,
        labels,
        num_classes=3,
        strengths=[1.0],
        fallback=0.25,
        val_features=features[:0],
        val_labels=labels[:0],
    )
    assert chosen == 0.25 and how.startswith("fixed")


def test_constant_dimensions_stay_finite() -> None:
    features, labels = make(9)
    features[:, 2] = 7
    mean, std = standardisation(features, chunk=100)
    assert std[2] == 1 and mean[2] == pytest.approx(7)
    assert torch.isfinite(sound_probe(features, labels, num_classes=3, strength=1e-3).weight).all()


def test_all_strengths_at_once_are_the_optima_of_each_alone() -> None:
    features, labels = make(10)
    strengths = [1.0, 1e-2, 1e-4]
    together = sound_probes(features, labels, num_classes=3, strengths=strengths)
    for strength, ours in zip(strengths, together, strict=True):
        alone = sound_probe(features, labels, num_classes=3, strength=strength)
        assert ours.weight.numpy() == pytest.approx(alone.weight.numpy(), abs=2e-3)


def test_rows_that_are_nearly_one_direction_are_no_harder() -> None:
    """Ill-conditioned embeddings, on which steepest descent would not arrive; against scikit-learn's objective."""
    features, labels = make(11, num_rows=600, dim=30, gap=0.8)
    mixed = features @ np.random.default_rng(0).normal(size=(30, 30)) + 300 * features[:, :1] + np.arange(30)
    mixed = mixed.astype(np.float32)
    ours = sound_probe(mixed, labels, num_classes=3, strength=1e-4)
    assert above_optimum(ours, mixed, labels, 1e-4, tol=1e-10) == pytest.approx(0, abs=1e-5)


def test_chunks_of_memory_mapped_rows_give_the_same_probe(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = make(12)
    np.save(tmp_path / "features.npy", features)
    whole = sound_probe(features, labels, num_classes=3, strength=1e-2)
    monkeypatch.setattr("mad.evaluation.standardised.IN_MEMORY", 0)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    parts = sound_probe(mapped, labels, num_classes=3, strength=1e-2, chunk=33)
    assert parts.weight.numpy() == pytest.approx(whole.weight.numpy(), abs=1e-3)


def test_a_class_without_tiles_is_not_predicted() -> None:
    features, labels = make(13)
    probe = sound_probe(features, labels, num_classes=5, strength=1e-2)
    assert set(probe.predict(features)[0]) <= {0, 1, 2}


def test_collapsed_embeddings_get_the_most_frequent_class() -> None:
    labels = np.repeat([0, 1, 2], [5, 20, 9])
    probe = sound_probe(np.full((34, 4), 2.5, np.float32), labels, num_classes=3, strength=1e-3)
    assert (probe.predict(np.full((6, 4), 2.5, np.float32)) == 1).all()
    shares = torch.softmax(probe.bias[0, 0], 0).numpy()
    assert shares == pytest.approx(np.bincount(labels) / 34, abs=1e-4)


def test_a_row_that_is_not_finite_is_named() -> None:
    features, labels = make(14)
    features[123, 0] = np.nan
    with pytest.raises(ValueError, match="row 123 holds NaN"):
        sound_probe(features, labels, num_classes=3, strength=1e-2)
    with pytest.raises(ValueError, match="row 123 holds NaN"):
        paper_probe(features, labels, num_classes=3, seeds=[0], steps=1)


def test_no_training_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="training tiles"):
        paper_probe(np.empty((0, 3), np.float32), np.empty(0, int), num_classes=2, seeds=[0], steps=1)


def test_validation_tiles_of_a_class_never_trained_on_choose_nothing() -> None:
    """How improbable such a class became only tells where the optimiser stopped."""
    features, labels = make(20, num_rows=700)
    kept = labels[:400] != 2
    train = {"features": features[:400][kept], "labels": labels[:400][kept], "num_classes": 3, "fallback": 1e-2}
    strengths = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    known = labels[400:] != 2
    found = [
        choose_sound_probe(**train, strengths=strengths, val_features=rows, val_labels=codes)[1:]
        for rows, codes in ((features[400:], labels[400:]), (features[400:][known], labels[400:][known]))
    ]
    assert found[0] == found[1]
    only = choose_sound_probe(
        **train, strengths=strengths, val_features=features[400:][~known], val_labels=labels[400:][~known]
    )
    assert only[1] == 1e-2 and "classes trained on" in only[2]


@pytest.mark.parametrize("dim", [30, 768])
def test_weak_strengths_on_nearly_separable_rows_come_to_their_optimum(dim: int) -> None:
    generator = np.random.default_rng(dim)
    labels = generator.integers(0, 5, 400)
    rows = generator.normal(size=(400, dim)) * np.geomspace(1, 0.01, dim) @ generator.normal(size=(dim, dim))
    rows += 0.1 * generator.normal(size=(5, dim))[labels] * rows.std(0)
    rows = rows.astype(np.float32)
    ours = sound_probe(rows, labels, num_classes=5, strength=1e-5)
    assert ours.converged
    assert above_optimum(ours, rows, labels, 1e-5, tol=1e-6) <= 5e-6
    assert not sound_probe(rows, labels, num_classes=5, strength=1e-5, max_iterations=5).converged


def test_two_classes_share_the_penalty() -> None:
    """scikit-learn penalises the one vector of its binomial loss; here each class has its own, of half the length."""
    features, labels = make(21)
    features, labels = features[labels < 2], labels[labels < 2]
    ours = sound_probe(features, labels, num_classes=2, strength=1e-2)
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    theirs = LogisticRegression(C=2 / (len(labels) * 1e-2), max_iter=5000, tol=1e-9).fit(scaled, labels)
    weight = ours.weight[0].numpy()
    assert weight[:, 1] - weight[:, 0] == pytest.approx(theirs.coef_[0], abs=2e-3)


def test_validation_and_test_rows_that_are_not_finite_are_named() -> None:
    features, labels = make(22)
    broken = features.copy()
    broken[11, 1] = np.nan
    with pytest.raises(ValueError, match="row 11 holds NaN"):
        choose_sound_probe(
            features,
            labels,
            num_classes=3,
            strengths=[1e-3, 1e-1],
            fallback=1e-2,
            val_features=broken,
            val_labels=labels,
        )
    with pytest.raises(ValueError, match="row 11 holds NaN"):
        sound_probe(features, labels, num_classes=3, strength=1e-2).predict(broken)
