"""The projection head and the network of backbone and head."""

import numpy as np
import torch

from mad.models.heads import DinoHead, Network


def test_scores_are_cosines_with_unit_prototypes():
    torch.manual_seed(0)
    head = DinoHead(6, 16, 5, 11)
    x = torch.randn(4, 6)
    z = head.mlp(x).detach().double().numpy()
    w = head.prototypes.detach().double().numpy()
    expected = (z @ w.T) / np.linalg.norm(z, axis=1)[:, None] / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(head(x).detach().numpy(), expected, atol=1e-6)


def test_scores_do_not_change_with_the_length_of_a_prototype():
    head = DinoHead(6, 16, 5, 11)
    x = torch.randn(3, 6)
    before = head(x).detach()
    with torch.no_grad():
        head.prototypes.mul_(torch.rand(11, 1) + 0.5)
    torch.testing.assert_close(head(x), before)


def test_scores_stay_fp32_under_bf16():
    head = DinoHead(6, 16, 5, 11)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(torch.randn(3, 6))
    assert scores.dtype == torch.float32


def test_network_splits_sizes_as_single_passes_would():
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 6))
    network = Network(backbone, DinoHead(6, 8, 4, 9))
    large, small = torch.randn(3, 3, 16, 16), torch.randn(5, 3, 8, 8)
    embeddings, scores = network([large, small])
    assert [tuple(part.shape) for part in embeddings] == [(3, 6), (5, 6)]
    torch.testing.assert_close(scores[1], network([small])[1][0])
    torch.testing.assert_close(scores[0], network([large])[1][0])


def test_standardised_layers_start_with_mean_0_and_variance_1():
    torch.manual_seed(0)
    head = DinoHead(6, 16, 5, 11)
    embeddings = 3 + 0.1 * torch.randn(200, 6)  # nearly parallel, as those of an untrained backbone
    before = torch.nn.functional.normalize(head.mlp(embeddings), dim=1).mean(dim=0).norm()
    head.standardise(embeddings)
    outputs = []
    for layer in head.mlp:
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda *arguments: outputs.append(arguments[2].detach()))
    after = torch.nn.functional.normalize(head.mlp(embeddings), dim=1).mean(dim=0).norm()
    assert len(outputs) == 3
    for output in outputs:
        np.testing.assert_allclose(output.mean(dim=0).numpy(), 0, atol=1e-4)
        np.testing.assert_allclose(output.std(dim=0).numpy(), 1, atol=1e-4)
    assert before > 0.9 and after < 0.3
