"""95 % intervals by resampling the test patients, never the tiles: tiles of one patient are no independent evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def patient_draws(num_patients: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """How often each patient is drawn [resamples, num_patients]; every row sums to num_patients."""
    return np.random.default_rng(seed).multinomial(
        num_patients, np.full(num_patients, 1 / num_patients), size=resamples
    )


def patient_intervals(
    statistic: Callable[[Floats], dict[str, Floats]],
    num_patients: int,
    *,
    resamples: int,
    min_patients: int,
    seed: int,
    tested: int | None = None,
) -> dict[str, Any]:
    """Percentile intervals (2.5 %, 97.5 %) of some statistics.

    Args:
        statistic: from weights of the patients [r, P] to named statistics [r]; NaN where a resample leaves one undefined.
        num_patients: P.
        resamples: number of resamples; 0 makes no interval.
        min_patients: under this many patients no interval is given.
        seed: of the resampling.
        tested: how many of the patients have a part in the statistics, where not all do; `min_patients` is of these.

    Returns:
        `{"intervals": {name: [low, high] | None} | None, "reason": text | None, "patients": P, "resamples": r}`.
    """
    reason = None
    tested = num_patients if tested is None else tested
    if tested < min_patients:
        reason = f"{tested} test patient(s), an interval needs {min_patients}"
    elif resamples == 0:
        reason = "evaluate.bootstrap_resamples is 0"
    if reason:
        return {"intervals": None, "reason": reason, "patients": tested, "resamples": 0}
    draws = patient_draws(num_patients, resamples, seed).astype(np.float64)
    intervals = {name: percentiles(values) for name, values in statistic(draws).items()}
    return {"intervals": intervals, "reason": None, "patients": tested, "resamples": resamples}


def percentiles(values: Floats) -> list[float] | None:
    """2.5 % and 97.5 % of the finite values; None where there are none."""
    finite = values[np.isfinite(values)]
    return [float(edge) for edge in np.percentile(finite, [2.5, 97.5])] if len(finite) else None
