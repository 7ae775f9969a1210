"""Masked forward passes and dropped paths around timm's own models."""

import copy

import pytest
import timm
import torch

from mad.files import MadError
from mad.models.masked import check_maskable, drop_paths, masked_forward, patch_grid, patch_tokens

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 0}
MODELS = {
    "registers": ("vit_tiny_patch16_224", {"patch_size": 8, "img_size": 32, "reg_tokens": 3, "dynamic_img_size": True}),
    "positions without prefix": (
        "vit_tiny_patch16_224",
        {"patch_size": 8, "img_size": 32, "reg_tokens": 2, "no_embed_class": True, "dynamic_img_size": True},
    ),
    "average pooling": ("vit_tiny_patch16_224", {"patch_size": 8, "img_size": 32, "global_pool": "avg"}),
    "rotary (Eva)": ("eva02_tiny_patch14_224", {"patch_size": 8, "img_size": 32, "dynamic_img_size": True}),
}


def make(name="registers", **changes):
    torch.manual_seed(0)
    model, args = MODELS[name]
    vit = timm.create_model(model, **{**SMALL, **args, **changes})
    with torch.no_grad():  # tokens start at zero, or as large as rounding
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit


def forward(model, images, masks=None, token=None):
    """Embeddings and patch tokens."""
    embeddings, features = masked_forward(model, images, masks, token)
    return embeddings, patch_tokens(model, features)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", [32, 48])
def test_without_a_mask_it_is_the_models_own_pass_to_the_bit(name, side):
    if side == 48 and not MODELS[name][1].get("dynamic_img_size"):
        side = 32
    model, images = make(name).eval(), torch.randn(3, 3, side, side)
    token = torch.randn(1, 24)
    features = model.forward_features(images)[:, model.num_prefix_tokens :]
    for masks in (None, torch.zeros(3, (side // 8) ** 2, dtype=torch.bool)):
        embeddings, tokens = forward(model, images, masks, token)
        assert torch.equal(embeddings, model(images))
        assert torch.equal(tokens, model.fc_norm(features))
    assert patch_grid(model, side) == (side // 8, side // 8)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_hidden_patch_is_seen_but_its_place(name):
    model, images, token = make(name).eval(), torch.randn(2, 3, 32, 32), torch.randn(1, 24, requires_grad=True)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 6] = True  # row 1, column 2
    other = images.clone()
    other[0, :, 8:16, 16:24] = 7.0
    embeddings, tokens = forward(model, images, masks, token)
    for a, b in zip(forward(model, other, masks, token), (embeddings, tokens), strict=True):
        assert torch.equal(a, b)
    other[0, :, 8:16, 24:32] = 7.0  # the next patch is not hidden
    assert not torch.allclose(forward(model, other, masks, token)[0][0], embeddings[0])
    seen = forward(model, images)
    assert not torch.allclose(seen[0][0], embeddings[0]) and not torch.allclose(seen[1][0], tokens[0])
    torch.testing.assert_close(seen[0][1], embeddings[1])  # the image without a mask
    embeddings.sum().backward()
    assert token.grad.abs().sum() > 0
    two = masks.clone()
    two[0, 9] = True
    _, tokens = forward(model, images, two, token)
    assert not torch.allclose(tokens[0, 6], tokens[0, 9])  # positions are added after the token


def test_the_token_enters_before_positions():
    """By hand: patch embedding, token, positions, blocks, norm."""
    model, images, token = make("registers").eval(), torch.randn(2, 3, 32, 32), torch.randn(1, 24)
    masks = torch.rand(2, 16) < 0.4
    x = model.patch_embed(images).flatten(1, 2)
    x = torch.where(masks[:, :, None], token, x)
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.reg_token.expand(2, -1, -1), x], dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    embeddings, tokens = forward(model, images, masks, token)
    torch.testing.assert_close(embeddings, model.norm(x)[:, 0])
    torch.testing.assert_close(tokens, model.norm(x)[:, 4:])


def test_no_hook_stays_behind():
    model = make()
    hooks = len(model.patch_embed._forward_hooks)
    with pytest.raises(RuntimeError):
        forward(model, torch.randn(2, 3, 32, 32), torch.zeros(2, 5, dtype=torch.bool), torch.randn(1, 24))
    assert len(model.patch_embed._forward_hooks) == hooks == 0


def test_backbones_without_patch_tokens_are_refused():
    check_maskable(make(), "vit")
    with pytest.raises(MadError, match=r"ibot: test_efficientnet_gn .*no patch tokens"):
        check_maskable(timm.create_model("test_efficientnet_gn", num_classes=0), "test_efficientnet_gn")
    with pytest.raises(MadError, match="patch_drop_rate"):
        check_maskable(make(patch_drop_rate=0.5), "vit")


def test_dropped_paths_keep_the_expectation_of_the_full_residual():
    model, images = make(depth=1).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    block, x = model.blocks[0], torch.randn(4, 5, 24, dtype=torch.float64)
    full = x + block.attn(block.norm1(x))
    dropped = copy.deepcopy(model)
    drop_paths(dropped, 0.5, "vit")
    branch = dropped.blocks[0]
    branch.mlp.fc2.weight.data.zero_()  # the second branch adds nothing
    branch.mlp.fc2.bias.data.zero_()
    torch.manual_seed(1)
    draws = torch.stack([branch(x) for _ in range(600)]).detach()
    kept = (draws != x).flatten(2).any(dim=2)
    assert kept.sum(dim=1).eq(2).all()  # of 4 samples always 2 are computed
    residual = (full - x).detach()
    torch.testing.assert_close(draws[kept], (x + 2 * residual).expand_as(draws)[kept])  # each scaled by 4 / 2
    assert (kept.double().mean(dim=0) - 0.5).abs().max() < 0.08
    torch.testing.assert_close(dropped.eval().blocks[0](x), full)
    assert torch.equal(make(depth=1).state_dict()["pos_embed"], dropped.state_dict()["pos_embed"].float())
    assert images.shape and set(dropped.state_dict()) == set(model.state_dict())


def test_dropped_paths_compute_only_the_kept_samples_and_pass_gradients():
    model, seen = make(), []
    drop_paths(model, 0.75, "vit")
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    images = torch.randn(8, 3, 32, 32)
    model(images).square().sum().backward()
    assert seen == [2, 2, 2, 2]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "norm" not in n)
    seen.clear()
    with torch.no_grad():
        expected = make().eval()(images)
        assert torch.equal(model.eval()(images), expected)
        model.train()(images[:1])
    assert seen == [8] * 4 + [1] * 4  # evaluation is whole, and one sample is always kept


def test_dropped_paths_survive_activation_checkpointing():
    from mad.training.parallel import checkpoint_activations

    images, grads = torch.randn(6, 3, 32, 32), []
    for recompute in (False, True):
        model = make()
        drop_paths(model, 0.5, "vit")
        if recompute:
            checkpoint_activations(model)
        torch.manual_seed(3)
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_dropped_paths_need_plain_blocks_and_one_rate():
    with pytest.raises(MadError, match=r"drop_path: conv .*no plain transformer blocks"):
        drop_paths(timm.create_model("test_efficientnet_gn", num_classes=0), 0.1, "conv")
    with pytest.raises(MadError, match="drop_path_rate"):
        drop_paths(make(drop_path_rate=0.2), 0.1, "vit")
