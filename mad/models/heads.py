"""The projection head of DINO and the network (backbone and head) that student and teacher are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DinoHead(nn.Module):
    """MLP, L2 norm, cosine to K unit-length prototypes (Caron et al. 2021, §3.1; DINOv2 `layers/dino_head.py`).

        z = MLP(x) / ||MLP(x)||        scores_k = z · w_k / ||w_k||

    The prototypes are the weight-normalised last layer with its gain fixed to 1. The last two steps run in fp32: scores
    are divided by temperatures of .04, which would turn bf16's rounding into noise.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.prototypes, std=bottleneck**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, D] to scores [B, K] in [-1, 1], fp32."""
        z = self.mlp(x)
        with torch.autocast(device_type=z.device.type, enabled=False):
            return F.linear(F.normalize(z.float(), dim=-1), F.normalize(self.prototypes.float(), dim=-1))

    @torch.no_grad()
    def standardise(self, embeddings: Tensor) -> None:
        """Rescale each linear layer so that its outputs have mean 0 and variance 1 on `embeddings` [N, D].

        Data-dependent initialisation (Krähenbühl et al. 2016, arXiv 1511.06856). The embeddings of an untrained backbone
        are nearly parallel; without this step so are all scores, targets are uniform, and short runs never leave ln K.
        """
        x = embeddings.float()
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                y = layer(x)
                scale = y.std(dim=0).clamp_min(1e-6)
                layer.bias.sub_(y.mean(dim=0)).div_(scale)
                layer.weight.div_(scale[:, None])
            x = layer(x)


class Network(nn.Module):
    """Backbone and head; the teacher is the moving average of the student's."""

    def __init__(self, backbone: nn.Module, head: DinoHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Batches of images [B_s, 3, S_s, S_s], one per size, to embeddings [B_s, D] and scores [B_s, K] of each.

        One call per step, so that DistributedDataParallel sees every use of a parameter.
        """
        embeddings = [self.backbone(batch) for batch in images]
        scores = self.head(torch.cat(embeddings)).split([len(part) for part in embeddings])
        return embeddings, list(scores)
