"""Adjusted mutual information of two partitions from their contingency tables (Vinh, Epps & Bailey 2010), many at once.

Equals scikit-learn's `adjusted_mutual_info_score` with arithmetic averaging; working on tables instead of labels lets a bootstrap
of the patients weigh a table per patient, and a thousand tables cost less than one pass over the labels each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TAIL = 7.0
"""Standard deviations of the hypergeometric distribution that are summed on both sides, and 20 counts more; the rest of it
is below 1e-10."""


def adjusted_mutual_information(tables: NDArray) -> Floats:
    """AMI [t] of contingency tables [t, K, C] of whole numbers; empty rows and columns do not count.

    1 where both partitions are of one part, or both of single tiles; NaN without tiles.
    """
    tables = np.asarray(tables, np.int64)
    total = tables.sum((1, 2))
    rows, columns = tables.sum(2), tables.sum(1)
    share = tables / np.maximum(total, 1)[:, None, None]
    mutual = _plogp(share).sum((1, 2)) - _plogp(share.sum(2)).sum(1) - _plogp(share.sum(1)).sum(1)
    expected = _expected(rows, columns, total)
    mean_entropy = -(_plogp(share.sum(2)).sum(1) + _plogp(share.sum(1)).sum(1)) / 2
    room = mean_entropy - expected
    tiny = np.finfo(np.float64).eps
    found = (mutual - expected) / np.where(room < 0, np.minimum(room, -tiny), np.maximum(room, tiny))
    found[((rows > 0).sum(1) == 1) & ((columns > 0).sum(1) == 1)] = 1.0
    found[(rows <= 1).all(1) & (columns <= 1).all(1)] = 1.0
    found[total == 0] = np.nan
    return found


def _plogp(share: Floats) -> Floats:
    return np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0.0)


def _expected(rows: Ints, columns: Ints, total: Ints) -> Floats:
    """Mutual information [t] expected of random partitions with sums [t, K] and [t, C]: over the cells' hypergeometric counts."""
    expected = np.zeros(len(total))
    factorial = gammaln(np.arange(int(total.max(initial=0)) + 2) + 1.0)  # log n!
    for row in range(rows.shape[1]):
        for column in range(columns.shape[1]):
            for part in np.array_split(np.arange(len(total)), max(1, len(total) // 100)):
                a, b, n = rows[part, row], columns[part, column], total[part]
                expected[part] += _cell(a, b, n, factorial)
    return expected


def _cell(a: Ints, b: Ints, n: Ints, factorial: Floats) -> Floats:
    """sum_k P(k) (k / n) log(n k / (a b)) of the count k of one cell of each table [t]."""
    mean = a * b / np.maximum(n, 1)
    deviation = np.sqrt(mean * (n - a) / np.maximum(n, 1) * (n - b) / np.maximum(n - 1, 1))
    first = np.maximum.reduce([np.ones_like(n), a + b - n, np.floor(mean - TAIL * deviation - 20).astype(np.int64)])
    last = np.minimum.reduce([a, b, np.ceil(mean + TAIL * deviation + 20).astype(np.int64)])
    length = np.maximum(last - first + 1, 0)
    of = np.repeat(np.arange(len(n)), length)
    k = first[of] + np.arange(len(of)) - np.repeat(np.cumsum(length) - length, length)
    fixed = factorial[a] + factorial[b] + factorial[n - a] + factorial[n - b] - factorial[n]
    a, b, n = a[of], b[of], n[of]
    log_p = fixed[of] - factorial[k] - factorial[a - k] - factorial[b - k] - factorial[n - a - b + k]
    value = np.exp(log_p) * k / n * np.log(n * k / (a.astype(np.float64) * b))
    return np.bincount(of, weights=value, minlength=len(length)).astype(np.float64)
