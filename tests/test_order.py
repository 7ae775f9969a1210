"""Which sample the n-th is: kinds keep their weights, a kind is covered before it repeats."""

import random
import tracemalloc

import numpy as np
import pytest

from mad.files import MadError
from mad.training import order as module
from mad.training.order import SampleOrder, mixing_weights


@pytest.mark.parametrize("mode", ["alternate", "within"])
def test_order_keeps_the_weights_and_covers_each_kind_before_repeating(mode):
    counts, weights = {"a": 30, "b": 7}, {"a": 3.0, "b": 1.0}
    order = SampleOrder(counts, weights, batch=8, steps=100, mode=mode, seed=1)
    drawn = [order[n] for n in range(800)]
    assert [kind for kind, _ in drawn] == [order.kind(n) for n in range(800)]
    share = sum(kind == "a" for kind, _ in drawn) / 800
    assert share == pytest.approx(0.75, abs=0.02)
    for kind, count in counts.items():
        places = [place for name, place in drawn if name == kind]
        for epoch in range(len(places) // count):
            assert sorted(places[epoch * count : (epoch + 1) * count]) == list(range(count))
    if mode == "alternate":
        assert all(len({kind for kind, _ in drawn[s * 8 : s * 8 + 8]}) == 1 for s in range(100))


def at_once(counts, weights, batch, steps, mode, seed):
    """The same order from arrays of all turns, [(kind, place)]."""
    shares = np.array(list(weights.values()), dtype=np.float64)
    turns = np.arange(steps if mode == "alternate" else steps * batch)
    position = np.mod(np.random.default_rng([seed, module.ORDER_STREAM]).random() + turns * module.GOLDEN, 1.0)
    kinds = np.minimum(np.searchsorted(np.cumsum(shares) / shares.sum(), position, side="right"), len(shares) - 1)
    drawn, taken = [], [0] * len(counts)
    for kind in np.repeat(kinds, steps * batch // len(kinds)).tolist():
        count = list(counts.values())[kind]
        epoch, turn = divmod(taken[kind], count)
        taken[kind] += 1
        permutation = np.random.default_rng([seed, module.ORDER_STREAM, kind, epoch]).permutation(count)
        drawn.append((list(counts)[kind], int(permutation[turn])))
    return drawn


@pytest.mark.parametrize("mode", ["alternate", "within"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 18])
def test_the_order_in_pieces_is_that_at_once(monkeypatch, mode, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    for counts, weights in [
        ({"a": 30, "b": 7, "c": 11}, {"a": 1.0, "b": 14.0, "c": 6.0}),
        ({"a": 5}, {"a": 0.3}),
        ({"a": 9, "b": 9}, {"a": 9.0, "b": 9.0}),
    ]:
        order = SampleOrder(counts, weights, batch=6, steps=31, mode=mode, seed=4)
        expected = at_once(counts, weights, 6, 31, mode, 4)
        for n in random.Random(0).sample(range(186), 186):  # a resumed run begins anywhere
            assert order[n] == expected[n] and order.kind(n) == expected[n][0]


def test_a_long_run_s_order_needs_little_memory():
    """6 million turns, of which a run of ViT-g has three hundred times as many."""
    tracemalloc.start()
    order = SampleOrder({"a": 300, "b": 70}, {"a": 3.0, "b": 1.0}, batch=3072, steps=2000, mode="within", seed=1)
    assert order[3072 * 2000 - 1][0] in "ab"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16e6


def test_mixing_weights():
    counts = {"10x-40x": 30, "standalone": 10}
    assert mixing_weights(counts, {}) == {"10x-40x": 30.0, "standalone": 10.0}
    assert mixing_weights(counts, {"10x-40x": 2}) == {"10x-40x": 2.0}
    with pytest.raises(MadError, match=r"2\.5x-10x"):
        mixing_weights(counts, {"2.5x-10x": 1})
    with pytest.raises(MadError, match="no readable sample"):
        mixing_weights({}, {})
