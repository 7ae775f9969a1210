"""Self-supervised losses as pure functions. Everything is computed in fp32, whatever precision the networks ran in.

Shape legend: T teacher views and S student views per sample, B samples, K prototypes, D dimensions, I images of N patches,
M masked patches of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mad.training import ranks


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, temperature: float, iterations: int = 3, *, distributed: bool = False) -> Tensor:
    """Targets [N, K] from the teacher's scores [N, K]: soft assignments that use all prototypes equally.

    (Caron et al. 2020, SwAV, §3.1; DINOv2.) With Q = exp(scores / temperature), repeated `iterations` times:

        Q_nk <- Q_nk / (K sum_n Q_nk)        every prototype gets 1/K
        Q_nk <- Q_nk / (N sum_k Q_nk)        every sample gets 1/N

    and finally N Q, whose rows sum to 1. Computed on log Q: at temperature .01 and scores 1 apart Q itself would
    underflow in fp32. The constant factors K and N cancel and are left out. With `distributed`, sums over n run over the
    samples of all processes.
    """
    log_q = scores.to(torch.float32, copy=True).div_(
        temperature
    )  # in place: K is large, and so are scores of masked patches
    for _ in range(iterations):
        log_q -= _logsumexp_over_samples(log_q, distributed)
        log_q = log_q.log_softmax(dim=1)
    return log_q.exp_()


def _logsumexp_over_samples(values: Tensor, distributed: bool) -> Tensor:
    """log sum_n exp(values[n, k]), [1, K]; n runs over the samples of all processes where `distributed`."""
    # a process may hold no samples, when no image of its share is masked
    peak = values.amax(dim=0, keepdim=True) if len(values) else values.new_full((1, values.shape[1]), -torch.inf)
    if distributed:
        peak = ranks.all_max(peak)
    total = (values - peak).exp_().sum(dim=0, keepdim=True)
    return peak + torch.log(ranks.all_sum(total) if distributed else total)


@torch.no_grad()
def centred_softmax(scores: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Targets [N, K] from the teacher's scores [N, K]: softmax((scores - centre) / temperature) (DINO, Caron et al. 2021, §3.1)."""
    return ((scores.float() - centre) / temperature).softmax(dim=1)


@torch.no_grad()
def update_centre(centre: Tensor, scores: Tensor, momentum: float) -> None:
    """centre [K] <- momentum centre + (1 - momentum) mean_n scores[n], in place (DINO, eq. 4).

    The mean is over the samples of all processes, however they are shared out; without samples the centre stays.
    """
    total = torch.cat([scores.float().sum(dim=0), scores.new_tensor([len(scores)], dtype=torch.float32)])
    total = ranks.all_sum(total)
    centre.copy_(torch.where(total[-1] > 0, centre.lerp(total[:-1] / total[-1].clamp_min(1), 1 - momentum), centre))


def dino_cross_entropy(student: Tensor, targets: Tensor, terms: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of student views against teacher views, one value per sample [B].

        L_b = 1/|terms| sum_{(s, t) in terms} -sum_k targets[b, t, k] log softmax_k(student[b, s, :] / temperature)

    Args:
        student: Scores [B, S, K].
        targets: Teacher probabilities [B, T, K].
        terms: [S, T], which student view answers to which teacher view; numbers are weights, |terms| their sum.
        temperature: Of the student's softmax.
    """
    log_p = F.log_softmax(student.float() / temperature, dim=-1)
    cross = -torch.einsum("bsk,btk->bst", log_p, targets.float())
    return (cross * terms).sum(dim=(1, 2)) / terms.sum()


def patch_cross_entropy(student: Tensor, targets: Tensor, masks: Tensor, temperature: float) -> Tensor:
    """iBOT: mean cross-entropy over the masked patches of each image [I]; 0 for an image without any (Zhou et al. 2022, eq. 2).

        L_i = 1/|masked_i| sum_{n masked in i} -sum_k targets[n, k] log softmax_k(student[n, :] / temperature)

    Args:
        student: Scores [M, K] of the masked patches, image by image, each in order of its patches.
        targets: Teacher probabilities [M, K] of the same patches of the images without a mask.
        masks: Booleans [I, N] with M true ones.
        temperature: Of the student's softmax.
    """
    cross = -(targets.float() * F.log_softmax(student.float() / temperature, dim=-1)).sum(dim=-1)
    counts = masks.sum(dim=1)
    image = torch.repeat_interleave(torch.arange(len(masks), device=counts.device), counts)
    totals = cross.new_zeros(len(masks)).index_add(0, image.to(cross.device), cross)
    return totals / counts.to(cross.device).clamp_min(1)


def pair_terms(children: int, teacher_views: int = 2) -> Tensor:
    """MAD: every child answers to every view of its parent, [children, teacher_views] (paper: 4 x 2 = 8 terms)."""
    return torch.ones(children, teacher_views, dtype=torch.bool)


def multicrop_terms(global_crops: int, local_crops: int) -> Tensor:
    """DINO: every student crop answers to every global crop but itself, [global + local, global] (2 + 16 = 18 terms)."""
    own = torch.eye(global_crops, dtype=torch.bool)
    return torch.cat([~own, torch.ones(local_crops, global_crops, dtype=torch.bool)])


def cell_terms(children: int, parent_views: int = 2) -> Tensor:
    """Every child answers to its own part of every view of its parent: [children, views * children], view by view."""
    return torch.eye(children, dtype=torch.bool).repeat(1, parent_views)


def global_pair_terms(children: int, parent_views: int = 2, weight: float = 1.0) -> Tensor:
    """`mad_global`: MAD's terms, and every view of the parent against the others, [children + views, views] (4 x 2 + 2 = 10).

    `weight` is that of a term between two of the parent's views; a child's are 1.
    """
    return torch.cat([pair_terms(children, parent_views).float(), weight * multicrop_terms(parent_views, 0).float()])


def global_cell_terms(children: int, parent_views: int = 2, weight: float = 1.0) -> Tensor:
    """The same where children answer to parts of the parent: [children + views, views + views * children]."""
    of_children = F.pad(cell_terms(children, parent_views).float(), (parent_views, 0))
    of_parent = F.pad(weight * multicrop_terms(parent_views, 0).float(), (0, parent_views * children))
    return torch.cat([of_children, of_parent])


def koleo(embeddings: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko regulariser: spreads embeddings [B, D] on the sphere (Sablayrolles et al. 2019, eq. 3).

        x_i = e_i / ||e_i||        L = -1/B sum_i log(min_{j != i} ||x_i - x_j|| + epsilon)

    0 for a single embedding, which has no neighbour.
    """
    with torch.autocast(device_type=embeddings.device.type, enabled=False):
        x = F.normalize(embeddings.float(), dim=-1)
        if len(x) < 2:
            return x.sum() * 0.0
        with torch.no_grad():
            similarity = x @ x.T
            similarity.fill_diagonal_(-2.0)
            nearest = similarity.argmax(dim=1)
        # not F.pairwise_distance, which adds its eps to every coordinate; the norm's gradient at 0 is 0
        return -torch.log(torch.linalg.vector_norm(x - x[nearest], dim=-1) + epsilon).mean()


def kde(embeddings: Tensor, kappa: float) -> Tensor:
    """Kernel density regulariser: spreads embeddings [B, D] on the sphere (Virchow2, Zimmermann et al. 2024, §3).

        x_i = e_i / ||e_i||        L = 1/B sum_i log sum_{j != i} exp(kappa x_i . x_j)

    The mean log density under a von Mises-Fisher kernel: minimised, it drives embeddings apart; unlike KoLeo's its gradient is
    bounded where two coincide. 0 for a single embedding.
    """
    with torch.autocast(device_type=embeddings.device.type, enabled=False):
        x = F.normalize(embeddings.float(), dim=-1)
        if len(x) < 2:
            return x.sum() * 0.0
        own = torch.eye(len(x), dtype=torch.bool, device=x.device)
        return (kappa * x @ x.T).masked_fill(own, -torch.inf).logsumexp(dim=1).mean()


def by_position(spread: Callable[[Tensor], Tensor], embeddings: Tensor) -> Tensor:
    """`spread` over samples at each view position of [B, S, D], averaged over the S positions.

    Views of one sample never meet: siblings of one parent, or two crops of one tile, must not repel each other.
    """
    return torch.stack([spread(embeddings[:, s]) for s in range(embeddings.shape[1])]).mean()


@torch.no_grad()
def ema_update(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """teacher <- momentum teacher + (1 - momentum) student, in place, in the tensors' own (fp32) precision."""
    torch._foreach_lerp_(list(teacher), [tensor.detach() for tensor in student], 1.0 - momentum)


def entropy(p: Tensor) -> Tensor:
    """Entropy -sum_k p_k log p_k over the last axis, in nats; 0 log 0 = 0."""
    return -torch.special.xlogy(p, p).sum(dim=-1)
