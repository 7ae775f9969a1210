"""How a distillation is doing: cosines to the teacher on held-out fields, beside what knowing nothing would reach.

A teacher's embeddings are far from spread over the sphere: one constant vector may have a mean cosine of .9 to all of them. Hence
every cosine stands beside that of the best constant answer, and the local one beside that of telling every child the field's mean.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mad.config.distill import DistillConfig
from mad.config.training import RunConfig
from mad.files import MadError
from mad.metrics.rankme import rankme
from mad.models.distill import DistillNetwork
from mad.models.embedding import embed_tiles
from mad.training.fields import is_whole
from mad.training.index import Index
from mad.training.objective import Numerics
from mad.training.pairing import step_of
from mad.training.samples import read_field
from mad.training.teacher import Teacher
from mad.training.tile_reader import TileReader
from mad.training.views import Image

Stored = npt.NDArray[np.float32]

BATCH = 64
LOWEST_RANK = 10.0  # as in mad.training.health


@dataclass(frozen=True)
class FieldSet:
    """Held-out fields without augmentation: what the student sees, uint8 [N, P, P, 3], and the teacher's embeddings [N, K, D].

    `source` is the split they are of, `kind` that of their pairs.
    """

    images: Tensor
    targets: Tensor
    source: str
    kind: str

    @property
    def digest(self) -> str:
        """Of its pixels."""
        return hashlib.sha256(self.images.numpy().data).hexdigest()[:16]


def choose_field_set(
    indexes: dict[str, Index],
    run: RunConfig,
    distill: DistillConfig,
    tile_px: int,
    teacher: Teacher,
) -> FieldSet:
    """The fields with the lowest hash of their parent's id, from the first split of `indexes` that has any.

    Args:
        indexes: by split.
        run: for the number of fields, and the kinds it trains on, of which the finest is taken.
        distill: for what student and teacher see.
        tile_px: side of the tiles.
        teacher: frozen.

    Raises:
        MadError: no split has a parent with all of its children.
    """
    for source, index in indexes.items():
        wanted = [kind for kind in index.pairs if not run.mix or run.mix.get(kind)]
        whole = {kind: np.flatnonzero(is_whole(index.pairs[kind].children, step_of(kind))) for kind in wanted}
        if kinds := [kind for kind in wanted if len(whole[kind])]:
            kind = kinds[-1]
            images, targets = _read_fields(index, kind, whole[kind].tolist(), run, distill, tile_px, teacher)
            return FieldSet(torch.from_numpy(images), torch.from_numpy(targets), source, kind)
    raise MadError("train: no parent with all of its children in split 'val' or 'train' to watch the run's health on")


def _read_fields(
    index: Index, kind: str, places: list[int], run: RunConfig, distill: DistillConfig, tile_px: int, teacher: Teacher
) -> tuple[Image, Stored]:
    """Images [N, P, P, 3] and embeddings [N, K, D] of the fields at `places` whose parents' ids have the lowest hash."""
    pairs, reader, known = index.pairs[kind], TileReader(index, tile_px), teacher.features(index)
    chosen = sorted(places, key=lambda n: hashlib.sha256(reader.tile_id(int(pairs.parents[n])).encode()).digest())
    images: list[Image] = []
    stored: list[Stored] = []

    def shown() -> Iterator[Image]:
        for n in chosen[: run.runtime.health_samples]:
            field, _ = read_field(distill, reader, [pairs.parents[n], *pairs.children[n]], known)
            images.append(field.student)
            if field.features is not None:
                stored.append(field.features)
            yield from field.shown

    if teacher.encoder is None:
        deque(shown(), maxlen=0)
        targets = np.stack(stored)
    else:
        found = embed_tiles(teacher.encoder, shown(), teacher.batch, f"{run.name}: teacher")
        targets = found.reshape(len(images), -1, found.shape[1])
    reader.close()
    return np.stack(images), targets


@torch.no_grad()
def check_fields(network: DistillNetwork, data: FieldSet, numerics: Numerics) -> dict[str, float | None]:
    """Figures of a network on held-out fields; cosines are means over fields.

    - `global_cosine`: of what the network says of the field to the mean of the teacher's embeddings; `global_constant`: of the best
      constant vector to them.
    - `local_cosine`: of what it says of each child to the teacher's embedding; `local_constant`: of the best constant vector;
      `local_field`: of the mean over the field's own children, the best answer that does not tell the places apart.
    - `rankme`, `rankme_teacher`: effective rank of the network's embeddings and of the teacher's means.
    - `feature_std`, `mean_cosine`: of the network's embeddings, as in `check_health`.
    - `fields`: how many there are.
    """
    embeddings, whole, cells = _forward(network, data, numerics)
    targets = data.targets.float()
    means = targets.mean(dim=1)
    unit, count = F.normalize(embeddings, dim=-1), len(embeddings)
    figures: dict[str, float | None] = {}
    if whole is not None:
        figures["global_cosine"] = _cosine(whole, means)
        figures["global_constant"] = _constant(means)
    if cells is not None:
        figures["local_cosine"] = _cosine(cells, targets)
        figures["local_constant"] = _constant(targets.flatten(0, 1))
        figures["local_field"] = _cosine(F.normalize(targets, dim=-1).mean(dim=1, keepdim=True), targets)
    return figures | {
        "rankme": rankme(embeddings.numpy()),
        "rankme_teacher": rankme(means.numpy()),
        "feature_std": float(unit.std(dim=0).mean()) * math.sqrt(unit.shape[1]),
        "mean_cosine": float((unit.sum(dim=0).square().sum() - count) / max(count * (count - 1), 1)),
        "fields": count,
    }


def _cosine(said: Tensor, told: Tensor) -> float:
    return float(F.cosine_similarity(said, told, dim=-1).mean())


def _constant(targets: Tensor) -> float:
    """Mean cosine of targets [N, D] to the vector to which it is largest, the mean of their unit vectors: its length."""
    return float(torch.linalg.vector_norm(F.normalize(targets, dim=-1).mean(dim=0)))


def _forward(
    network: DistillNetwork, data: FieldSet, numerics: Numerics
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Embeddings [N, D], what is said of the fields [N, T] and of their cells [N, K, T], in evaluation mode, fp32 on the CPU."""
    training, step, parts = network.training, step_of(data.kind), []
    network.eval()
    with numerics.autocast():
        for images in data.images.split(BATCH):
            embeddings, whole, cells = network(numerics.images(images[:, None]), [(len(images), step)])
            parts.append([embeddings, whole, cells[0] if cells else None])
    network.train(training)
    return tuple(None if column[0] is None else torch.cat(column).float().cpu() for column in zip(*parts, strict=True))  # type: ignore[return-value]


def find_distill_warnings(health: Mapping[str, float | None]) -> dict[str, str]:
    """What is wrong with a distillation, by name: the cause in numbers, and what to try; of what `health` lacks nothing is said."""
    found = {}
    for term in ("global", "local"):
        cosine, constant = health.get(f"{term}_cosine"), health.get(f"{term}_constant")
        if cosine is not None and constant is not None and cosine <= constant:
            found[f"{term} term learns nothing"] = (
                f"the mean cosine to the teacher is {cosine:.3f}, and one constant vector would reach {constant:.3f}. Try a higher "
                "lr, more steps, ema further from 1 in a short run, or init from trained weights"
            )
    rank, teacher = health.get("rankme"), health.get("rankme_teacher")
    if rank is not None and teacher is not None and rank <= LOWEST_RANK < teacher:
        found["rank collapse"] = (
            f"RankMe is {rank:.1f}, the teacher's is {teacher:.1f}: the embeddings span few directions. Try a lower lr, more "
            "steps, or init from trained weights"
        )
    return found
