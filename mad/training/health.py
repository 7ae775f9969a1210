"""Is the run learning or collapsing? Figures on a fixed set of parent-child pairs, without augmentation.

A falling loss does not tell: with a uniform target it stays at ln K, with a collapsed encoder it may still fall. Hence the
entropy of the targets, the use of the prototypes, the rank and spread of the embeddings, and how parents find their children.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mad.files import MadError
from mad.metrics.rankme import rankme
from mad.models.heads import Network
from mad.training.index import Index, TileReader
from mad.training.objective import Numerics
from mad.training.ssl import entropy, sinkhorn_knopp

BATCH = 64
UNIFORM_SHARE = 0.98  # of ln K: a loss above it has learned no assignment
LOWEST_RANK = 10.0


@dataclass(frozen=True)
class HealthSet:
    """Aligned parents and children, uint8 [N, P, P, 3] each, of the finest transition; `source` is the split they are of."""

    parents: Tensor
    children: Tensor
    source: str
    kind: str


def choose_health_set(indexes: dict[str, Index], tile_px: int, samples: int) -> HealthSet:
    """The pairs with the lowest hash of their parent's id, from the first split of `indexes` that has pairs.

    Raises:
        MadError: no split has a pair.
    """
    for source, index in indexes.items():
        if not (kinds := [kind for kind, pairs in index.pairs.items() if len(pairs.parents)]):
            continue
        kind, reader = kinds[-1], TileReader(index, tile_px)
        ranked = sorted(
            (hashlib.sha256(reader.tile_id(parent).encode()).digest(), int(parent), children[children >= 0])
            for parent, children in zip(index.pairs[kind].parents, index.pairs[kind].children, strict=True)
        )[:samples]
        parents = np.stack([reader.read(parent) for _, parent, _ in ranked])
        children = np.stack([reader.read(int(rows[key[0] % len(rows)])) for key, _, rows in ranked])
        reader.close()
        return HealthSet(torch.from_numpy(parents), torch.from_numpy(children), source, kind)
    raise MadError("train: the shards hold no parent-child pair of split 'val' or 'train' to watch the run's health on")


@torch.no_grad()
def check_health(
    student: Network, teacher: Network, data: HealthSet, numerics: Numerics, student_temp: float, teacher_temp: float
) -> dict[str, float]:
    """Health figures; entropies are shares of ln K.

    - `teacher_entropy`, `student_entropy`: of softmax(scores / temperature), mean over images.
    - `target_entropy`: of the Sinkhorn-Knopp targets, mean over images.
    - `prototype_perplexity`: exp of the entropy of how often each prototype is the teacher's first choice, at most K.
    - `rankme`, `feature_std`, `mean_cosine`: of the teacher's embeddings; effective rank; mean over dimensions of the
      standard deviation of unit vectors, times sqrt(D), so that an isotropic set gives 1; mean cosine of distinct images.
    - `pair_cosine_gap`: mean cosine of parent and own child minus that of parent and another parent's child.
    - `retrieval_at_1`: share of parents whose nearest child is their own.
    """
    features, scores = forward(teacher, data, numerics)
    _, student_scores = forward(student, data, numerics)
    prototypes = scores.shape[1]
    count = len(features)
    ln_k = math.log(prototypes)
    used = torch.bincount(scores.argmax(dim=1), minlength=prototypes) / count
    unit = F.normalize(features, dim=-1)
    cosines = unit[: count // 2] @ unit[count // 2 :].T
    pairs = len(cosines)
    own = cosines.diagonal()
    return {
        "teacher_entropy": float(entropy((scores / teacher_temp).softmax(dim=-1)).mean()) / ln_k,
        "student_entropy": float(entropy((student_scores / student_temp).softmax(dim=-1)).mean()) / ln_k,
        "target_entropy": float(entropy(sinkhorn_knopp(scores, teacher_temp)).mean()) / ln_k,
        "prototype_perplexity": float(entropy(used).exp()),
        "rankme": rankme(features.numpy()),
        "feature_std": float(unit.std(dim=0).mean()) * math.sqrt(unit.shape[1]),
        "mean_cosine": float((unit.sum(dim=0).square().sum() - count) / (count * (count - 1))),
        "pair_cosine_gap": float(own.mean() - (cosines.sum() - own.sum()) / max(pairs * (pairs - 1), 1)),
        "retrieval_at_1": float((cosines.argmax(dim=1) == torch.arange(pairs)).float().mean()),
    }


def forward(network: Network, data: HealthSet, numerics: Numerics) -> tuple[Tensor, Tensor]:
    """Embeddings [2 N, D] and scores [2 N, K] in evaluation mode, parents first, fp32 on the CPU."""
    training = network.training
    network.eval()
    parts = []
    with numerics.autocast():
        for images in (data.parents, data.children):
            for batch in images.split(BATCH):
                embeddings, scores = network([numerics.images(batch[:, None])])
                parts.append((embeddings[0].float().cpu(), scores[0].float().cpu()))
    network.train(training)
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def collapse_warnings(loss: float, prototypes: int, rank: float) -> list[str]:
    """Named warnings about a run's end: its cross-entropy `loss` in nats and its RankMe."""
    warnings = []
    if loss > UNIFORM_SHARE * math.log(prototypes):
        warnings.append(
            f"uniform collapse: loss {loss:.3f} is at ln K = {math.log(prototypes):.3f}, nothing was assigned"
        )
    if rank <= LOWEST_RANK:
        warnings.append(
            f"rank collapse: RankMe {rank:.1f} is at most {LOWEST_RANK:g}, the embeddings span few directions"
        )
    return warnings
