"""Published weights: an independent forward pass of Meta's DINOv2 gives what the timm model with its weights gives."""

import math
import re

import fakes
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch.nn import functional as F

from mad.config.training import BackboneConfig, RunConfig
from mad.files import MadError
from mad.models import weights
from mad.models.export import export_encoder
from mad.models.heads import build_network
from mad.models.vit import build_backbone
from mad.models.weights import load_weights, read_tensors
from mad.training.loop import build_networks

WIDTH, DEPTH, HEADS, PATCH = 48, 2, 3, 14
SMALL = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS}
FAMILIES = {
    "mlp": "vit_small_patch14_reg4_dinov2",
    "swiglu": "vit_giant_patch14_reg4_dinov2",
    "no registers": "vit_small_patch14_dinov2",
}


def backbone(family, image_px, **args):
    torch.manual_seed(1)
    return build_backbone(BackboneConfig(model=FAMILIES[family], args={**SMALL, **args}), image_px).eval()


def meta_weights(family, side=37, seed=0):
    """Random weights under the names and shapes of facebookresearch/dinov2, position embeddings for side x side patches."""
    random = torch.Generator().manual_seed(seed)

    def tensor(*shape, scale=0.1, mean=0.0):
        return mean + scale * torch.randn(shape, generator=random)

    state = {
        "cls_token": tensor(1, 1, WIDTH),
        "pos_embed": tensor(1, 1 + side**2, WIDTH, scale=0.5),
        "mask_token": tensor(1, WIDTH),
        "patch_embed.proj.weight": tensor(WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": tensor(WIDTH),
        "norm.weight": tensor(WIDTH, mean=1),
        "norm.bias": tensor(WIDTH),
    }
    if family != "no registers":
        state["register_tokens"] = tensor(1, 4, WIDTH)
    hidden = 128 if family == "swiglu" else 4 * WIDTH
    first, second = ("w12", "w3") if family == "swiglu" else ("fc1", "fc2")
    for n in range(DEPTH):
        linear = {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            f"mlp.{first}": ((1 + (family == "swiglu")) * hidden, WIDTH),
            f"mlp.{second}": (WIDTH, hidden),
        }
        for name, shape in linear.items():
            state[f"blocks.{n}.{name}.weight"] = tensor(*shape, scale=0.15)
            state[f"blocks.{n}.{name}.bias"] = tensor(shape[0])
        for name in ("norm1", "norm2"):
            state[f"blocks.{n}.{name}.weight"] = tensor(WIDTH, mean=1)
            state[f"blocks.{n}.{name}.bias"] = tensor(WIDTH)
        for name in ("ls1", "ls2"):
            state[f"blocks.{n}.{name}.gamma"] = tensor(WIDTH, mean=0.5)
    return state


def meta_tokens(state, images):
    """The forward pass of Meta's DinoVisionTransformer, written out: normed tokens (class, registers, patches) [B, N, D]."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    first, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    side = math.isqrt(grid.shape[1])
    if (rows, columns) != (side, side):
        grid = grid.reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        grid = grid.permute(0, 2, 3, 1).reshape(1, rows * columns, WIDTH)
    batch = len(x)
    tokens = [(state["cls_token"] + first).expand(batch, -1, -1)]
    if "register_tokens" in state:
        tokens.append(state["register_tokens"].expand(batch, -1, -1))
    x = torch.cat([*tokens, x + grid], dim=1)
    for n in range(DEPTH):
        block = f"blocks.{n}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(batch, -1, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        mixed = (attention @ v).transpose(1, 2).reshape(batch, -1, WIDTH)
        x = x + state[f"{block}.ls1.gamma"] * linear(mixed, f"{block}.attn.proj")
        y = norm(x, f"{block}.norm2")
        if f"{block}.mlp.w12.weight" in state:
            gate, value = linear(y, f"{block}.mlp.w12").chunk(2, dim=-1)
            y = linear(gate * gate.sigmoid() * value, f"{block}.mlp.w3")
        else:
            y = linear(F.gelu(linear(y, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + state[f"{block}.ls2.gamma"] * y
    return norm(x, "norm")


def to_hugging_face(state):
    """Meta's names as transformers' `convert_dinov2_with_registers_to_hf.py` renames them."""
    tokens = {"pos_embed": "position_embeddings", "patch_embed.proj": "patch_embeddings.projection"}
    renamed = {}
    for old, tensor in state.items():
        if not old.startswith(("blocks", "norm")):
            name = next((old.replace(a, b) for a, b in tokens.items() if old.startswith(a)), old)
            renamed[f"embeddings.{name}"] = tensor
        elif old.startswith("norm"):
            renamed[f"layer{old}"] = tensor
        elif "attn.qkv" in old:
            prefix, kind = old.replace("blocks", "encoder.layer").split("attn.qkv.")
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{prefix}attention.attention.{part}.{kind}"] = rows.clone()
        else:
            name = old.replace("blocks", "encoder.layer").replace("attn.proj", "attention.output.dense")
            name = name.replace("w12", "weights_in").replace("w3", "weights_out")
            renamed[re.sub(r"ls([12])\.gamma", r"layer_scale\1.lambda1", name)] = tensor
    return renamed


def chunked(state):
    """Meta's names with `block_chunks` of one block each, as its trainer saves them."""
    return {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name): tensor for name, tensor in state.items()}


def assert_same_output(model, state, image_px):
    images = torch.randn(2, 3, image_px, image_px, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = meta_tokens(state, images)
        torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(images), expected[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("image_px", "grid"), [(37 * PATCH, None), (224, (37, 16)), (112, (37, 8))])
def test_metas_weights_give_metas_output(tmp_path, family, image_px, grid):
    state = meta_weights(family)
    torch.save(state, tmp_path / "weights.pth")
    model = backbone(family, image_px)
    loaded = load_weights(model, tmp_path / "weights.pth")
    assert (loaded.naming, loaded.grid, loaded.left_out) == ("meta", grid, ())
    assert torch.equal(loaded.mask_token, state["mask_token"][0])
    assert_same_output(model, state, image_px)


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_faces_names_give_the_same_output(tmp_path, family):
    state = meta_weights(family)
    save_file(to_hugging_face(state), tmp_path / "model.safetensors")
    model = backbone(family, 224)
    loaded = load_weights(model, tmp_path / "model.safetensors")
    assert (loaded.naming, loaded.grid) == ("huggingface", (37, 16))
    assert torch.equal(loaded.mask_token, state["mask_token"][0])
    assert_same_output(model, state, 224)


@pytest.mark.parametrize("kind", ["Dinov2Model", "Dinov2WithRegistersModel"])
@pytest.mark.parametrize("gated", [False, True])
def test_transformers_own_model_agrees(tmp_path, kind, gated):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind.replace("Model", "Config"))(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, patch_size=PATCH, image_size=112,
        use_swiglu_ffn=gated,
    )  # fmt: skip
    theirs = getattr(transformers, kind)(config).eval()
    theirs.save_pretrained(tmp_path)
    family = "swiglu" if gated else "mlp"
    registers = {"reg_tokens": 0, "no_embed_class": False} if kind == "Dinov2Model" else {}
    model = backbone(family, 112, **registers)
    torch.save(theirs.state_dict(), tmp_path / "state.pt")  # from transformers 5 on under other names
    images = torch.randn(2, 3, 112, 112)
    for name in ("model.safetensors", "state.pt"):
        torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight)
        load_weights(model, tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(
                model.forward_features(images), theirs(images).last_hidden_state, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("family", ["mlp", "swiglu"])
def test_agrees_with_timms_own_conversion(tmp_path, family):
    state = meta_weights(family)
    torch.save(state, tmp_path / "weights.pth")
    model, other = backbone(family, 112), backbone(family, 112)
    load_weights(model, tmp_path / "weights.pth")
    other.load_state_dict(checkpoint_filter_fn(dict(state), other))
    ours, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_training_checkpoint_gives_its_teacher(tmp_path):
    state, student = meta_weights("mlp"), meta_weights("mlp", seed=9)
    head = {"dino_head.mlp.0.weight": torch.ones(2, 2), "ibot_head.last_layer.weight_v": torch.ones(2)}
    teacher = {f"backbone.{name}": tensor for name, tensor in chunked(state).items()} | head
    checkpoints = {
        "eval": {"teacher": teacher},
        "both": {"student": {f"backbone.{n}": t for n, t in student.items()}, "teacher": teacher, "iteration": 7},
        "full": {
            "model": {f"module.teacher.{n}": t for n, t in teacher.items()}
            | {f"module.student.backbone.{n}": t for n, t in student.items()}
        },
    }
    for name, content in checkpoints.items():
        torch.save(content, tmp_path / f"{name}.pth")
        model = backbone("mlp", 112)
        loaded = load_weights(model, tmp_path / f"{name}.pth")
        assert loaded.left_out == ("dino_head", "ibot_head")
        assert "left out: dino_head, ibot_head" in str(loaded)
        assert_same_output(model, state, 112)


def test_a_folder_of_ours_continues_at_another_size(tmp_path):
    torch.save(meta_weights("mlp", side=16), tmp_path / "weights.pth")
    first = backbone("mlp", 224)
    load_weights(first, tmp_path / "weights.pth")
    export_encoder(first, tmp_path / "encoder", image_px=224, card="card", provenance={})
    same, smaller = backbone("mlp", 224), backbone("mlp", 112)
    loaded = load_weights(same, tmp_path / "encoder" / "model.safetensors")
    assert (loaded.naming, loaded.grid, loaded.mask_token) == ("timm", None, None)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), same.state_dict().values(), strict=True))
    assert load_weights(smaller, tmp_path / "encoder" / "model.safetensors").grid == (16, 8)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, img_size=112).eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(smaller(images), theirs(images))


@pytest.mark.parametrize("ibot", [0, 1])
@pytest.mark.parametrize("image_px", [56, 112])
@pytest.mark.parametrize(
    ("model", "args"),
    [
        ("vit_small_patch14_reg4_dinov2", {}),  # the paper's layout: registers, no position of the class token
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_dinov2", {"no_embed_class": True}),
        ("vit_small_patch16_224", {"patch_size": 14, "reg_tokens": 4}),  # positions of class token and registers
    ],
)
def test_checkpoints_of_ours_continue(tmp_path, model, args, image_px, ibot):
    """Theirs is a mask token as Meta's, under names that Meta's models share where there are no registers."""
    network = {"model": model, "args": {"depth": 1, "embed_dim": 24, "num_heads": 3, **args}}
    run = RunConfig(**fakes.tiny_run(method="mad_global", backbone=network, ibot={"weight": ibot, "head": "shared"}))
    _, teacher = build_networks(run, 112, 0)
    torch.save({"teacher": teacher.state_dict(), "optimiser": {}}, tmp_path / "step.pt")
    built = build_backbone(run.backbone, image_px)
    loaded = load_weights(built, tmp_path / "step.pt")
    assert (loaded.mask_token is not None) == bool(ibot) and loaded.grid == (None if image_px == 112 else (8, 4))
    with torch.no_grad():
        images = torch.randn(2, 3, image_px, image_px)
        theirs = timm.create_model(
            model, num_classes=0, img_size=112, dynamic_img_size=True, global_pool="token", **run.backbone.args
        ).eval()
        theirs.load_state_dict({name: value for name, value in teacher.backbone.state_dict().items()})
        assert torch.allclose(built.eval()(images), theirs(images), atol=1e-5)


def test_half_precision_is_read_as_fp32(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in meta_weights("mlp").items()}
    torch.save(state, tmp_path / "weights.pth")
    model = backbone("mlp", 112)
    load_weights(model, tmp_path / "weights.pth")
    assert_same_output(model, {name: tensor.float() for name, tensor in state.items()}, 112)


def test_other_families_keep_their_names(tmp_path):
    """EfficientNet's `blocks.0.0.…` are stages, not chunks; ConvNeXt's `head.norm` is of the backbone, integers stay."""
    for name in ("test_efficientnet", "test_convnext2"):
        torch.manual_seed(0)
        model, other = (timm.create_model(name, num_classes=0) for _ in range(2))
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        assert load_weights(other, tmp_path / f"{name}.safetensors").naming == "timm"
        pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def drop(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: drop(s, "blocks.1.attn.qkv.bias"), r"missing: blocks\.1\.attn\.qkv\.bias"),
        (lambda s: drop(s, "norm.weight", "norm.bias"), r"missing: norm\.bias, norm\.weight\."),
        (lambda s: {**s, "extra.weight": torch.ones(2)}, r"unexpected: extra\.weight"),
        (lambda s: {**s, **{f"x{n}": torch.ones(1) for n in range(9)}}, r"unexpected: x0, x1, x2, x3 and 5 more"),
        (lambda s: {**s, "norm.bias": torch.ones(5)}, r"of another shape: norm\.bias \[5\] for \[48\]"),
        (lambda s: {**s, "pos_embed": torch.ones(1, 1 + 35, WIDTH)}, "35 position embeddings are no square"),
        (lambda s: drop(s, "register_tokens"), r"0 registers\); the backbone of this run has .* 4 registers"),
        (lambda s: drop(to_hugging_face(s), "encoder.layer.0.attention.attention.key.bias"), r"attn\.query\.bias"),
        (lambda s: {}, "nothing"),
        (lambda s: {"weights": 3}, "holds no dictionary of weights, but weights"),
    ],
)
def test_whatever_does_not_fit_is_named(tmp_path, change, words):
    torch.save(change(meta_weights("mlp")), tmp_path / "weights.pth")
    model = backbone("mlp", 112)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MadError, match=words):
        load_weights(model, tmp_path / "weights.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("vit_large_patch14_reg4_dinov2", "24 blocks of 1024, MLP of 4096"),
        ("vit_base_patch14_dinov2", "12 blocks of 768, MLP of 3072"),
        ("vit_giant_patch14_reg4_dinov2", "40 blocks of 1536, SwiGLU of 8192"),
    ],
)
def test_weights_of_another_model_say_which(monkeypatch, name, blocks):
    with torch.device("meta"):  # shapes without memory
        published = timm.create_model(name).state_dict()
    monkeypatch.setattr(weights, "read_tensors", lambda _: published)
    with pytest.raises(MadError, match=rf"weights are of {name} \({blocks}.*2 blocks of 48.*backbone.model: {name},"):
        load_weights(backbone("mlp", 112), "published.pth")


def test_the_number_of_attention_heads_is_checked_where_it_is_known(tmp_path, monkeypatch):
    monkeypatch.setitem(weights.DINOV2, (WIDTH, DEPTH), "small")
    monkeypatch.setattr(weights, "HEAD_WIDTH", WIDTH // HEADS)
    torch.save(meta_weights("mlp"), tmp_path / "weights.pth")
    load_weights(backbone("mlp", 112), tmp_path / "weights.pth")
    with pytest.raises(MadError, match="has 3 attention heads, the backbone of this run 4"):
        load_weights(backbone("mlp", 112, num_heads=4), tmp_path / "weights.pth")


def test_wrong_depth_width_or_patch_says_what_fits(tmp_path):
    torch.save(meta_weights("swiglu"), tmp_path / "weights.pth")
    fitting = "depth: 2, embed_dim: 48, patch_size: 14, reg_tokens: 4, mlp_ratio: 5.33334"
    for changes in ({"depth": 3}, {"embed_dim": 96}, {"patch_size": 16}, {"mlp_ratio": 4.0}):
        with pytest.raises(MadError, match="2 blocks of 48, SwiGLU of 256.*" + re.escape(fitting)):
            load_weights(backbone("swiglu", 112, **changes), tmp_path / "weights.pth")
    told = {"depth": 2, "embed_dim": 48, "patch_size": 14, "reg_tokens": 4, "mlp_ratio": 5.33334, "num_heads": 3}
    load_weights(backbone("swiglu", 112, **told), tmp_path / "weights.pth")


def test_average_pooling_needs_the_published_norm(tmp_path):
    state = meta_weights("mlp")
    torch.save(state, tmp_path / "weights.pth")
    config = BackboneConfig(model=FAMILIES["mlp"], args=SMALL, pooling="avg")
    with pytest.raises(MadError, match="fc_norm: false"):
        load_weights(build_backbone(config, 112), tmp_path / "weights.pth")
    model = build_backbone(config.model_copy(update={"args": {**SMALL, "fc_norm": False}}), 112).eval()
    load_weights(model, tmp_path / "weights.pth")
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(model(images), meta_tokens(state, images)[:, 5:].mean(1), rtol=1e-5, atol=1e-5)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"teacher": {"cls_token": torch.ones(1)}, "args": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "cut.safetensors").write_bytes(b"cut short")
    (tmp_path / "empty.bin").touch()
    with pytest.raises(MadError, match="without executing"):
        read_tensors(tmp_path / "bomb.pth")
    assert not (tmp_path / "executed").exists()
    for name in ("cut.pth", "cut.safetensors", "empty.bin"):
        with pytest.raises(MadError, match="no readable weights"):
            read_tensors(tmp_path / name)
    with pytest.raises(MadError, match="no such file"):
        read_tensors(tmp_path / "none.pth")


def test_weights_too_large_for_the_memory_are_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "large.pth"
    torch.save({"weight": torch.zeros(2)}, path)

    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", exhausted)
    with pytest.raises(MadError, match="do not fit into the memory"):
        read_tensors(path)


def test_damaged_files_and_pages_in_place_of_weights_are_told_apart(tmp_path):
    files = {
        "page.bin": (b"<!DOCTYPE html><html>", "is a web page"),
        "pointer.bin": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        "text.bin": (b"hello world, these are no weights", "no readable weights"),
        "text.pth": (b"cos\nsystem\n", "no readable weights"),
    }
    for name, (data, words) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MadError, match=words):
            read_tensors(tmp_path / name)
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(MadError, match="holds no dictionary of weights, but list"):
        read_tensors(tmp_path / "list.pth")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    torch.save({"cls_token": torch.ones(2), "norm.weight": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.pth")
    with pytest.raises(MadError, match="norm.weight hold numbers that are not finite"):
        read_tensors(tmp_path / "nan.pth")


def test_a_model_whose_names_look_like_metas_chunks_keeps_them(tmp_path):
    model = timm.create_model("twins_pcpvt_small", num_classes=0, depths=(1, 1, 1, 1))
    torch.save(model.state_dict(), tmp_path / "twins.pth")
    other = timm.create_model("twins_pcpvt_small", num_classes=0, depths=(1, 1, 1, 1))
    assert load_weights(other, tmp_path / "twins.pth").naming == "timm"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_checkpoint_of_ours_with_all_its_heads_gives_its_teacher(tmp_path):
    vit = {"model": "vit_tiny_patch16_224", "args": {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}}
    run = RunConfig(**fakes.tiny_run(backbone=vit, ibot={"weight": 1}, centring="ema"))
    network = build_network(build_backbone(run.backbone, 32), run)
    student = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    torch.save({"student": student, "teacher": network.state_dict(), "step": 3}, tmp_path / "step_0000003.pt")
    model = build_backbone(run.backbone, 32)
    loaded = load_weights(model, tmp_path / "step_0000003.pt")
    assert set(loaded.left_out) == {"head", "patch_head", "centre", "patch_centre"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, network.backbone.state_dict()[name])


def test_a_safetensors_header_may_begin_like_a_page(tmp_path):
    """Its length, 15,392, is stored as the bytes " <"."""
    path = tmp_path / "model.safetensors"
    for padding in range(15000, 15392):
        save_file({"cls_token": torch.ones(2)}, path, metadata={"text": "x" * padding})
        if path.read_bytes().startswith(b" <"):
            break
    assert path.read_bytes().startswith(b" <")
    assert torch.equal(read_tensors(path)["cls_token"], torch.ones(2))
