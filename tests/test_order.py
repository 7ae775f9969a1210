"""Which sample the n-th is: kinds keep their weights, a kind is covered before it repeats."""

import pytest

from mad.files import MadError
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


def test_mixing_weights():
    counts = {"10x-40x": 30, "standalone": 10}
    assert mixing_weights(counts, {}) == {"10x-40x": 30.0, "standalone": 10.0}
    assert mixing_weights(counts, {"10x-40x": 2}) == {"10x-40x": 2.0}
    with pytest.raises(MadError, match=r"2\.5x-10x"):
        mixing_weights(counts, {"2.5x-10x": 1})
    with pytest.raises(MadError, match="no readable sample"):
        mixing_weights({}, {})
