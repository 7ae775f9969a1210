"""What a backbone says of a part of an image: means of its tokens, or of its last feature map, over places of the image."""

from __future__ import annotations

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mad.models.masked import patch_grid, patch_tokens


def token_grid(backbone: nn.Module, features: Tensor, image_px: int) -> Tensor:
    """Patch tokens [B, rows, columns, D] of `forward_features`' result; of a network without tokens, its last feature map."""
    if features.ndim == 3:
        return patch_tokens(backbone, features).unflatten(1, patch_grid(backbone, image_px))
    return features if _channels_last(backbone, features) else features.permute(0, 2, 3, 1)


@torch.no_grad()
def feature_grid(backbone: nn.Module, image_px: int) -> tuple[int, int] | None:
    """Rows and columns of `token_grid` for images of this side; None for a backbone that has neither tokens nor a map."""
    if isinstance(backbone, VisionTransformer | Eva):
        return patch_grid(backbone, image_px)
    training = backbone.training
    features = backbone.eval().forward_features(torch.zeros(1, 3, image_px, image_px))  # type: ignore[operator]
    backbone.train(training)
    if features.ndim != 4:
        return None
    rows, columns = token_grid(backbone, features, image_px).shape[1:3]
    return rows, columns


def cell_means(grid: Tensor, step: int) -> Tensor:
    """Means of the tokens [B, rows, columns, D] over each of step x step blocks, row by row: [B, step², D]."""
    return grid.unflatten(2, (step, -1)).unflatten(1, (step, -1)).mean(dim=(2, 4)).flatten(1, 2)


def cell_embeddings(backbone: nn.Module, features: Tensor, weights: Tensor) -> Tensor:
    """Embeddings of S parts of each of B images: what average pooling over a part alone gives, whatever pools the whole.

    Args:
        backbone: timm's.
        features: of its `forward_features`.
        weights: [B, S, N], each part's share of an image's N tokens, row-major; they sum to 1.

    Returns:
        [B * S, D].
    """
    if features.ndim == 3:
        tokens = features[:, backbone.num_prefix_tokens :]  # type: ignore[misc]
        return backbone.fc_norm(weights.to(tokens) @ tokens).flatten(0, 1)  # type: ignore[operator, no-any-return]
    last = _channels_last(backbone, features)
    places = (features if last else features.permute(0, 2, 3, 1)).flatten(1, 2)
    means = (weights.to(places) @ places).flatten(0, 1)
    return backbone.forward_head(means[:, None, None] if last else means[:, :, None, None])  # type: ignore[operator, no-any-return]


def _channels_last(backbone: nn.Module, features: Tensor) -> bool:
    return features.shape[-1] == backbone.num_features and features.shape[1] != backbone.num_features
