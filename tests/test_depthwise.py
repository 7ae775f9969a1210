"""Depthwise convolutions that leave autocast: the same function, its gradient in fp32."""

import copy

import timm
import torch
from torch import nn

from mad.models.depthwise import depthwise_in_fp32

CHANNELS = 6


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3), nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS), nn.Conv2d(CHANNELS, 4, 1)
    )


def test_depthwise_layers_alone_leave_autocast():
    plain, changed = network(), network()
    depthwise_in_fp32(changed)
    kinds = []
    for layer in changed:
        layer.register_forward_hook(lambda _module, _inputs, output: kinds.append(output.dtype))
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(plain(images), changed(images))  # without autocast nothing changes
    kinds.clear()
    with torch.autocast("cpu", torch.bfloat16):
        output = changed(images)
    assert kinds == [torch.bfloat16, torch.float32, torch.bfloat16]
    with torch.no_grad():
        torch.testing.assert_close(output.float(), plain(images), rtol=0.03, atol=0.03)  # bf16 keeps 8 bits


def test_the_gradient_is_that_of_fp32_within_the_rounding_of_bf16():
    plain, changed = network(), network()
    depthwise_in_fp32(changed)
    images = torch.randn(4, 3, 12, 12)
    plain(images).square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = changed(images).float().square().mean()
    loss.backward()
    for wanted, found in zip(plain.parameters(), changed.parameters(), strict=True):
        assert found.grad.dtype == torch.float32
        assert (found.grad - wanted.grad).norm() < 0.03 * wanted.grad.norm()


def test_the_weights_of_a_timm_model_keep_their_names():
    model = timm.create_model("test_efficientnet_gn", num_classes=0)
    names = list(model.state_dict())
    depthwise_in_fp32(model)
    assert list(model.state_dict()) == names


def test_a_copy_computes_with_its_own_weights():
    model = network()
    depthwise_in_fp32(model)
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other[1].weight)
    images = torch.randn(1, 3, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model(images), other(images))
        other(images).sum().backward()
    assert other[1].weight.grad is not None and model[1].weight.grad is None
