"""Exact k-nearest-neighbour classification by cosine, chunked on both sides (MAD paper, Table 3: k = 20).

Rows are L2-normalised in float32; every query is compared with the whole bank, chunk by chunk, with a running top-k. The
vote is the majority of the k neighbours; among classes with equally many votes the one whose nearest member is most similar
wins. Several weightings of the bank (bootstrap samples of its patients) are voted in the same pass over the similarities.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def knn_predict(
    bank: NDArray,
    labels: NDArray,
    queries: NDArray,
    *,
    k: int = 20,
    num_classes: int,
    copies: NDArray | None = None,
    device: str | torch.device = "cpu",
    query_chunk: int = 1024,
    bank_chunk: int = 16384,
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
        ValueError: a run's bank is empty.
    """
    num_rows = len(labels)
    weights = torch.from_numpy(np.ones((1, num_rows), np.int64) if copies is None else np.asarray(copies, np.int64)).to(
        device
    )
    if not (weights.sum(1) > 0).all():
        raise ValueError("k-NN has an empty bank: no row of it has a copy")
    codes = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
    predicted = np.empty((len(weights), len(queries)), np.int64)
    for start in range(0, len(queries), query_chunk):
        rows = slice(start, start + query_chunk)
        block = _unit(queries[rows], device)
        best: list[tuple[Tensor, Tensor]] = [
            (block.new_empty(len(block), 0), codes.new_empty(len(block), 0)) for _ in range(len(weights))
        ]
        for first in range(0, num_rows, bank_chunk):
            part = slice(first, first + bank_chunk)
            similarity = block @ _unit(bank[part], device).T
            for run, weight in enumerate(weights):
                best[run] = _merge(best[run], similarity, weight[part], first, k)
        for run, (_, index) in enumerate(best):
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


def _merge(
    best: tuple[Tensor, Tensor], similarity: Tensor, weight: Tensor, first: int, k: int
) -> tuple[Tensor, Tensor]:
    """Running top-k (similarity, bank row) with one more part of the bank, rows without copies left out."""
    kept = weight.nonzero()[:, 0]
    part = similarity if len(kept) == len(weight) else similarity[:, kept]
    top, column = part.topk(min(k, part.shape[1]), dim=1)
    values = torch.cat([best[0], top], 1)
    index = torch.cat([best[1], kept[column] + first], 1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], index.gather(1, order[:, :k])


def _unit(rows: NDArray, device: str | torch.device) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.array(rows, np.float32)).to(device), dim=1)
