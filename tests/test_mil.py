import numpy as np
import pytest
import torch

from mad.files import MadError
from mad.models.mil import GatedAttention, pad_bags


def _head(dim: int = 7, hidden: int = 5, outputs: int = 3) -> GatedAttention:
    torch.manual_seed(0)
    return GatedAttention(dim, hidden, outputs, dropout=0.4).eval()


def _formula(head: GatedAttention, bag: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ilse et al. 2018, equations 7 and 9, a tile at a time, in numpy."""
    p = {name: value.detach().numpy().astype(np.float64) for name, value in head.state_dict().items()}
    features, scores = [], []
    for x in bag.astype(np.float64):
        h = np.maximum(p["embed.weight"] @ x + p["embed.bias"], 0)
        left = np.tanh(p["tanh.weight"] @ h + p["tanh.bias"])
        right = 1 / (1 + np.exp(-(p["gate.weight"] @ h + p["gate.bias"])))
        features.append(h)
        scores.append(p["score.weight"][0] @ (left * right))
    weights = np.exp(scores) / np.exp(scores).sum()
    pooled = sum(a * h for a, h in zip(weights, features, strict=True))
    return p["output.weight"] @ pooled + p["output.bias"], weights


def test_output_and_attention_follow_the_formula():
    head = _head()
    bag = np.random.default_rng(1).normal(size=(11, 7)).astype(np.float32)
    output, attention = head(torch.from_numpy(bag))
    expected, weights = _formula(head, bag)
    np.testing.assert_allclose(output.detach(), expected, atol=1e-6)
    np.testing.assert_allclose(attention.detach(), weights, atol=1e-6)


def test_padding_changes_neither_output_nor_gradient():
    head = _head()
    rng = np.random.default_rng(2)
    bags = [torch.from_numpy(rng.normal(size=(n, 7)).astype(np.float32)) for n in (1, 6, 13)]
    padded, present = pad_bags(bags)
    assert padded.shape == (3, 13, 7) and present.sum(1).tolist() == [1, 6, 13]
    together, attention = head(padded, present)
    together.square().sum().backward()
    gradients = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    for place, bag in enumerate(bags):
        alone, weights = head(bag)
        torch.testing.assert_close(together[place], alone)
        torch.testing.assert_close(attention[place, : len(bag)], weights)
        assert not attention[place, len(bag) :].any()
        alone.square().sum().backward()
    for one, other in zip(gradients, head.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)


def test_gradients_reach_the_tiles_and_match_finite_differences():
    head = _head().double()
    bag = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: head(x), (bag,))


def test_order_of_tiles_does_not_matter():
    head, bag = _head(), torch.randn(9, 7)
    order = torch.randperm(9)
    torch.testing.assert_close(head(bag)[0], head(bag[order])[0])
    torch.testing.assert_close(head(bag)[1][order], head(bag[order])[1])


def test_dropout_is_for_training_alone():
    head, bag = _head(), torch.randn(9, 7)
    assert torch.equal(head(bag)[0], head(bag)[0])
    head.train()
    assert not torch.equal(head(bag)[0], head(bag)[0])


def test_empty_bag_is_refused():
    with pytest.raises(MadError, match="no tile"):
        _head()(torch.zeros(0, 7))
    padded, present = pad_bags([torch.zeros(0, 7), torch.zeros(2, 7)])
    with pytest.raises(MadError, match="no tile"):
        _head()(padded, present)
