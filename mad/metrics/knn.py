"""Exact k-nearest-neighbour classification by cosine, chunked on both sides (MAD paper, Table 3: k = 20).

Every query is compared with the whole bank, chunk by chunk, with a running top-k. Embeddings that share a direction have cosines
near 1, which float32 cannot tell apart; so with unit vectors b and q and the bank's mean unit vector m,

    cos(b, q) - m . q = (b - m) . (q - m) + (b - m) . m

ranks the bank for a query as the cosine does. The last term, one number per row, is in float64 until it is added. The vote is the
majority of the k neighbours; among classes with equally many votes the one whose nearest member is most similar wins. Several
weightings of the bank (bootstrap samples of its patients) are voted in the same pass over the similarities, and share its top-k:
one that leaves rows out looks at a part of the bank by itself only for the queries where that may matter.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mad.metrics.cosine import unit
from mad.metrics.rows import Features, as_tensor, chunks, refuse_not_finite


def knn_predict(
    bank: Features,
    labels: NDArray,
    queries: Features,
    *,
    k: int = 20,
    num_classes: int,
    copies: NDArray | None = None,
    device: str | torch.device = "cpu",
    query_chunk: int = 4096,
    bank_chunk: int = 8192,
) -> NDArray[np.int64]:
    """Predict the class of each query by its k nearest rows of the bank.

    Args:
        bank: [n, d] float.
        labels: [n] class codes, 0 … num_classes - 1.
        queries: [q, d] float.
        k: neighbours; all of the bank where it holds fewer.
        num_classes: C.
        copies: [r, n] how often each row is in the bank of run r (0 leaves it out); default one run of ones. A row that is
            there m times takes m of the k places.
        device: where similarities are computed; chunks are moved there.
        query_chunk: queries at once.
        bank_chunk: bank rows at once.

    Returns:
        Class codes [r, q].

    Raises:
        ValueError: a run's bank is empty, or a row is not finite.
    """
    num_rows = len(labels)
    given = (
        torch.ones(1, num_rows, dtype=torch.int64) if copies is None else torch.from_numpy(np.asarray(copies, np.int64))
    )
    if not (given.sum(1) > 0).all():
        raise ValueError("k-NN has an empty bank: no row of it has a copy")
    nobody = torch.zeros(len(given), 1, dtype=torch.int64)  # stands where the bank has fewer than k rows
    weights = torch.cat([given, nobody], 1).to(device)
    codes = torch.from_numpy(np.append(np.asarray(labels, np.int64), 0)).to(device)
    there = weights > 0
    mean, along = _common_direction(bank, device, bank_chunk)
    predicted = np.empty((len(weights), len(queries)), np.int64)
    for start in range(0, len(queries), query_chunk):
        rows = slice(start, start + query_chunk)
        block = _unit(queries, rows, device).sub_(mean)
        best = [
            (block.new_full((len(block), k), -torch.inf), codes.new_full((len(block), k), num_rows)) for _ in weights
        ]
        for first in range(0, num_rows, bank_chunk):
            part = slice(first, min(first + bank_chunk, num_rows))
            similarity = torch.addmm(along[part], block, _unit(bank, part, device).sub_(mean).T)
            top = similarity.topk(min(k, similarity.shape[1]), dim=1)
            for run, kept in enumerate(there[:, part]):
                if kept.any():
                    values, columns = _of_run(top, similarity, kept, best[run][0][:, -1])
                    best[run] = _merge(best[run], values, columns + first)
        for run, (values, index) in enumerate(best):
            index = index.where(values > -torch.inf, num_rows)
            predicted[run, rows] = vote(codes[index], weights[run][index], k, num_classes).cpu().numpy()
    return predicted


def vote(neighbour_labels: Tensor, copies: Tensor, k: int, num_classes: int) -> Tensor:
    """Majority class [q] of neighbours sorted by falling similarity.

    Args:
        neighbour_labels: [q, m] class codes, nearest first.
        copies: [q, m] how many of the k places each neighbour takes; 0 for none.
        k: places.
        num_classes: C.
    """
    taken_before = copies.cumsum(1) - copies
    places = copies.minimum((k - taken_before).clamp(min=0))
    votes = torch.zeros(len(places), num_classes, dtype=torch.float64, device=places.device)
    votes.scatter_add_(1, neighbour_labels, places.double())
    # Ties: subtract a share below one vote that grows with the rank of the class's nearest member.
    num_ranks = places.shape[1]
    rank = torch.arange(num_ranks, device=places.device).expand_as(places).masked_fill(places == 0, num_ranks)
    nearest = torch.full_like(votes, num_ranks, dtype=torch.int64).scatter_reduce_(1, neighbour_labels, rank, "amin")
    return (votes - nearest.double() / (num_ranks + 1)).argmax(1)


def _of_run(top: tuple[Tensor, Tensor], similarity: Tensor, kept: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """What one part of the bank adds to a run's neighbours: similarities and columns [q, k], -inf for a row left out.

    Where the k nearest rows of the part are all in the run's bank, or none of the part is nearer than they and the run's k-th
    neighbour so far, they are all that counts; for the other queries the part is gone through without the rows left out.

    Args:
        top: similarities and columns of the k nearest rows of the part, whatever the run [q, k].
        similarity: [q, n].
        kept: [n], the rows that are in the run's bank.
        least: similarity of the run's k-th neighbour so far [q].
    """
    if kept.all():
        return top
    present = kept[top[1]]
    values, columns = top[0].where(present, -torch.inf), top[1].clone()
    again = (~present.all(1) & (least < top[0][:, -1])).nonzero()[:, 0]
    if len(again):
        part = similarity[again].masked_fill_(~kept, -torch.inf)
        values[again], columns[again] = part.topk(values.shape[1], dim=1)
    return values, columns


def _merge(best: tuple[Tensor, Tensor], values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Running top-k (similarity, bank row) [q, k], nearest first, with one more part of the bank."""
    values, order = torch.cat([best[0], values], 1).sort(dim=1, descending=True, stable=True)
    num = best[0].shape[1]
    return values[:, :num], torch.cat([best[1], index], 1).gather(1, order[:, :num])


def _common_direction(bank: Features, device: str | torch.device, chunk: int) -> tuple[Tensor, Tensor]:
    """The mean m [d] of the bank's unit vectors b, and (b - m) . m of each row [n]; float32 on the device.

    Raises:
        ValueError: a row is not finite.
    """
    total = np.zeros(bank.shape[1])
    for rows in chunks(len(bank), chunk):
        total += unit(bank[rows]).sum(0)
    if not np.isfinite(total).all():
        refuse_not_finite(bank)
    mean = total / len(bank)
    along = np.concatenate([unit(bank[rows]) @ mean for rows in chunks(len(bank), chunk)]) - mean @ mean
    return as_tensor(mean).to(device), as_tensor(along).to(device)


def _unit(features: Features, rows: slice, device: str | torch.device) -> Tensor:
    block = as_tensor(features[rows]).to(device)
    norm = torch.linalg.vector_norm(block, dim=1, keepdim=True)
    if not torch.isfinite(norm).all():
        refuse_not_finite(features)
    return block / norm.clamp_(min=1e-12)  # as torch.nn.functional.normalize
