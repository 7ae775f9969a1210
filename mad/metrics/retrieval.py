"""Retrieval@k by cosine: is one of the k nearest candidates the query's own?

Used between a parent and the children of its own slide, where tissue, stain and scanner are shared and only the place tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mad.metrics.cosine import unit
from mad.metrics.rows import refuse_not_finite

Floats = NDArray[np.float64]


def retrieval_at(
    queries: NDArray,
    candidates: NDArray,
    query_key: NDArray,
    candidate_key: NDArray,
    *,
    ks: Sequence[int] = (1, 5),
    chunk: int = 1024,
) -> tuple[Floats, Floats]:
    """Whether one of a query's own candidates is among its k nearest.

    Args:
        queries: [q, d].
        candidates: [c, d], c >= 1.
        query_key: [q]; a candidate belongs to a query that has the same key.
        candidate_key: [c].
        ks: how many of the nearest count as found; all of them where there are fewer.
        chunk: queries compared at once.

    Returns:
        Hits [len(ks), q]: 1 or 0, and where candidates of equal cosine compete for the last places the probability of a hit
        when these are drawn at random (a collapsed encoder scores exactly chance). Chance [len(ks), q]: the probability of a
        hit when all k are drawn at random.

    Raises:
        ValueError: a row is not finite.
    """
    refuse_not_finite(queries)
    refuse_not_finite(candidates)
    # Products of equal vectors with a query differ by their place in the matrix; each vector is multiplied once.
    vectors = unit(candidates)
    _, first, column = np.unique(vectors.view(f"V{vectors[0].nbytes}").ravel(), return_index=True, return_inverse=True)
    bank, places = torch.from_numpy(vectors[first]), torch.from_numpy(column)
    keys = torch.from_numpy(np.asarray(candidate_key, np.int64))
    query_keys = torch.from_numpy(np.asarray(query_key, np.int64))
    hits, chance = np.empty((2, len(ks), len(query_keys)))
    for start in range(0, len(query_keys), chunk):
        rows = slice(start, start + chunk)
        similarity = (torch.from_numpy(unit(queries[rows])) @ bank.T)[:, places]
        own = query_keys[rows, None] == keys[None, :]
        nearest = similarity.topk(min(max(ks), len(keys)), dim=1).values
        for place, k in enumerate(ks):
            last = nearest[:, [min(k, len(keys)) - 1]]
            above, tied = similarity > last, similarity == last
            drawn = _drawn((tied & own).sum(1), tied.sum(1), min(k, len(keys)) - above.sum(1))
            hits[place, rows] = torch.where((above & own).any(1), 1.0, drawn).numpy()
            everything = torch.full((len(similarity),), len(keys))
            chance[place, rows] = _drawn(own.sum(1), everything, torch.full_like(everything, min(k, len(keys)))).numpy()
    return hits, chance


def _drawn(own: Tensor, of: Tensor, places: Tensor) -> Tensor:
    """Probability [q] that `places` drawn from `of`, of which some are `own`, hold one of these (hypergeometric)."""
    miss = torch.ones(len(own), dtype=torch.float64)
    for turn in range(int(places.max()) if len(places) else 0):
        left = (of - own - turn).clamp(min=0).double() / (of - turn).clamp(min=1)
        miss *= torch.where(places > turn, left, 1.0)
    return 1 - miss
