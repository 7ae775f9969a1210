"""Masked embedding modelling: losses against float64 references, and what every mask must hold."""

import numpy as np
import pytest
import torch
from fake_regions import cases, grid_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mad.config.regions import MaskMix
from mad.tiles.pyramid import Ladder
from mad.tiles.regions import EVERY_PLACE, region_table
from mad.training.mem import draw_mask, info_nce, mask_magnifications, mask_random, mask_tubes, mem_loss


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def test_mem_is_its_reference() -> None:
    """Magnifications count alike, however many of their tiles are hidden; one without a hidden tile does not count."""
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 40, 9))
    scale = np.array([0] * 2 + [2] * 38)
    apart = [1 - unit(p) @ unit(t) for p, t in zip(predicted, target, strict=True)]
    expected = (sum(apart[:2]) / 2 + sum(apart[2:]) / 38) / 2
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (predicted, target)]
    assert abs(float(mem_loss(*tensors, torch.tensor(scale))) - expected) < 1e-6
    assert float(mem_loss(3 * tensors[1], tensors[1], torch.tensor(scale))) == pytest.approx(0, abs=1e-6)
    assert float(mem_loss(-tensors[1], tensors[1], torch.tensor(scale))) == pytest.approx(2, abs=1e-6)


def test_info_nce_is_its_reference() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 6, 5))
    scores = unit(first) @ unit(second).T / 0.2
    lines = [-np.log(np.exp(scores[n, n]) / np.exp(scores[n]).sum()) for n in range(6)]
    columns = [-np.log(np.exp(scores[n, n]) / np.exp(scores[:, n]).sum()) for n in range(6)]
    tensors = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (first, second)]
    loss = info_nce(*tensors, 0.2)
    assert abs(float(loss.detach()) - np.mean(lines + columns)) < 1e-6
    loss.backward()
    for tensor, other in (
        (tensors[0], second),
        (tensors[1], first),
    ):  # a step along the gradient brings a region to its own
        moved = tensor.detach().numpy() - 0.1 * tensor.grad.numpy()
        assert (unit(moved) * unit(other)).sum(1).mean() > (unit(tensor.detach().numpy()) * unit(other)).sum(1).mean()


@settings(max_examples=40)
@given(cases(), st.floats(0.05, 0.95), st.integers(0, 9))
def test_masks_hide_what_they_say(case, ratio: float, seed: int) -> None:
    """In every region of two tiles or more: one hidden, one seen; counts; tubes leak nothing; magnifications go whole."""
    ladder, tiles, side, chosen = case
    found = region_table(tiles, ladder, 16, side, chosen)
    for _, part in found.groupby("region"):
        scale, place = part["scale"].to_numpy(), part["place"].to_numpy()
        if (n := len(scale)) < 2:
            continue
        rng = np.random.default_rng(seed)
        hidden = mask_random(n, ratio, rng)
        assert hidden.sum() == min(max(1, round(ratio * n)), n - 1)

        tubes, places = mask_tubes(place, ratio, rng), set(place) - {EVERY_PLACE}
        assert (tubes is None) == (len(places) < 2)
        if tubes is not None:
            gone = set(place[tubes]) - {EVERY_PLACE}
            assert len(gone) == min(max(1, round(ratio * len(places))), len(places) - 1)
            where = part[["x_um", "y_um"]].to_numpy()
            apart = np.abs(where[:, None] - where[None]).max(-1)
            sides = part["side_um"].to_numpy()
            overlap = apart < (sides[:, None] + sides[None]) / 2 * (1 - 1e-9)
            inside = tubes & (place != EVERY_PLACE)
            assert not overlap[inside][:, ~tubes].any()  # no seen tile shows tissue of a hidden place
            assert tubes[place == EVERY_PLACE].all()

        whole = mask_magnifications(scale, rng)
        assert (whole is None) == (len(set(scale)) < 2)
        if whole is not None:
            gone = set(scale[whole])
            assert 0 < len(gone) < len(set(scale)) and not gone & set(scale[~whole])

        kind, drawn = draw_mask(scale, place, MaskMix(), ratio, rng)
        assert kind in ("random", "tube", "magnification") and 0 < drawn.sum() < n


def test_ways_of_masking_come_by_their_shares() -> None:
    ladder = Ladder((2.5, 10.0, 40.0))
    part = region_table(grid_of(ladder, 1, 1, 0.25, 0, 0), ladder, 16)
    scale, place = part["scale"].to_numpy(), part["place"].to_numpy()

    def draw(masks: MaskMix, times: int) -> list[tuple[str, np.ndarray]]:
        return [draw_mask(scale, place, masks, 0.75, np.random.default_rng([n])) for n in range(times)]

    drawn = draw(MaskMix(random=2, tube=2, magnification=1), 2000)
    kinds = [kind for kind, _ in drawn]
    shares = {kind: kinds.count(kind) / 2000 for kind in set(kinds)}
    assert shares == pytest.approx({"random": 0.4, "tube": 0.4, "magnification": 0.2}, abs=0.03)
    hidden = {kind: np.mean([mask for k, mask in drawn if k == kind], axis=0) for kind in shares}
    assert hidden["random"].mean() == pytest.approx(0.75, abs=0.01)
    assert hidden["tube"][0] == 1 and hidden["tube"][1:].mean() == pytest.approx(0.75, abs=0.01)
    sets = {tuple(sorted(set(scale[mask]))) for kind, mask in drawn if kind == "magnification"}
    assert sets == {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)}
    assert {kind for kind, _ in draw(MaskMix(random=0, tube=0, magnification=1), 50)} == {"magnification"}
    again = draw(MaskMix(random=2, tube=2, magnification=1), 20)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(drawn, again, strict=False))
    with pytest.raises(ValidationError, match="all three shares are 0"):
        MaskMix(random=0, tube=0, magnification=0)
