"""Method `xmag`: loss, student and figures against references."""

import fakes
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mad.config.distill import DistillConfig
from mad.config.training import RunConfig
from mad.files import MadError
from mad.models.cells import token_grid
from mad.models.distill import DistillNetwork, check_cells
from mad.training.distill import distill_loss
from mad.training.distill_health import FieldSet, check_fields, find_distill_warnings
from mad.training.objective import Numerics
from mad.training.watch import watch_of

NUMERICS = Numerics((0.5,) * 3, (0.5,) * 3, torch.device("cpu"), torch.float32)


# the loss


def reference(whole, cells, targets, distill):
    """The formula, field by field and child by child in float64 numpy."""

    def cosine(a, b):
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    told = [field for part in targets for field in part.double().numpy()]
    total_global = total_local = 0.0
    for number, field in enumerate(told):
        if whole is not None:
            total_global -= cosine(whole[number].double().numpy(), field.mean(axis=0)) / len(told)
    for said, field in zip([field for part in cells for field in part.double().numpy()], told, strict=False):
        total_local -= sum(cosine(s, t) for s, t in zip(said, field, strict=True)) / len(field) / len(told)
    return distill.global_weight * total_global + distill.local_weight * total_local, total_global, total_local


@pytest.mark.parametrize("weights", [(1.0, 0.5), (1.0, 0.0), (0.0, 0.5), (0.3, 2.0)])
def test_the_loss_is_the_formula(weights):
    """Two parts: fields of 4 x 4 children and of 2 x 2."""
    distill = DistillConfig(teacher="t", global_weight=weights[0], local_weight=weights[1])
    generator = torch.Generator().manual_seed(1)
    targets = [torch.randn(3, 16, 7, generator=generator) + 1, torch.randn(5, 4, 7, generator=generator)]
    whole = torch.randn(8, 7, generator=generator) if weights[0] else None
    cells = [torch.randn(*part.shape, generator=generator) for part in targets] if weights[1] else []
    loss = distill_loss(whole, cells, targets, distill)
    expected = reference(whole, cells, targets, distill)
    found = [float(value) for value in (loss.total, loss.global_loss, loss.local_loss)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_equal_vectors_of_any_length_have_loss_minus_the_weights():
    targets = torch.randn(2, 16, 5)
    loss = distill_loss(3 * targets.mean(1), [0.1 * targets], [targets], DistillConfig(teacher="t"))
    assert float(loss.total) == pytest.approx(-1.5)


# the student


def probe_vit(registers):
    """A vision transformer without blocks whose patch tokens are the mean pixels of their patches."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        patch_size=8,
        embed_dim=6,
        num_heads=1,
        depth=0,
        num_classes=0,
        reg_tokens=registers,
    )
    model.norm, weight = nn.Identity(), torch.zeros(6, 3, 8, 8)
    for channel in range(3):
        weight[channel, channel] = 1 / 64
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(weight)
        model.patch_embed.proj.bias.zero_()
        model.pos_embed.zero_()
    return model


@pytest.mark.parametrize("registers", [0, 4])
def test_tokens_lie_where_their_pixels_do(registers):
    model, images = probe_vit(registers), torch.rand(2, 3, 64, 64)
    grid = token_grid(model, model.forward_features(images), 64)
    torch.testing.assert_close(grid[..., :3], F.avg_pool2d(images, 8).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    "name, side", [("test_efficientnet_gn", 128), ("test_convnext", 128), ("swin_tiny_patch4_window7_224", 224)]
)
def test_feature_maps_are_tokens_too(name, side):
    small = {"img_size": side, "depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 1, 2, 4)}
    options = small if "swin" in name else {}
    model = timm.create_model(name, num_classes=0, **options).eval()
    with torch.no_grad():
        images = torch.rand(1, 3, side, side)
        features = model.forward_features(images)
        grid = token_grid(model, features, side)
        assert grid.shape[-1] == model.num_features and grid.shape[1] == grid.shape[2]
        network = DistillNetwork(model, DistillConfig(teacher="t"), 5)
        step = 2 if grid.shape[1] % 2 == 0 else 7
        embeddings, whole, cells = network.eval()(images, [(1, step)])
        torch.testing.assert_close(embeddings, model(images))
    assert whole.shape == (1, 5) and cells[0].shape == (1, step**2, 5)


def test_tokens_that_make_no_blocks_are_refused():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=112, depth=1, num_classes=0)
    with pytest.raises(
        MadError, match=r"runs.a: .* 7 x 7 tokens at 112 px.*4 x 4 equal blocks.*patches of 7 or 14 or 28 px"
    ):
        check_cells(vit, [4], 112, "a")
    check_cells(
        timm.create_model("vit_tiny_patch16_224", img_size=112, patch_size=14, depth=1, num_classes=0), [4, 2], 112, "a"
    )


def test_heads_are_those_of_the_terms():
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=0)
    both, only_global, only_local = (
        DistillNetwork(backbone, DistillConfig(teacher="t", global_weight=g, local_weight=w), 5)
        for g, w in ((1, 0.5), (1, 0), (0, 1))
    )
    assert [len(net.heads) for net in (both, only_global, only_local)] == [2, 1, 1]
    kinds = [type(layer) for layer in both.global_head]
    assert kinds == [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]
    assert both.global_head[0].out_features == both.global_head[3].out_features == 5
    images = torch.rand(2, 3, 32, 32)
    assert only_global(images, [(2, 4)])[2] == [] and only_local(images, [(2, 4)])[1] is None


# figures


def test_figures_against_references():
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=0)
    network = DistillNetwork(backbone, DistillConfig(teacher="t"), 6)
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 255, (70, 32, 32, 3), generator=generator, dtype=torch.uint8)
    targets = torch.randn(70, 16, 6, generator=generator) + 2
    found = check_fields(network.train(), FieldSet(images, targets, "val", "5x-20x"), NUMERICS)
    assert network.training
    with torch.no_grad():
        _, whole, (cells,) = network.eval()(NUMERICS.images(images[:, None]), [(70, 4)])
    unit = F.normalize(targets, dim=-1).double().numpy()
    means = F.normalize(targets.mean(1), dim=-1).double().numpy()
    assert found["global_cosine"] == pytest.approx(float(F.cosine_similarity(whole, targets.mean(1)).mean()), abs=1e-5)
    assert found["local_cosine"] == pytest.approx(float(F.cosine_similarity(cells, targets, dim=-1).mean()), abs=1e-5)
    best = means.mean(0) / np.linalg.norm(means.mean(0))
    assert found["global_constant"] == pytest.approx(float((means @ best).mean()), abs=1e-5)
    assert all((means @ v).mean() <= found["global_constant"] + 1e-5 for v in np.eye(6))
    field = unit.mean(1) / np.linalg.norm(unit.mean(1), axis=-1, keepdims=True)
    assert found["local_field"] == pytest.approx(float(np.einsum("nkd,nd->nk", unit, field).mean()), abs=1e-5)
    assert found["local_constant"] <= found["local_field"]
    assert found["fields"] == 70 and 1 <= found["rankme"] <= 70


def test_warnings_name_what_is_wrong():
    good = {
        "global_cosine": 0.9,
        "global_constant": 0.8,
        "local_cosine": 0.7,
        "local_constant": 0.6,
        "rankme": 30.0,
        "rankme_teacher": 40.0,
    }
    assert find_distill_warnings(good) == {} == find_distill_warnings({})
    for change, name in (
        ({"global_cosine": 0.8}, "global term learns nothing"),
        ({"local_cosine": 0.5}, "local term learns nothing"),
        ({"rankme": 4.0}, "rank collapse"),
    ):
        assert list(find_distill_warnings(good | change)) == [name]
    assert find_distill_warnings(good | {"rankme": 4.0, "rankme_teacher": 6.0}) == {}
    watch = watch_of(RunConfig(**fakes.tiny_xmag()))
    assert watch.unit == -1.5 and set(watch.marks) >= set(watch.warn(0.0, good | {"local_cosine": 0.5}))
