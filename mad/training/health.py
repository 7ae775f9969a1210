"""Is the run learning or collapsing? Figures on a fixed set of parent-child pairs, without augmentation.

A falling loss does not tell: with a uniform target it stays at ln K, with a collapsed encoder it may still fall. Hence the
entropy of the targets, the use of the prototypes, the rank and spread of the embeddings, how far apart the magnifications
lie, and how parents find their children. `find_warnings` names what is wrong, why, and what to try.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mad.files import MadError
from mad.metrics.confusion import class_dice, confusion_matrix, macro
from mad.metrics.knn import vote
from mad.metrics.rankme import rankme
from mad.models.heads import Network
from mad.progress import log
from mad.training import ranks
from mad.training.index import Index
from mad.training.objective import Numerics
from mad.training.ssl import entropy, sinkhorn_knopp
from mad.training.tile_reader import TileReader

BATCH = 64
KNN_K = 20  # neighbours, as in the MAD paper's Table 3
LEAST_PAIRS = 4  # for a separation: two in each half
UNIFORM_SHARE = 0.98  # of ln K: a loss above it has learned no assignment
LEAST_HELD_OUT = 16  # pairs of a split that others come after
LOWEST_RANK = 10.0  # means and deviations of colour alone reach 2, untrained networks 30 and more
FARTHEST_APART = 3.0  # a threshold midway then errs on 7 % of the tiles; untrained networks lie around 1
CHANCE_HITS = 4  # parents that find their child by chance: one is expected of any N, more than 4 come in 0.4 % of draws


@dataclass(frozen=True)
class HealthSet:
    """Aligned parents and children, uint8 [N, P, P, 3] each, of the finest transition; `source` is the split they are of.

    `tiles` [2 N] names the slide and the id of each tile, parents first, and `labels` [2 N] their classes, where they are known.
    """

    parents: Tensor
    children: Tensor
    source: str
    kind: str
    tiles: Sequence[tuple[str, str]] = ()
    labels: Sequence[str | None] = ()

    @property
    def digest(self) -> str:
        """Of its pixels."""
        found = hashlib.sha256(self.parents.numpy().data)
        found.update(self.children.numpy().data)
        return found.hexdigest()[:16]


def choose_health_set(indexes: dict[str, Index], tile_px: int, samples: int) -> HealthSet:
    """The pairs with the lowest hash of their parent's id, from the first split of `indexes` that has enough of them.

    Enough is what is asked for, or 16: of fewer no rank can be told. The last split with pairs is taken as it is.

    Raises:
        MadError: no split has a pair.
    """
    named = [
        (source, kind) for source, index in indexes.items() for kind, pairs in index.pairs.items() if len(pairs.parents)
    ]
    finest, enough = dict(named), min(samples, LEAST_HELD_OUT)
    for number, (source, kind) in enumerate(finest.items(), start=1):
        index = indexes[source]
        if (count := len(index.pairs[kind].parents)) < enough and number < len(finest):
            if ranks.rank() == 0:
                log(
                    f"health checks: split {source!r} has {count} of {enough} pairs that it takes; the next is looked at"
                )
            continue
        reader = TileReader(index, tile_px)
        ranked = heapq.nsmallest(
            samples,
            (
                (hashlib.sha256(reader.tile_id(parent).encode()).digest(), int(parent), children[children >= 0])
                for parent, children in zip(index.pairs[kind].parents, index.pairs[kind].children, strict=True)
            ),
        )
        rows = [parent for _, parent, _ in ranked] + [int(rows[key[0] % len(rows)]) for key, _, rows in ranked]
        parents, children = torch.from_numpy(np.stack([reader.read(row) for row in rows])).chunk(2)
        reader.close()
        slides = index.rows["slide"].iloc[rows]
        tiles = [(str(slide), reader.tile_id(row)) for slide, row in zip(slides, rows, strict=True)]
        return HealthSet(parents, children, source, kind, tiles)
    raise MadError(
        "train: the shards hold no parent with as many readable children as the run's `children`, in split 'val' or 'train', to "
        "watch the run's health on; lower `children`, or look at the tables of `sample` and `shard`"
    )


@torch.no_grad()
def check_health(
    student: Network, teacher: Network, data: HealthSet, numerics: Numerics, student_temp: float, teacher_temp: float
) -> dict[str, float | None]:
    """Health figures; entropies are shares of ln K, embeddings are the teacher's.

    - `teacher_entropy`, `student_entropy`: of softmax(scores / temperature), mean over images.
    - `target_entropy`: of the Sinkhorn-Knopp targets, mean over images.
    - `prototype_perplexity`: exp of the entropy of how often each prototype is the teacher's first choice, at most K.
    - `rankme`, `rankme_coarse`, `rankme_fine`: effective rank of all embeddings, of the parents' and of the children's.
    - `feature_std`, `mean_cosine`: mean over dimensions of the standard deviation of unit vectors, times sqrt(D), so that an
      isotropic set gives 1; mean cosine of distinct images.
    - `scale_separation`: see there.
    - `pair_cosine_gap`: mean cosine of parent and own child minus that of parent and another parent's child.
    - `retrieval_at_1`: share of the `pairs` parents whose nearest child is their own.
    - `knn_coarse_to_fine`: see `knn_macro_f1`.
    """
    features, scores = forward(teacher, data, numerics)
    _, student_scores = forward(student, data, numerics)
    prototypes = scores.shape[1]
    count, pairs = len(features), len(data.parents)
    ln_k = math.log(prototypes)
    used = torch.bincount(scores.argmax(dim=1), minlength=prototypes) / count
    unit = F.normalize(features, dim=-1)
    cosines = unit[:pairs] @ unit[pairs:].T
    own = cosines.diagonal()
    return {
        "teacher_entropy": float(entropy((scores / teacher_temp).softmax(dim=-1)).mean()) / ln_k,
        "student_entropy": float(entropy((student_scores / student_temp).softmax(dim=-1)).mean()) / ln_k,
        "target_entropy": float(entropy(sinkhorn_knopp(scores, teacher_temp)).mean()) / ln_k,
        "prototype_perplexity": float(entropy(used).exp()),
        "rankme": rankme(features.numpy()),
        "rankme_coarse": rankme(features[:pairs].numpy()),
        "rankme_fine": rankme(features[pairs:].numpy()),
        "feature_std": float(unit.std(dim=0).mean()) * math.sqrt(unit.shape[1]),
        "mean_cosine": float((unit.sum(dim=0).square().sum() - count) / (count * (count - 1))),
        "scale_separation": scale_separation(unit[:pairs], unit[pairs:]),
        "pair_cosine_gap": float(own.mean() - (cosines.sum() - own.sum()) / max(pairs * (pairs - 1), 1)),
        "retrieval_at_1": float((cosines.argmax(dim=1) == torch.arange(pairs)).float().mean()),
        "knn_coarse_to_fine": knn_macro_f1(cosines, data.labels),
        "pairs": pairs,
    }


def scale_separation(coarse: Tensor, fine: Tensor) -> float | None:
    """How far apart two magnifications lie along the line through their means, in standard deviations within one (d').

        u = m_c - m_f        d' = (mean(c . u) - mean(f . u)) / sqrt((var(c . u) + var(f . u)) / 2)

    Of embeddings [N, D] each, row n of both from the same place. The means m that give u are those of every second pair, the
    rest is of the other pairs, and d' the mean over both ways round: 0 is expected where the magnifications are alike, however
    many dimensions there are. With normal spread a threshold midway tells the magnification of a share Phi(d' / 2) of the tiles.
    None where fewer than four pairs are there.
    """
    if len(coarse) < LEAST_PAIRS:
        return None
    c, f = coarse.double(), fine.double()
    halves = slice(0, None, 2), slice(1, None, 2)
    found = []
    for fit, held_out in (halves, halves[::-1]):
        u = F.normalize(c[fit].mean(dim=0) - f[fit].mean(dim=0), dim=0)
        along_c, along_f = c[held_out] @ u, f[held_out] @ u
        within = ((along_c.var() + along_f.var()) / 2).clamp_min(1e-12).sqrt()
        found.append(float((along_c.mean() - along_f.mean()) / within))
    return math.fsum(found) / len(found)


def knn_macro_f1(cosines: Tensor, labels: Sequence[str | None], k: int = KNN_K) -> float | None:
    """Macro F1 of the children's classes, each predicted by the `k` most similar labelled parents of other pairs.

    A child's own parent is never asked: it would give the class away. Parents of the same slide are. Of `cosines` [N, N],
    parents by children, and `labels` [2 N], parents first. None where no child or fewer than two parents have a class.
    """
    classes = sorted({label for label in labels if label is not None})
    codes = torch.tensor([-1 if label is None else classes.index(label) for label in labels], dtype=torch.int64)
    parents, children = codes.chunk(2) if len(codes) else (codes, codes)
    bank, asked = (parents >= 0).nonzero()[:, 0], (children >= 0).nonzero()[:, 0]
    if len(bank) < 2 or not len(asked):
        return None
    similarity = cosines.clone().fill_diagonal_(-math.inf)[bank][:, asked].T  # [asked, bank]
    nearest = similarity.topk(min(k, len(bank) - 1), dim=1).indices
    predicted = vote(parents[bank][nearest], torch.ones_like(nearest), k, len(classes))
    matrix = confusion_matrix(children[asked].numpy(), predicted.numpy(), len(classes))
    return float(macro(class_dice(matrix)))


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


def find_warnings(loss: float, prototypes: int, health: dict[str, float | None]) -> dict[str, str]:
    """What is wrong with a run, by name: the cause in numbers, and what to try.

    Args:
        loss: mean cross-entropy of DINO over recent steps, nats.
        prototypes: K.
        health: of `check_health`; what it lacks warns of nothing.
    """
    found, ln_k = {}, math.log(prototypes)
    if loss > UNIFORM_SHARE * ln_k:
        found["uniform collapse"] = (
            f"the loss is {loss / ln_k:.3f} of ln K, as if every image were given all prototypes alike. Try a lower teacher_temp, "
            "head.standardise: true, fewer prototypes, a higher lr, or init from trained weights"
        )
    pairs = health.get("pairs")
    lowest = LOWEST_RANK if pairs is None else min(LOWEST_RANK, pairs / 2)  # no rank is above 2 x pairs
    if (rank := health.get("rankme")) is not None and rank <= lowest:
        found["rank collapse"] = (
            f"RankMe is {rank:.1f}, at most {lowest:g}: the embeddings span few directions, often stain or slide alone. "
            "Try more koleo, a lower lr, ema nearer to 1, or more photometric.jitter and photometric.stain"
        )
    apart, recall = health.get("scale_separation"), health.get("retrieval_at_1")
    if apart is not None and recall is not None and pairs and apart > FARTHEST_APART and recall * pairs <= CHANCE_HITS:
        found["scale separation"] = (
            f"the magnifications lie {apart:.1f} standard deviations apart (warned of above {FARTHEST_APART:g}) and "
            f"{round(recall * pairs)} of {pairs:g} parents find their child, which chance gives: the encoder tells the scale and "
            "not the place. Try method: mad or mad_global, more weight for pairs in mix, mix_mode: within, or more steps"
        )
    return found
