"""Images of several sizes through a vision transformer in one pass: all their tokens as one sequence (DINOv2's nested tensors).

Global and local views have different numbers of tokens, so a list of batches costs one pass per size. Everything in a block but
attention treats tokens one by one; here the tokens of all images are laid end to end, [1, T, D], and attention alone is told
where each image begins and ends. timm's blocks stay in place: their `forward` is extended and takes the sizes as an argument,
so that what wraps a block from outside (compilation, recomputed activations, sharded parameters) works as before.

Shape legend: a batch of B images has L tokens each; T sums B L over batches; H heads of d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mad.files import MadError
from mad.models.masked import BatchSubset, hidden_patches

Sizes = tuple[tuple[int, int], ...]  # (images B, tokens of each L) of each batch
Kernel = Callable[[Tensor, Tensor, Tensor, Sizes], Tensor]  # q, k, v [1, T, H, d] and sizes to [1, T, H, d]


def batchwise_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """Torch's own attention, batch by batch: what the kernels for packed tokens must equal; runs on every device."""
    split = [[*part.squeeze(0).split([count * length for count, length in sizes])] for part in (q, k, v)]
    outputs = []
    for size, *parts in zip(sizes, *split, strict=True):
        heads_first = (part.unflatten(0, size).transpose(1, 2) for part in parts)  # [B, H, L, d]
        outputs.append(F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """xformers' attention under a block-diagonal mask: one kernel for all images. It has none for the CPU."""
    if not q.is_cuda:
        return batchwise_attention(q, k, v, sizes)
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=block_diagonal(sizes, q.device))
    return out


@lru_cache(maxsize=32)  # a training has few: with and without dropped paths, per kind of sample
def block_diagonal(sizes: Sizes, device: torch.device) -> Any:
    """xformers' mask under which every image attends to its own tokens."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens([length for count, length in sizes for _ in range(count)], device=device)


def choose_kernel(
    attention: Literal["auto", "sdpa", "xformers"], model: nn.Module, precision: str, where: str
) -> Kernel | None:
    """The kernel that `attention` asks for; None: batches go through `model` one after the other, with timm's attention.

    `auto` takes xformers wherever it works for `model` in this `precision` ("bf16", "fp32", or "auto", which is either).

    Raises:
        MadError: xformers was asked for by the key `where` and cannot work; says why.
    """
    if attention == "sdpa":
        return None
    obstacle = _obstacle(model, precision)
    if obstacle is None:
        return torch.compiler.disable(xformers_attention)  # type: ignore[no-any-return]
    if attention == "xformers":
        raise MadError(f"{where}: xformers cannot be used: {obstacle}; set it to auto or sdpa")
    return None


def _obstacle(model: nn.Module, precision: str) -> str | None:
    """Why xformers' attention cannot be used for `model` on this machine, in words; None where it can."""
    if not torch.cuda.is_available():
        return "it needs a CUDA GPU, and there is none"
    if reason := not_plain(model):
        return reason
    try:
        import xformers.ops  # noqa: F401
    except (ImportError, OSError) as error:
        return f"it cannot be imported ({str(error).splitlines()[0]})"
    attn: Any = model.blocks[0].attn  # type: ignore[union-attr, index]
    wanted = {"bf16": [torch.bfloat16], "fp32": [torch.float32]}
    for dtype in wanted.get(precision, [torch.bfloat16, torch.float32]):
        q, k, v = torch.ones(3, 1, 5, attn.num_heads, attn.head_dim, device="cuda", dtype=dtype, requires_grad=True)
        try:
            xformers_attention(q, k, v, ((1, 3), (2, 1))).sum().backward()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"this GPU refuses it for heads of {attn.head_dim} dimensions in {dtype} ({reason})"
    return None


def not_plain(model: nn.Module) -> str | None:
    """What keeps the tokens of several images from going through `model` as one sequence, in words; None: nothing does."""
    if type(model) is not VisionTransformer:
        return f"{type(model).__name__} is not one of timm's plain vision transformers"
    for block in model.blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            return f"its blocks ({type(block).__name__}, {type(block.attn).__name__}) are not plain ones"
        attn: Any = block.attn
        norms = (attn.q_norm, attn.k_norm, attn.norm)
        if attn.gate is not None or any(type(norm) is not nn.Identity for norm in norms):
            return "its attention is gated or normalised"
        if attn.attn_drop.p:
            return "its attention has dropout"
        if any(type(path) not in (nn.Identity, BatchSubset) for path in (block.drop_path1, block.drop_path2)):
            return "backbone.args drops paths by timm's own rate (give drop_path of the run instead)"
    return None


def allow_packing(model: nn.Module) -> None:
    """Let the blocks of a plain vision transformer take packed tokens too; called as before, they do what they did."""
    for block in model.blocks:  # type: ignore[union-attr]
        block.forward = MethodType(_block_forward, block)  # bound, so that a copy of the model runs its own blocks


def packed_features(
    model: nn.Module, images: list[Tensor], kernel: Kernel, masks: Tensor | None = None, token: Tensor | None = None
) -> list[Tensor]:
    """`model.forward_features` of every batch [B_s, 3, S_s, S_s]: tokens [B_s, L_s, D], prefix tokens first.

    `model` went through `allow_packing`. `masks` and `token` hide patches of the first batch, as in `masked_forward`.
    """
    vit: Any = model
    parts: list[Tensor] = []
    for batch in images:
        with hidden_patches(model, None if parts else masks, token):
            parts.append(vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(batch)))))
    sizes = tuple((part.shape[0], part.shape[1]) for part in parts)
    x = torch.cat([part.flatten(0, 1) for part in parts])[None]
    for block in vit.blocks:
        x = block(x, sizes=sizes, kernel=kernel)
    rows = vit.norm(x)[0].split([count * length for count, length in sizes])
    return [part.unflatten(0, size) for part, size in zip(rows, sizes, strict=True)]


def _block_forward(
    block: Any, x: Tensor, *args: Any, sizes: Sizes | None = None, kernel: Kernel | None = None, **kwargs: Any
) -> Tensor:
    """timm's `Block.forward`; with `sizes`, of packed tokens [1, T, D]."""
    if sizes is None or kernel is None:
        return Block.forward(block, x, *args, **kwargs)

    def attend(part: Tensor, kept: Sizes) -> Tensor:
        attn, normed = block.attn, block.norm1.forward(part)  # .forward: BatchSubset's hook is for batches
        q, k, v = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
        return block.ls1(attn.proj_drop(attn.proj(kernel(q, k, v, kept).flatten(2))))  # type: ignore[no-any-return]

    x = _add(x, sizes, block.drop_path1, attend)
    return _add(x, sizes, block.drop_path2, lambda part, _: block.ls2(block.mlp(block.norm2.forward(part))))


def _add(x: Tensor, sizes: Sizes, path: nn.Module, branch: Callable[[Tensor, Sizes], Tensor]) -> Tensor:
    """x [1, T, D] plus a residual branch; where its path drops samples, that of whole images drawn from each batch."""
    if not (isinstance(path, BatchSubset) and path.training):
        return x + branch(x, sizes)
    rows, scales, kept, start = [], [], [], 0
    for count, length in sizes:
        drawn = path.draw(count, x.device)
        rows.append((start + drawn[:, None] * length + torch.arange(length, device=x.device)).flatten())
        scales.append(x.new_full((len(rows[-1]), 1), count / len(drawn)))
        kept.append((len(drawn), length))
        start += count * length
    index = torch.cat(rows)
    residual = branch(x[:, index], tuple(kept)) * torch.cat(scales)
    return x.index_add(1, index, residual.to(x.dtype))
