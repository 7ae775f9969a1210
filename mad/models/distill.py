"""The student of cross-magnification distillation: a backbone, and heads that speak the teacher's language (XMAG, 2025).

Shape legend: a batch holds B fields of view; a field has K = s² cells, the places of the teacher's tiles, row by row; the
backbone has D dimensions, the teacher T.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mad.config.distill import DistillConfig
from mad.files import MadError
from mad.models.cells import cell_means, feature_grid, token_grid
from mad.models.heads import Trainee
from mad.models.vit import embedding_dim

PATCHES = (7, 8, 14, 16, 28, 32)  # px, of vision transformers
Fields = list[tuple[int, int]]  # (fields, step s) of each part of a batch


class DistillHead(nn.Sequential):
    """Linear, LayerNorm, GELU, Linear: [..., D] to [..., T]. Not to be exported."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out))


class DistillNetwork(Trainee):
    """Backbone and heads; a head that no term of the loss needs is None."""

    def __init__(self, backbone: nn.Module, distill: DistillConfig, dim: int) -> None:
        """`dim`: T."""
        super().__init__()
        self.backbone, self.mask_token = backbone, None
        hidden, tokens = distill.head_hidden or dim, int(backbone.num_features)  # type: ignore[arg-type]
        self.global_head = DistillHead(embedding_dim(backbone), hidden, dim) if distill.global_weight else None
        self.local_head = DistillHead(tokens, hidden, dim) if distill.local_weight else None

    @property
    def heads(self) -> list[nn.Module]:
        """Those that are there."""
        return [head for head in (self.global_head, self.local_head) if head is not None]

    def forward(self, images: Tensor, fields: Fields) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Images [B, 3, P, P] to embeddings [B, D], what they say of the field [B, T], and of its cells, [B_i, K_i, T] per part.

        The second is None and the last empty where no head is there.
        """
        features = self.backbone.forward_features(images)  # type: ignore[operator]
        embeddings = self.backbone.forward_head(features)  # type: ignore[operator]
        whole = None if self.global_head is None else self.global_head(embeddings)
        if self.local_head is None:
            return embeddings, whole, []
        grid = token_grid(self.backbone, features, images.shape[-1])
        parts = grid.split([count for count, _ in fields])
        cells = [cell_means(part, step) for part, (_, step) in zip(parts, fields, strict=True)]
        said = self.local_head(torch.cat([part.flatten(0, 1) for part in cells]))
        sizes = [count * step**2 for count, step in fields]
        shapes = zip(said.split(sizes), fields, strict=True)
        return embeddings, whole, [part.unflatten(0, (count, step**2)) for part, (count, step) in shapes]


def check_cells(backbone: nn.Module, steps: list[int], image_px: int, name: str) -> None:
    """Refuse a backbone whose tokens cannot be told apart by cell.

    Args:
        backbone: the student's.
        steps: s of every kind of sample.
        image_px: side of its images.
        name: the run's, for messages.

    Raises:
        MadError: the side of its token grid is no multiple of s, or it has neither patch tokens nor a feature map.
    """
    kind = type(backbone).__name__
    if (grid := feature_grid(backbone, image_px)) is None:
        raise MadError(
            f"runs.{name}: {kind} has neither patch tokens nor a feature map; set distill.local_weight: 0, or take a vision "
            "transformer"
        )
    rows, columns = grid
    for step in steps:
        if rows % step or columns % step:
            fitting = [patch for patch in PATCHES if image_px % (patch * step) == 0]
            raise MadError(
                f"runs.{name}: {kind} has {rows} x {columns} tokens at {image_px} px, which do not make {step} x {step} equal "
                f"blocks, one per child. Take patches of {' or '.join(map(str, fitting)) or 'another size'} px, by backbone.model "
                "or by patch_size in backbone.args, or set distill.local_weight: 0"
            )
