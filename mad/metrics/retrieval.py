"""Retrieval@1 by cosine: does the nearest candidate belong to the query?

Used between a parent and the children of its own slide, where tissue, stain and scanner are shared and only the place tells.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def retrieval_at_1(
    queries: NDArray, candidates: NDArray, query_key: NDArray, candidate_key: NDArray, *, chunk: int = 1024
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Hit rate of the nearest candidate, per query.

    Args:
        queries: [q, d].
        candidates: [c, d], c >= 1.
        query_key: [q]; a candidate belongs to a query that has the same key.
        candidate_key: [c].
        chunk: queries compared at once.

    Returns:
        Hits [q]: 1 or 0, and where m candidates share the largest cosine the share of them that belongs to the query (the
        expectation under random choice: a collapsed encoder scores exactly chance). Chance [q]: share of all candidates that
        belong to the query.
    """
    bank = torch.nn.functional.normalize(torch.from_numpy(np.array(candidates, np.float32)), dim=1)
    keys = torch.from_numpy(np.asarray(candidate_key, np.int64))
    query_keys = torch.from_numpy(np.asarray(query_key, np.int64))
    hits, chance = np.empty(len(query_keys)), np.empty(len(query_keys))
    for start in range(0, len(query_keys), chunk):
        rows = slice(start, start + chunk)
        block = torch.nn.functional.normalize(torch.from_numpy(np.array(queries[rows], np.float32)), dim=1)
        similarity = block @ bank.T
        nearest = similarity == similarity.max(dim=1, keepdim=True).values
        own = query_keys[rows, None] == keys[None, :]
        hits[rows] = ((nearest & own).sum(1) / nearest.sum(1)).numpy()
        chance[rows] = own.double().mean(1).numpy()
    return hits, chance
