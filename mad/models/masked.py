"""Vision transformers with hidden patches and dropped paths: what self-supervised training needs and timm leaves out.

timm's models are hooked, not subclassed: their own `forward_features` and `forward_head` run, so that a pass without a mask
equals `model(images)` to the bit, and nothing of this is left in an exported encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mad.files import MadError


def check_maskable(model: nn.Module, name: str) -> None:
    """Refuse backbones whose patches cannot be hidden one by one.

    Raises:
        MadError: not a vision transformer, or one that drops patches or pools them by attention.
    """
    if not isinstance(model, VisionTransformer | Eva):
        raise MadError(
            f"ibot: {name} ({type(model).__name__}) has no patch tokens to mask; set ibot.weight: 0, or take a vision "
            "transformer such as vit_small_patch14_reg4_dinov2"
        )
    if not isinstance(getattr(model, "patch_drop", None) or nn.Identity(), nn.Identity):
        raise MadError(
            f"ibot: {name} drops patches (patch_drop_rate), so masked ones would be lost; take it off backbone.args"
        )


def patch_grid(model: nn.Module, image_px: int) -> tuple[int, int]:
    """Rows and columns of patch tokens of a square image."""
    embed: Any = model.patch_embed
    height, width = embed.dynamic_feat_size((image_px, image_px))
    return int(height), int(width)


def masked_forward(
    model: nn.Module, images: Tensor, masks: Tensor | None = None, token: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, D] and features [B, prefix + N, D] of images [B, 3, H, W] (iBOT, Zhou et al. 2022, §3.1; DINOv2).

    Where `masks` [B, N] is true, `token` [1, D] takes the place of the patch's embedding before positions are added, so a
    hidden patch still tells where it is, and nothing of its pixels reaches any token.
    """
    with hidden_patches(model, masks, token):
        features = model.forward_features(images)  # type: ignore[operator]
    return model.forward_head(features), features  # type: ignore[operator]


@contextmanager
def hidden_patches(model: nn.Module, masks: Tensor | None, token: Tensor | None) -> Iterator[None]:
    """Within, `model` embeds the patches where `masks` [B, N] is true as `token` [1, D]; without either nothing changes."""
    if masks is None or token is None:
        yield
        return

    def hide(_module: nn.Module, _inputs: Any, patches: Tensor) -> Tensor:  # [B, N, D] or [B, H, W, D]
        hidden = masks.to(patches.device).view(*patches.shape[:-1], 1)
        return torch.where(hidden, token.to(patches.dtype), patches)

    handle = model.patch_embed.register_forward_hook(hide)  # type: ignore[union-attr, operator]
    try:
        yield
    finally:
        handle.remove()


def patch_tokens(model: nn.Module, features: Tensor) -> Tensor:
    """Patch tokens [B, N, D] of `features` [B, prefix + N, D], normalised as the embedding is.

    That is by the model's last norm, or under average pooling by the norm behind the pooling.
    """
    return model.fc_norm(features[:, model.num_prefix_tokens :])  # type: ignore[operator, misc, no-any-return]


def drop_paths(model: nn.Module, rate: float, name: str) -> None:
    """Give every block of a ViT batch-subset stochastic depth with the same `rate` (DINOv2, `layers/block.py`).

    In training each residual branch is computed for max(1, (1 - rate) B) samples drawn at random and added to these alone,
    scaled by B / kept: its expectation is that of the full branch, and the rest costs nothing.

    Raises:
        MadError: the blocks are not timm's plain pre-norm ones, or drop paths already.
    """
    blocks = list(getattr(model, "blocks", []))
    if not blocks or any(type(block) is not Block for block in blocks):
        raise MadError(
            f"drop_path: {name} has no plain transformer blocks; set drop_path: 0, or give backbone.args its own rate"
        )
    for block in blocks:
        for norm, path in (("norm1", "drop_path1"), ("norm2", "drop_path2")):
            if not isinstance(getattr(block, path), nn.Identity):
                raise MadError("drop_path: backbone.args has a drop_path_rate too; give one of them")
            subset = BatchSubset(rate)
            getattr(block, norm).register_forward_pre_hook(subset.choose)
            setattr(block, path, subset)


class BatchSubset(nn.Module):
    """Stands at both ends of a residual branch: `choose` lets a random part of the batch in, `forward` puts it back in place."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self._kept: Tensor | None = None
        self._batch = 0

    def draw(self, count: int, device: torch.device) -> Tensor:
        """Which of `count` samples go through the branch, in random order."""
        return torch.randperm(count, device=device)[: max(1, int(count * (1 - self.rate)))]

    def choose(self, _module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Pre-hook of the branch's first module: x [B, L, D] to the rows that are kept."""
        if not self.training:
            return inputs
        (x,) = inputs
        self._batch = len(x)
        self._kept = self.draw(len(x), x.device)
        return (x[self._kept],)

    def forward(self, residual: Tensor) -> Tensor:
        """The branch's output [kept, L, D] as [B, L, D], scaled by B / kept; 0 for samples that were dropped."""
        if not self.training or self._kept is None:
            return residual
        kept, self._kept = self._kept, None
        out = residual.new_zeros(self._batch, *residual.shape[1:])
        return out.index_copy(0, kept, residual * (self._batch / len(kept)))

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rate={self.rate:g}"
