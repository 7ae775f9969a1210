"""Weights into a backbone, strictly: every tensor of the file has its place in the model, and every place is filled.

Read are `.safetensors` and PyTorch files (`weights_only`: nothing in them is executed) under these names:

- timm's own, and so the encoders that this package exports;
- Meta's `DinoVisionTransformer` (Oquab et al. 2023; registers: Darcet et al. 2024), also in chunks of blocks
  (`blocks.0.3.attn…`) and inside a checkpoint of Meta's trainer (`{"teacher": {"backbone.…"}}`, of which the teacher is taken);
- Hugging Face's `Dinov2Model` and `Dinov2WithRegistersModel`, whose query, key and value are fused.

Two things change on the way, both as timm does it. Meta adds a position to the class token, timm's models with registers do
not: there it is added to the token itself. Position embeddings are resampled once, bicubic with antialiasing in fp32, to the
model's grid; so does Meta for its models with registers (those without were published with antialiasing off).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mad.files import MadError, Pathlike
from mad.models.tensors import Tensors, read_tensors, some_names

# What a checkpoint may hold beside its backbone: Meta's heads, classifiers, and what mad.models.heads.Network has.
HEADS = (
    "dino_head",
    "ibot_head",
    "head",
    "classifier",
    "patch_head",
    "centre",
    "patch_centre",
    "global_head",
    "local_head",
)
META = [
    (r"^register_tokens$", "reg_token"),
    (r"^blocks\.\d+\.(\d+)\.(?=norm|attn|ls|mlp)", r"blocks.\1."),  # in a chunk a block keeps its own number
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
]
HUGGING_FACE = [
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    # Of transformers 5 in memory; its saved folders keep the names above.
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
]
FUSED = {  # what timm holds as one tensor
    ".attn.qkv.": (".attn.query.", ".attn.key.", ".attn.value."),
    ".mlp.fc1.": (".mlp.gate_proj.", ".mlp.up_proj."),
}
DINOV2 = {(384, 12): "small", (768, 12): "base", (1024, 24): "large", (1536, 40): "giant"}  # (width, depth)
HEAD_WIDTH = 64  # of an attention head, in all of DINOv2's models


@dataclass(frozen=True)
class Loaded:
    """What a file of weights was, besides what the model now holds."""

    naming: str
    """`timm`, `meta` or `huggingface`."""
    mask_token: Tensor | None
    """[D] fp32, the token in place of masked patches (iBOT), which timm's models have no place for; None if there is none."""
    grid: tuple[int, int] | None
    """Side of the file's square grid of positions and of the model's, in patches, where they were resampled."""
    left_out: tuple[str, ...]
    """Heads in the file, which a backbone does not have."""

    def __str__(self) -> str:
        parts = [f"{self.naming} names"]
        if self.grid:
            parts.append(f"position embeddings resampled from {self.grid[0]} to {self.grid[1]} patches per side")
        if self.left_out:
            parts.append(f"left out: {', '.join(self.left_out)}")
        return ", ".join(parts)


def load_weights(model: nn.Module, path: Pathlike) -> Loaded:
    """Load the weights in the file `path` into `model`, a timm backbone without classifier.

    Raises:
        MadError: the file cannot be read, or it does not fit; the text names what differs and the model that would fit.
    """
    path = Path(path)
    places = model.state_dict()
    naming, tensors = to_timm(read_tensors(path), places)
    left_out = {name for name in tensors.keys() - places.keys() if name.split(".")[0] in HEADS}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    found, wanted = Shape.of(tensors), Shape.of(places)
    if found and wanted and found != wanted:
        raise MadError(
            f"{path}: these weights are of {found.model or 'a ViT'} ({found}); the backbone of this run has {wanted}. "
            f"Set {found.setting}"
        )
    mask_token = tensors.pop("mask_token", None) if "mask_token" not in places else None
    grid = _fit_positions(tensors, model, naming, path)
    _check_fit(tensors, places, path)
    _check_heads(found, model, path)
    model.load_state_dict(tensors, strict=True)
    heads = tuple(sorted({name.split(".")[0] for name in left_out}))
    return Loaded(naming, None if mask_token is None else mask_token.flatten(), grid, heads)


def to_timm(tensors: Tensors, places: Iterable[str] = ()) -> tuple[str, Tensors]:
    """The naming that was found (`timm`, `meta`, `huggingface`) and the tensors under timm's names, heads untouched.

    Names that are all among `places`, a model's own, stay as they are: some of timm's look like those of Meta's chunks.
    """
    if {name for name in tensors if name.split(".")[0] not in HEADS} <= set(places):
        return "timm", tensors
    if any(re.search(r"(^|\.)embeddings\.cls_token$", name) for name in tensors):
        return "huggingface", _fuse(_rename(tensors, HUGGING_FACE))
    renamed = _rename(tensors, META)
    theirs = renamed.keys() != tensors.keys() or ("mask_token" in tensors and not _is_ours(tensors))
    return "meta" if theirs else "timm", renamed


def _is_ours(tensors: Tensors) -> bool:
    """Whether weights with a mask token are of a checkpoint of ours and not Meta's: timm's name of the registers, or a square
    of positions without one of the class token. What is left has the same names and layout in both."""
    positions = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0
    return "reg_token" in tensors or math.isqrt(positions) ** 2 == positions


def _rename(tensors: Tensors, rules: list[tuple[str, str]]) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _fuse(tensors: Tensors) -> Tensors:
    """Each group of `FUSED` as one tensor, biases alike; an incomplete one stays as it is."""
    fused = dict(tensors)
    for name in tensors:
        for whole, parts in FUSED.items():
            group = [name.replace(parts[0], part) for part in parts]
            if parts[0] in name and all(part in tensors for part in group):
                fused[name.replace(parts[0], whole)] = torch.cat([fused.pop(part) for part in group])
    return fused


@dataclass(frozen=True)
class Shape:
    """What tells the models of one family apart, as far as their weights show it."""

    depth: int
    width: int
    patch_px: int
    registers: int
    hidden: int
    """Outputs of the first layer of an MLP: twice its width where it is gated."""
    gated: bool
    """SwiGLU instead of a plain MLP."""

    @classmethod
    def of(cls, tensors: Tensors) -> Shape | None:
        """The shape of a ViT under timm's names; None for other models."""
        blocks = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))]
        try:
            patch, first, second = (
                tensors[f"{name}.weight"].shape for name in ("patch_embed.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")
            )
        except KeyError:
            return None
        registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
        return cls(1 + max(blocks), first[1], patch[-1], registers, first[0], first[0] != second[1])

    def __str__(self) -> str:
        return (
            f"{self.depth} blocks of {self.width}, {'SwiGLU' if self.gated else 'MLP'} of {self.hidden}, patches of "
            f"{self.patch_px} px, {self.registers} registers"
        )

    @property
    def model(self) -> str | None:
        """timm's name of the DINOv2 model with this width, depth and number of registers."""
        size, registers = DINOV2.get((self.width, self.depth)), {0: "", 4: "reg4_"}.get(self.registers)
        name = f"vit_{size}_patch{self.patch_px}_{registers}dinov2"
        return name if size and registers is not None and timm.is_model(name) else None

    @property
    def setting(self) -> str:
        """The configuration that fits."""
        if self.model:
            return f"backbone.model: {self.model}, without args that change its shape"
        mlp_ratio = math.ceil(self.hidden / self.width * 1e5) / 1e5  # timm rounds its product with the width down
        args = (
            f"depth: {self.depth}, embed_dim: {self.width}, patch_size: {self.patch_px}, reg_tokens: {self.registers}"
        )
        family = f"vit_{'giant' if self.gated else 'small'}_patch14_{'reg4_' if self.registers else ''}dinov2"
        return (
            f"backbone.model: {family} (or another ViT with the same blocks) and backbone.args: {{{args}, mlp_ratio: "
            f"{mlp_ratio:g}, num_heads: theirs}}"
        )


def _fit_positions(tensors: Tensors, model: Any, naming: str, path: Path) -> tuple[int, int] | None:
    """Bring `pos_embed` [1, prefix + side², D] to the model's layout and grid, in place; from and to which side, or None.

    Meta's and Hugging Face's has one prefix position, the class token's.
    """
    place = getattr(model, "pos_embed", None)
    if "pos_embed" not in tensors or place is None:
        return None
    position, bare = tensors["pos_embed"], bool(getattr(model, "no_embed_class", False))
    prefix = 0 if bare else int(getattr(model, "num_prefix_tokens", 1))
    if naming != "timm":
        prefix = 0 if bare else 1
        if bare and "cls_token" in tensors:
            tensors["cls_token"] = tensors["cls_token"] + position[:, :1]
            position = position[:, 1:]
    tensors["pos_embed"] = position
    if position.shape == place.shape:
        return None
    side, grid = math.isqrt(max(position.shape[1] - prefix, 0)), tuple(model.patch_embed.grid_size)
    if side**2 + prefix != position.shape[1]:
        raise MadError(f"{path}: {position.shape[1]} position embeddings are no square grid and {prefix} more")
    tensors["pos_embed"] = resample_abs_pos_embed(position, list(grid), [side, side], prefix)
    return side, grid[0]


def _check_fit(tensors: Tensors, places: Tensors, path: Path) -> None:
    missing, unexpected = places.keys() - tensors.keys(), tensors.keys() - places.keys()
    reshaped = [
        f"{name} {list(tensors[name].shape)} for {list(place.shape)}"
        for name, place in places.items()
        if name in tensors and tensors[name].shape != place.shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    told = "; ".join(f"{what}: {some_names(names)}" for what, names in faults.items() if names)
    if not told:
        return
    if "fc_norm.weight" in missing and "norm.weight" in unexpected:
        mend = (
            "With backbone.args: {fc_norm: false} the patch tokens are averaged after the norm that these weights have"
        )
    else:
        mend = "Set the backbone.model and backbone.args that they were made with"
    raise MadError(f"{path} does not fit the backbone of this run; {told}. {mend}")


def _check_heads(shape: Shape | None, model: Any, path: Path) -> None:
    """The number of attention heads leaves no trace in the weights; of DINOv2's models it is known."""
    if shape is None or shape.model is None:
        return
    heads = model.blocks[0].attn.num_heads
    if heads != shape.width // HEAD_WIDTH:
        raise MadError(
            f"{path}: {shape.model} has {shape.width // HEAD_WIDTH} attention heads, the backbone of this run {heads}; "
            "remove num_heads from backbone.args"
        )
