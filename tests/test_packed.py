"""Packed views: one pass over batches of several sizes equals a pass per size, whatever wraps the blocks."""

import copy
import sys
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F

from mad.config.training import RunConfig
from mad.files import MadError
from mad.models import packed
from mad.models.heads import DinoHead, Network, build_network
from mad.models.masked import drop_paths
from mad.models.packed import allow_packing, batchwise_attention, block_diagonal, choose_kernel
from mad.training.parallel import checkpoint_activations, compile_blocks

ARGS = {"patch_size": 8, "img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 0}
MODELS = {
    "registers": {"reg_tokens": 3, "init_values": 0.5},
    "average pooling": {"global_pool": "avg", "no_embed_class": True, "reg_tokens": 2},
    "gated MLP": {"mlp_layer": timm.layers.SwiGLUPacked, "init_values": 1e-2},
}
SIZES = {"two sizes": ((4, 32), (6, 16)), "three sizes": ((4, 32), (6, 16), (5, 24))}
NO_XFORMERS = "needs a CUDA GPU and xformers"


def make(name="registers", **changes):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **{**ARGS, **MODELS[name], **changes})
    with torch.no_grad():  # tokens start at zero, or as large as rounding
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit


def networks(name="registers", kernel=batchwise_attention, rate=0.0, dtype=torch.float64):
    """The same network twice, fp64: a pass per size, and packed."""
    backbone = make(name)
    torch.manual_seed(1)
    plain = Network(backbone, DinoHead(24, 16, 8, 12), DinoHead(24, 16, 8, 10), masked=True)
    torch.nn.init.normal_(plain.mask_token)
    if rate:
        drop_paths(plain.backbone, rate, "vit")
    both = copy.deepcopy(plain)
    both.kernel = kernel
    allow_packing(both.backbone)
    return plain.to(dtype), both.to(dtype)


def views(sizes="two sizes", dtype=torch.float64):
    torch.manual_seed(2)
    images = [torch.randn(count, 3, side, side, dtype=dtype) for count, side in SIZES[sizes]]
    masks = torch.rand(4, 16) < 0.4
    masks[1] = False
    return images, masks


def passed(network, images, masks, **kwargs):
    """Everything a network gives, and the gradient of a sum that weighs it at random."""
    torch.manual_seed(3)
    embeddings, scores = network(images, masks, **kwargs)
    parts = [*embeddings, *scores]
    generator = torch.Generator().manual_seed(4)
    loss = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in parts)
    network.zero_grad()
    loss.backward()
    return parts, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def dense_attention(q, k, v, sizes):
    """The packed sequence under one dense mask, written apart from the code that is tested."""
    image = torch.tensor([n for n, length in enumerate(length for count, length in sizes for _ in range(count))
                          for _ in range(length)])  # fmt: skip
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=image[:, None] == image[None, :]).transpose(1, 2)


@pytest.mark.parametrize("kernel", [batchwise_attention, dense_attention])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_a_pass_per_size(name, sizes, kernel):
    plain, both = networks(name, kernel)
    images, masks = views(sizes)
    for arguments in ((masks,), (None,)):
        (parts, grads), (packed_parts, packed_grads) = (passed(net, images, *arguments) for net in (plain, both))
        torch.testing.assert_close(packed_parts, parts, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(packed_grads, grads, rtol=1e-9, atol=1e-10)
    seen, hidden = (both(images, masks, hide=hide)[0] for hide in (False, True))
    assert torch.equal(seen[1], hidden[1]) and not torch.allclose(seen[0], hidden[0])  # the first batch alone is masked
    torch.testing.assert_close(seen, plain(images, masks, hide=False)[0], rtol=1e-9, atol=1e-10)


def test_packed_equals_a_pass_per_size_in_the_types_of_training():
    for dtype, precision, tolerance in ((torch.float32, torch.float32, 1e-5), (torch.float32, torch.bfloat16, 0.05)):
        plain, both = networks(dtype=dtype)
        images, masks = views(dtype=dtype)
        found = []
        for network in (plain, both):
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                found.append(network(images, masks))
        torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


def test_no_image_sees_another():
    _, both = networks()
    images, masks = views()
    before, _ = both(images, masks)
    images[1][2] += 1
    after, _ = both(images, masks)
    changed = [(a != b).any(dim=1).tolist() for a, b in zip(after, before, strict=True)]
    assert changed == [[False] * 4, [False, False, True, False, False, False]]


def test_the_tokens_pass_as_one_sequence_and_only_where_sizes_differ():
    _, both = networks()
    images, masks = views()
    seen = []
    both.backbone.blocks[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    both(images, masks)
    both(images[:1], masks)
    assert seen == [(1, 4 * 20 + 6 * 8, 24), (4, 20, 24)]  # 1 class, 3 registers, 16 or 4 patches


def test_called_as_before_the_blocks_do_what_they_did_to_the_bit():
    model = make().eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    allow_packing(model)
    assert torch.equal(model(images), expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].mlp.fc2.weight.zero_()
    assert torch.equal(model(images), expected) and not torch.allclose(other(images), expected)  # a copy is its own


def fixed_draws(monkeypatch):
    """Let every branch keep the last samples of a batch, so that the order of draws does not count."""
    real = torch.arange
    monkeypatch.setattr(torch, "randperm", lambda count, device=None: real(count, device=device).flip(0))


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_dropped_paths_drop_whole_samples_of_each_size(monkeypatch, rate):
    fixed_draws(monkeypatch)
    plain, both = networks(rate=rate)
    images, masks = views("three sizes")
    (parts, grads), (packed_parts, packed_grads) = (passed(network, images, masks) for network in (plain, both))
    torch.testing.assert_close(packed_parts, parts, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(packed_grads, grads, rtol=1e-9, atol=1e-10)
    for network in (plain, both):
        network.eval()
    torch.testing.assert_close(both(images, masks), plain(images, masks), rtol=1e-9, atol=1e-10)


def test_dropped_paths_are_drawn_anew_and_compute_the_kept_samples_only():
    _, both = networks(rate=0.5)
    images, masks = views()
    seen = []
    for block in both.backbone.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    first, second = both(images, masks)[0], both(images, masks)[0]
    assert seen == [2 * 20 + 3 * 8] * 4
    assert not torch.allclose(first[0], second[0])


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_recomputed_activations_and_compiled_blocks_give_the_same_gradients(rate):
    images, masks = views()
    found = []
    wraps = [lambda _: None, lambda net: checkpoint_activations(net.backbone), partial(compile_blocks, backend="eager")]
    for wrap in wraps:
        _, both = networks(rate=rate)
        wrap(both)
        found.append(passed(both, images, masks))
        # a second pass, of another size, before anything is recomputed
        total = both(images, masks)[0][0].sum() + both([images[1][:3], images[0]], None)[0][1].sum()
        total.backward()
        found[-1] += ([p.grad.clone() for p in both.parameters() if p.grad is not None],) if rate == 0 else ()
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-10)


def run_with(attention, model="vit_tiny_patch16_224", args=None, **changes):
    given = {**ARGS, "dynamic_img_size": True} if args is None else args
    backbone = {"model": model, "args": given}
    return RunConfig(
        name="a", method="dinov2", backbone=backbone, head={"hidden": 8, "bottleneck": 4, "prototypes": 8},
        runtime={"attention": attention}, **changes,
    )  # fmt: skip


def with_gpu(monkeypatch, refusal=None):
    """Let this machine pass for one with a GPU, whose kernel is the reference or refuses with `refusal`."""
    real = torch.ones

    def attention(q, k, v, sizes):
        if refusal:
            raise NotImplementedError(refusal)
        return batchwise_attention(q, k, v, sizes)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **kwargs: real(*size, **kwargs))
    monkeypatch.setattr(packed, "xformers_attention", attention)


def test_xformers_is_taken_where_it_works_and_refused_by_name_where_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_kernel("auto", make(), "auto", "key") is None
    assert build_network(make(), run_with("auto")).kernel is None
    with pytest.raises(MadError, match=r"runs\.a\.runtime\.attention .*needs a CUDA GPU.*set it to auto or sdpa"):
        build_network(make(), run_with("xformers"))
    with_gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert choose_kernel("auto", make(), "auto", "key") is None
    with pytest.raises(MadError, match="key: xformers cannot be used: it cannot be imported"):
        choose_kernel("xformers", make(), "auto", "key")
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    assert choose_kernel("sdpa", make(), "auto", "key") is None
    for attention in ("auto", "xformers"):
        kernel = choose_kernel(attention, make(), "auto", "key")
        network = Network(make(), DinoHead(24, 16, 8, 12), kernel=kernel)
        images, _ = views(dtype=torch.float32)
        torch.testing.assert_close(network(images), Network(make(), network.head)(images))
    with_gpu(monkeypatch, refusal="no operator found\nand a long list")
    assert choose_kernel("auto", make(), "auto", "key") is None
    with pytest.raises(MadError, match=r"heads of 8 dimensions in torch.float32 \(no operator found\)"):
        choose_kernel("xformers", make(), "fp32", "key")


@pytest.mark.parametrize(
    ("model", "args", "reason"),
    [
        ("test_efficientnet_gn", {}, "EfficientNet is not one of timm's plain"),
        ("eva02_tiny_patch14_224", {"patch_size": 8, "img_size": 32}, "Eva is not one"),
        ("vit_tiny_patch16_224", {**ARGS, "qk_norm": True}, "gated or normalised"),
        ("vit_tiny_patch16_224", {**ARGS, "attn_drop_rate": 0.1}, "dropout"),
        ("vit_tiny_patch16_224", {**ARGS, "drop_path_rate": 0.1}, "give drop_path of the run instead"),
        ("vit_relpos_small_patch16_224", {"img_size": 32}, "VisionTransformerRelPos is not one"),
    ],
)
def test_backbones_that_cannot_be_packed_are_named(monkeypatch, model, args, reason):
    with_gpu(monkeypatch)
    backbone = timm.create_model(model, **{"num_classes": 0, **args})
    assert choose_kernel("auto", backbone, "auto", "key") is None
    with pytest.raises(MadError, match=reason):
        choose_kernel("xformers", backbone, "auto", "key")


def test_the_models_of_dinov2_can_be_packed():
    for name in ("vit_small_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2"):
        assert packed.not_plain(timm.create_model(name, depth=1, embed_dim=96, num_heads=6, img_size=28)) is None


def test_the_mask_that_xformers_gets_is_block_diagonal():
    pytest.importorskip("xformers", reason="xformers is not installed")
    sizes = ((2, 3), (1, 4))
    shown = block_diagonal(sizes, torch.device("cpu")).materialize((10, 10))
    image = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    assert torch.equal(shown == 0, image[:, None] == image[None, :])
    q = torch.randn(3, 1, 10, 2, 8)
    torch.testing.assert_close(batchwise_attention(*q, sizes), dense_attention(*q, sizes))


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_XFORMERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_equals_torchs_attention_on_a_gpu(dtype):
    pytest.importorskip("xformers", reason=NO_XFORMERS)
    sizes = ((4, 260), (16, 53), (3, 101))
    total, found = sum(count * length for count, length in sizes), []
    for kernel in (packed.xformers_attention, batchwise_attention):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, total, 6, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
        out = kernel(q, k, v, sizes)
        out.square().sum().backward()
        found.append((out, q.grad, k.grad, v.grad))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_XFORMERS)
@pytest.mark.parametrize("wrap", ["", "checkpointed", "compiled"])
def test_a_network_is_packed_by_xformers_on_a_gpu(wrap):
    pytest.importorskip("xformers", reason=NO_XFORMERS)
    args, found = {**ARGS, "embed_dim": 96, "num_heads": 3, "dynamic_img_size": True}, []
    images = [torch.randn(count, 3, side, side, device="cuda") for count, side in SIZES["two sizes"]]
    for attention in ("sdpa", "xformers"):
        torch.manual_seed(0)
        backbone = timm.create_model("vit_tiny_patch16_224", **args)
        network = build_network(backbone, run_with(attention, precision="bf16")).cuda()
        if wrap == "checkpointed":
            checkpoint_activations(network.backbone)
        elif wrap == "compiled":
            compile_blocks(network)
        with torch.autocast("cuda", torch.bfloat16):
            embeddings, scores = network(images)
        sum(part.float().square().sum() for part in embeddings).backward()
        found.append((embeddings, scores, backbone.patch_embed.proj.weight.grad))
    torch.testing.assert_close(*found, rtol=5e-2, atol=5e-2)
