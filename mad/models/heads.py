"""The projection head of DINO and iBOT, and the network (backbone and heads) that student and teacher are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mad.config.training import RunConfig
from mad.models.cells import cell_embeddings
from mad.models.masked import check_maskable, masked_forward, patch_tokens
from mad.models.packed import Kernel, allow_packing, choose_kernel, packed_features
from mad.models.vit import embedding_dim

Cells = tuple[int, Tensor]
"""The first of I images, and the weights [I, S, N] of S parts of each over its N tokens."""


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


class Trainee(nn.Module):
    """What the loop knows of a network that it trains, whatever the method."""

    backbone: nn.Module
    mask_token: nn.Parameter | None

    @property
    def heads(self) -> Sequence[nn.Module]:
        """Everything beside the backbone that has weights of its own."""
        raise NotImplementedError

    @property
    def last_layers(self) -> list[nn.Parameter]:
        """The parameters that wait for `freeze_last_layer`."""
        return []


class Network(Trainee):
    """Backbone and heads; the teacher is the moving average of the student's.

    `mask_token` [1, D] and `patch_head` (None: patches share `head`) are there for masked patches. `centre` [K] and
    `patch_centre` are there under `centring: ema`: the student's are the next step's, the teacher's those in use. With a
    `kernel` batches of several sizes pass through the backbone as one, whose blocks then take packed tokens.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: DinoHead,
        patch_head: DinoHead | None = None,
        *,
        masked: bool = False,
        centred: bool = False,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.patch_head = patch_head
        self.kernel = kernel
        if kernel is not None:
            allow_packing(backbone)
        self.mask_token = nn.Parameter(torch.zeros(1, embedding_dim(backbone))) if masked else None
        if centred:
            self.register_buffer("centre", torch.zeros(len(head.prototypes)))
            if masked:
                self.register_buffer("patch_centre", torch.zeros(len((patch_head or head).prototypes)))

    @property
    def heads(self) -> list[DinoHead]:
        """The image's head, and the patches' own where there is one."""
        return [self.head] + ([self.patch_head] if self.patch_head is not None else [])

    @property
    def last_layers(self) -> list[nn.Parameter]:
        """The prototypes."""
        return [head.prototypes for head in self.heads]

    def forward(
        self, images: list[Tensor], masks: Tensor | None = None, *, hide: bool = True, cells: Cells | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Batches of images [B_s, 3, S_s, S_s], one per size, to embeddings [B_s, D] and scores [B_s, K] of each.

        With `cells` the scores [I * S, K] of parts of the first batch's images follow as one more entry. With `masks` [B_0, N]
        those of the masked patches of the first batch [M, K] come last, image by image; only these pass through the head. `hide`:
        the mask token takes their place (the student's pass); otherwise they are seen (the teacher's). One call per step, so that
        DistributedDataParallel sees every use of a parameter.
        """
        embeddings, features = self._embed(images, masks, self.mask_token if hide else None, cells is not None)
        parts = list(embeddings)
        if cells is not None and features is not None:
            start, weights = cells
            shown = features[start : start + len(weights)]
            parts.append(cell_embeddings(self.backbone, shown, weights))
        patches = None
        if masks is not None and features is not None:
            rows = masks.flatten().nonzero().squeeze(1)  # on the masks' own device: on the CPU nothing waits for a GPU
            tokens = patch_tokens(self.backbone, features).flatten(0, 1)
            patches = tokens[rows.to(tokens.device)]
            parts += [patches] if self.patch_head is None else []
        scores = list(self.head(torch.cat(parts)).split([len(part) for part in parts]))
        return embeddings, scores if patches is None or self.patch_head is None else [*scores, self.patch_head(patches)]

    def _embed(
        self, images: list[Tensor], masks: Tensor | None, token: Tensor | None, keep: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Embeddings [B_s, D] of each batch and, with `masks` or where asked to `keep` them, the features of the first."""
        if self.kernel is not None and len(images) > 1:
            features = packed_features(self.backbone, images, self.kernel, masks, token)
            return [self.backbone.forward_head(part) for part in features], features[0]  # type: ignore[operator]
        if masks is None and not keep:
            return [self.backbone(batch) for batch in images], None
        first, kept = masked_forward(self.backbone, images[0], masks, token)
        return [first, *(self.backbone(batch) for batch in images[1:])], kept


def build_network(backbone: nn.Module, run: RunConfig) -> Network:
    """The network of a run on this backbone, its heads random.

    Raises:
        MadError: the run masks patches and the backbone has none, or it asks for an attention that cannot be had.
    """
    dim, head, ibot = embedding_dim(backbone), run.head, run.ibot
    if ibot.weight:
        check_maskable(backbone, run.backbone.model)
    image_head, patch_head = DinoHead(dim, head.hidden, head.bottleneck, head.prototypes), None
    if ibot.weight and ibot.head == "separate":
        sizes = ibot.hidden or head.hidden, ibot.bottleneck or head.bottleneck, ibot.prototypes or head.prototypes
        patch_head = DinoHead(dim, *sizes)
    kernel = choose_kernel(
        run.runtime.attention, backbone, run.precision, f"runs.{run.name}.runtime.attention ({run.backbone.model})"
    )
    return Network(
        backbone, image_head, patch_head, masked=ibot.weight > 0, centred=run.centring == "ema", kernel=kernel
    )
