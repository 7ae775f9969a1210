"""The cross-scale adapter: its losses against float64 references, the untrained head, its files, its draws."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mad.config.adapters import AdapterConfig
from mad.files import MadError
from mad.models.adapter import Adapter, AdapterShape, load_adapter, save_adapter
from mad.training.adapter import PairBatch, PairSource, Tower, keep_neighbours, losses, train_adapter
from mad.training.index import Index, Pairs

LADDER = [2.5, 10.0, 40.0]


def entry(**changes: object) -> AdapterConfig:
    settings = {"name": "x", "encoder": "e", "loss": "mad", "batch": 8, "steps": 6, "warmup": 1, "prototypes": 24}
    return AdapterConfig(**settings | changes)


def tower(seed: int, scales: str = "own", hidden: int = 0) -> Tower:
    """A tower whose residual is not 0."""
    torch.manual_seed(seed)
    made = Tower(Adapter(AdapterShape(dim=12, magnifications=LADDER, scales=scales, hidden=hidden)), 24)
    for parameter in made.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def batch() -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    return PairBatch(torch.randn(7, 12, generator=generator), torch.randn(7, 3, 12, generator=generator), 10.0, 40.0)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_softmax(x: np.ndarray, axis: int) -> np.ndarray:
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def sinkhorn(scores: np.ndarray, temperature: float) -> np.ndarray:
    q = scores / temperature
    for _ in range(3):
        q = log_softmax(log_softmax(q, 0), 1)
    return np.exp(q)


def as64(one: Tower, x: torch.Tensor, head: int) -> tuple[np.ndarray, np.ndarray]:
    """Adapted embeddings and scores of a linear head, by the formulas alone."""
    weight, bias = (p.detach().double().numpy() for p in one.adapter.heads[head].parameters())
    z = x.double().numpy() @ (np.eye(12) + weight.T) + bias
    return z, unit(z) @ unit(one.head.prototypes.detach().double().numpy()).T


@pytest.mark.parametrize("both_ways", [True, False])
def test_mad_s_loss_is_its_formula(both_ways: bool) -> None:
    student, teacher, data = tower(1), tower(2), batch()
    settings = entry(both_ways=both_ways, teacher_temp=0.05)
    children = data.children.flatten(0, 1)
    up, down = as64(student, data.parents, 1)[1], as64(student, children, 2)[1]
    of_parents = sinkhorn(as64(teacher, data.parents, 1)[1], 0.05)
    of_children = sinkhorn(as64(teacher, children, 2)[1], 0.05).reshape(7, 3, 24)
    log_p = log_softmax(down / settings.student_temp, 1).reshape(7, 3, 24)
    upwards = -np.einsum("bck,bk->bc", log_p, of_parents).mean()
    downwards = -np.einsum("bk,bck->bc", log_softmax(up / settings.student_temp, 1), of_children).mean()
    expected = (upwards + downwards) / 2 if both_ways else upwards
    assert losses(settings, student, teacher, data)["align"].item() == pytest.approx(expected, rel=1e-5)


def test_the_other_losses_are_their_formulas() -> None:
    student, data = tower(3), batch()
    found = losses(entry(loss="contrast", contrast_temp=0.2), student, student, data)
    up, down = as64(student, data.parents, 1)[0], as64(student, data.children.flatten(0, 1), 2)[0]
    per_position = []
    for position in range(3):
        cosine = unit(down.reshape(7, 3, 12)[:, position]) @ unit(up).T / 0.2
        ways = [-np.diag(log_softmax(cosine, axis)).mean() for axis in (0, 1)]
        per_position.append(np.mean(ways))
    assert found["align"].item() == pytest.approx(np.mean(per_position), rel=1e-5)
    changes = []
    for before, after in ((data.parents, up), (data.children.flatten(0, 1), down)):
        frozen = unit(before.double().numpy())
        changes.append(((unit(after) @ unit(after).T - frozen @ frozen.T) ** 2).mean())
    assert found["keep"].item() == pytest.approx(np.mean(changes), rel=1e-5)
    spreads = []
    for x in [up, *down.reshape(7, 3, 12).transpose(1, 0, 2)]:
        distance = np.linalg.norm(unit(x)[:, None] - unit(x)[None], axis=-1) + 9 * np.eye(7)
        spreads.append(-np.log(distance.min(1) + 0.01).mean())
    assert found["koleo"].item() == pytest.approx((spreads[0] + np.mean(spreads[1:])) / 2, rel=1e-5)


def test_the_teacher_learns_nothing_and_every_head_of_the_transition_does() -> None:
    student, teacher = tower(4), tower(5)
    sum(losses(entry(), student, teacher, batch()).values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    moved = [head.weight.grad is not None for head in student.adapter.heads]
    assert moved == [False, True, True] and student.head.prototypes.grad is not None
    student.zero_grad(set_to_none=True)
    losses(entry(both_ways=False), student, teacher, batch())["align"].backward()
    assert [head.weight.grad is not None for head in student.adapter.heads] == [False, False, True]


def test_rotations_keep_all_neighbours() -> None:
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2)))[0]
    assert keep_neighbours(x, 3 * x @ rotation) < 1e-12
    assert keep_neighbours(x, x * torch.linspace(0, 1, 12)) > 1e-3


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("scales", ["own", "shared"])
def test_the_untrained_adapter_standardises(hidden: int, scales: str) -> None:
    rng = np.random.default_rng(0)
    at = rng.choice(LADDER, 90)
    features = (rng.normal(size=(90, 4)) * [1, 5, 0.1, 0] + at[:, None]).astype(np.float32)
    features[:, 3] = 7
    shape = AdapterShape(dim=4, magnifications=LADDER, scales=scales, hidden=hidden, unit=False)
    adapter = Adapter(shape)
    adapter.fit_moments(features, at)
    adapted = adapter.apply_to(features, at, chunk=7)
    unit = Adapter(replace(shape, unit=True))
    unit.load_state_dict(adapter.state_dict())
    lengths = np.linalg.norm(adapted, axis=1, keepdims=True)
    assert (
        np.abs(unit.apply_to(features, at) - 2 * adapted / lengths).max() < 1e-5
    )  # the same directions, of length sqrt(4)
    for group in [at == m for m in LADDER] if scales == "own" else [at > 0]:
        varied = features[group, :3].astype(np.float64)
        expected = (varied - varied.mean(0)) / varied.std(0)
        assert np.abs(adapted[group, :3] - expected).max() < 1e-4
        assert np.abs(adapted[group, 3]).max() < 1e-4  # a constant dimension is not blown up
    if scales == "own":
        with pytest.raises(MadError, match="no training tile at 2.5x"):
            adapter.fit_moments(features[at > 3], at[at > 3])


def test_a_saved_adapter_is_loaded_whole_and_equal_ones_are_equal_bytes(tmp_path: Path) -> None:
    adapter = tower(6, hidden=5).adapter
    adapter.mean.normal_()
    assert save_adapter(adapter, tmp_path / "a") == save_adapter(adapter, tmp_path / "b")
    again = load_adapter(tmp_path / "a")
    x, at = np.random.default_rng(1).normal(size=(20, 12)).astype(np.float32), np.repeat(LADDER, [5, 7, 8])
    assert again.shape == adapter.shape and np.array_equal(again.apply_to(x, at), adapter.apply_to(x, at))
    with pytest.raises(MadError, match=r"not for 20x"):
        again.apply_to(x, np.full(20, 20.0))
    with pytest.raises(MadError, match="embeddings of 12 dimensions"):
        again.apply_to(x[:, :3], at)
    save_adapter(tower(7).adapter, tmp_path / "c")
    (tmp_path / "c" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    with pytest.raises(MadError, match="not of one adapter"):
        load_adapter(tmp_path / "c")
    with pytest.raises(MadError, match="run `mad adapt"):
        load_adapter(tmp_path / "none")


def pair_index() -> Index:
    """Two slides with three parents at 10x and four children each: rows 0-5 are parents, parent p has children 6 + 4 p …"""
    rows = pd.DataFrame({"slide": ["A"] * 3 + ["B"] * 3 + ["A"] * 12 + ["B"] * 12})
    return Index(
        Path(), rows, {"10x-40x": Pairs(np.arange(6), 6 + np.arange(24).reshape(6, 4))}, np.zeros(0, np.int64), "d"
    )


@pytest.mark.parametrize("pairs", ["aligned", "shuffled"])
def test_children_are_of_their_parent_or_of_another_one_of_its_slide(pairs: str) -> None:
    features, adapter = np.arange(30, dtype=np.float32)[:, None], Adapter(AdapterShape(dim=1, magnifications=LADDER))
    source = PairSource(entry(pairs=pairs, children=2, batch=4), 3, pair_index(), features, adapter)
    seen = set()
    for step in range(20):
        (drawn,) = source(step)
        parents = drawn.parents[:, 0].long()
        owners = (drawn.children[..., 0].long() - 6) // 4
        assert drawn.children.shape == (4, 2, 1) and len(set(parents.tolist())) == 4
        assert (drawn.coarse, drawn.fine) == (10.0, 40.0)
        assert ((owners == parents[:, None]) == (pairs == "aligned")).all()
        assert ((owners < 3) == (parents < 3)[:, None]).all()  # the same slide
        assert torch.equal(source(step)[0].children, drawn.children)
        seen |= {tuple(own) for own in drawn.children[..., 0].tolist()}
    assert len(seen) > 20  # drawn anew each time
    with pytest.raises(MadError, match="no transition of the train split has two pairs"):
        PairSource(
            entry(), 0, Index(Path(), pd.DataFrame({"slide": []}), {}, np.zeros(0, np.int64), ""), features, adapter
        )


def test_numbers_that_are_not_finite_stop_before_the_weights_change() -> None:
    adapter = Adapter(AdapterShape(dim=3, magnifications=LADDER))
    features = np.full((30, 3), np.nan, np.float32)
    source = PairSource(entry(children=2), 0, pair_index(), features, adapter)
    with pytest.raises(MadError, match=r"adapters.x: loss or gradient is not finite at step 0"):
        train_adapter(adapter, entry(), 0, source, lambda _: {})
    assert not any(p.any() for p in adapter.parameters())
