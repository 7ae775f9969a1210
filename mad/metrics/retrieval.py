"""Retrieval@k by cosine: is one of the k nearest candidates the query's own?

Used between a parent and the children of its own slide, where tissue, stain and scanner are shared and only the place tells.
Cosines in float32 tell which candidates are the nearest, up to their proven error; queries whose nearest this leaves open are
asked again in float64, of the candidates that come into question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mad.metrics.cosine import unit
from mad.metrics.rows import chunks, refuse_not_finite

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
    vectors = unit(candidates)
    bank = vectors.astype(np.float32).T
    keys, query_keys = (torch.from_numpy(np.asarray(key, np.int64)) for key in (candidate_key, query_key))
    places = [min(k, len(keys)) for k in ks]
    open_below = least_difference(len(bank))
    hits = np.empty((len(ks), len(query_keys)))
    for rows in chunks(len(query_keys), chunk):
        asked = unit(queries[rows])
        cosines = torch.from_numpy(asked.astype(np.float32) @ bank)
        values, nearest = cosines.topk(min(max(places) + 1, len(keys)), dim=1)
        own = keys[nearest] == query_keys[rows, None]
        hits[:, rows] = torch.stack([own[:, :k].any(1) for k in places]).numpy()
        gaps = [values[:, k - 1] - values[:, k] for k in places if k < len(keys)]
        left = (torch.stack(gaps) <= open_below).any(0).nonzero()[:, 0] if gaps else nearest[:0, 0]
        if len(left):
            close = (cosines[left] >= values[left, max(places) - 1, None] - open_below).any(0).nonzero()[:, 0]
            again = query_keys[rows][left], keys[close]
            hits[:, rows.start + left.numpy()] = _exact(asked[left.numpy()], vectors[close.numpy()], *again, places)
    names, sizes = keys.unique(return_counts=True)
    group = torch.searchsorted(names, query_keys).clamp(max=len(names) - 1)
    num_own = torch.where(names[group] == query_keys, sizes[group], 0)
    of = torch.full_like(num_own, len(keys))
    return hits, np.stack([_drawn(num_own, of, torch.full_like(of, k)).numpy() for k in places])


def least_difference(dim: int) -> float:
    """Of two cosines in float32, the difference that still tells nothing of their order.

    A product of unit vectors that are rounded to float32 is off by (d + 2) u / (1 - (d + 2) u) at most, u = 2^-24, in whatever
    order its terms are added (Higham 2002, section 3.1). Twice that, two u more for comparing them, and a tenth for the
    denominator and the rounding of float64.
    """
    return 2.2 * (dim + 4) * 2.0**-24


def _exact(queries: Floats, candidates: Floats, query_keys: Tensor, keys: Tensor, places: list[int]) -> Floats:
    """Hits [len(places), q] of unit vectors in float64, with ties by expectation."""
    # Products of equal vectors with a query differ by their place in the matrix; each vector is multiplied once.
    as_bytes = np.ascontiguousarray(candidates).view(f"V{candidates[0].nbytes}").ravel()
    _, first, column = np.unique(as_bytes, return_index=True, return_inverse=True)
    similarity = (torch.from_numpy(queries) @ torch.from_numpy(candidates[first]).T)[:, torch.from_numpy(column)]
    own = query_keys[:, None] == keys
    nearest = similarity.topk(max(places), dim=1).values
    hits = np.empty((len(places), len(queries)))
    for place, k in enumerate(places):
        last = nearest[:, [k - 1]]
        above, tied = similarity > last, similarity == last
        drawn = _drawn((tied & own).sum(1), tied.sum(1), k - above.sum(1))
        hits[place] = torch.where((above & own).any(1), 1.0, drawn).numpy()
    return hits


def _drawn(own: Tensor, of: Tensor, places: Tensor) -> Tensor:
    """Probability [q] that `places` drawn from `of`, of which some are `own`, hold one of these (hypergeometric)."""
    miss = torch.ones(len(own), dtype=torch.float64)
    for turn in range(int(places.max()) if len(places) else 0):
        left = (of - own - turn).clamp(min=0).double() / (of - turn).clamp(min=1)
        miss *= torch.where(places > turn, left, 1.0)
    return 1 - miss
