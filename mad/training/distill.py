"""Cross-magnification distillation (XMAG, 2025): a student's view of a field against a frozen teacher's embeddings of its children.

With the teacher's embeddings T_k of the K = s² children, the student's embedding z of the coarse tile, and the mean s_k of its
patch tokens in block k of the s x s grid:

    L = -w_g cos(h_g(z), 1/K sum_k T_k)  -  w_l 1/K sum_k cos(h_l(s_k), T_k)

averaged over fields; w_g = 1, w_l = .5. With `teacher_level: coarse` K is 1 and T_1 the teacher's embedding of the coarse tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mad.config.distill import DistillConfig
from mad.config.training import RunConfig
from mad.models.distill import DistillNetwork, Fields
from mad.models.embedding import embed_tiles
from mad.training.batch import Batch, Group
from mad.training.distill_health import FieldSet, check_fields
from mad.training.objective import Numerics
from mad.training.pairing import step_of
from mad.training.teacher import Teacher


@dataclass(frozen=True)
class DistillLoss:
    """`total` is minimised; the others are its parts, unweighted: negative mean cosines, 0 where a term has no weight."""

    total: Tensor
    global_loss: Tensor
    local_loss: Tensor


def distill_loss(
    whole: Tensor | None, cells: list[Tensor], targets: list[Tensor], distill: DistillConfig
) -> DistillLoss:
    """The loss above, in fp32.

    Args:
        whole: h_g(z) of all fields [B, D], part by part; None without a global term.
        cells: h_l(s_k) [B_i, K_i, D] of each part; empty without a local term.
        targets: T_k [B_i, K_i, D] of each part.
        distill: for the weights.
    """
    zero = targets[0].new_zeros(())
    global_loss = local_loss = zero
    if whole is not None:
        wanted = torch.cat([part.float().mean(dim=1) for part in targets])
        global_loss = -F.cosine_similarity(whole.float(), wanted, dim=-1).mean()
    if cells:
        pairs = zip(cells, targets, strict=True)
        per_field = [F.cosine_similarity(said.float(), told.float(), dim=-1).mean(dim=1) for said, told in pairs]
        local_loss = -torch.cat(per_field).mean()
    return DistillLoss(distill.global_weight * global_loss + distill.local_weight * local_loss, global_loss, local_loss)


@dataclass(frozen=True)
class CrossMagnification:
    """The method `xmag`. Without stored embeddings the teacher embeds the tiles of a batch when its loss is asked for."""

    run: RunConfig
    distill: DistillConfig
    numerics: Numerics
    health: FieldSet
    teacher: Teacher

    def teach(self, student: nn.Module, average: nn.Module, batches: list[Batch], step: int) -> list[None]:
        """Nothing: the targets of a field depend on no other."""
        return [None] * len(batches)

    def loss(
        self, network: nn.Module, average: nn.Module, batch: Batch, step: int, targets: None = None
    ) -> DistillLoss:
        """The mean over the fields of this process's share; all processes have as many."""
        images = torch.cat([self.numerics.images(group.student) for group in batch.groups if group.student is not None])
        fields: Fields = [(len(group.teacher), step_of(group.kind)) for group in batch.groups]
        told = [self.targets(group).to(self.numerics.device, non_blocking=True) for group in batch.groups]
        with self.numerics.autocast():
            _, whole, cells = network(images, fields)
        return distill_loss(whole, cells, told, self.distill)

    def targets(self, group: Group) -> Tensor:
        """The teacher's embeddings [B, K, D] of a group: stored ones, or of the images that it holds."""
        if group.features is not None:
            return group.features
        assert self.teacher.encoder is not None
        tiles = group.teacher.flatten(0, 1).numpy()
        found = embed_tiles(self.teacher.encoder, iter(tiles), self.teacher.batch, f"{self.run.name}: teacher")
        return torch.from_numpy(found).unflatten(0, group.teacher.shape[:2])

    def check(self, student: DistillNetwork, average: DistillNetwork, step: int) -> dict[str, float | None]:
        """See `check_fields`; of the moving average, which is exported."""
        return check_fields(average, self.health, self.numerics)


def describe(distill: DistillConfig, kinds: list[str]) -> list[str]:
    """The losses in words, for the model card."""
    children = " or ".join(map(str, sorted({step_of(kind) ** 2 for kind in kinds})))
    told = (
        f"mean embedding of its {children} children"
        if distill.teacher_level == "fine"
        else "embedding of the same tile"
    )
    names, teacher = [], f"the frozen teacher `{distill.teacher}`"
    if distill.global_weight:
        names.append(
            f"minus the cosine of the tile's embedding to the {told} by {teacher}, weight {distill.global_weight:g}"
        )
    if distill.local_weight:
        names.append(
            f"minus the mean cosine of the patch tokens in each child's place to the embedding of that child by {teacher}, weight "
            f"{distill.local_weight:g}"
        )
    source = {"pyramid": "the slide's own level", "resized": "its children put together and shrunk by area"}[
        distill.input
    ]
    seen = "sees them as they are stored" if distill.cache else "sees the same flips and colours"
    return [
        *names,
        f"the student sees {source} ({', '.join(kinds)}), the teacher {seen}; each term through a head of its own",
    ]
