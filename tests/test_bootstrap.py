"""Percentile intervals over patients: equal to numpy on repeated patients, none under the least number of them."""

from __future__ import annotations

import numpy as np
import pytest

from mad.evaluation.bootstrap import patient_draws, patient_intervals


def test_equals_resampling_the_values_themselves() -> None:
    values = np.random.default_rng(0).normal(size=7)
    found = patient_intervals(
        lambda weights: {"mean": weights @ values / weights.sum(1)}, 7, resamples=300, min_patients=5, seed=3
    )
    draws = patient_draws(7, 300, 3)
    means = [np.repeat(values, counts).mean() for counts in draws]
    assert (draws.sum(1) == 7).all()
    assert found["intervals"]["mean"] == pytest.approx(np.percentile(means, [2.5, 97.5]))
    assert found["patients"] == 7 and found["resamples"] == 300 and found["reason"] is None


def test_undefined_resamples_are_left_out_and_nothing_defined_is_none() -> None:
    found = patient_intervals(
        lambda weights: {
            "some": np.where(weights[:, 0] > 0, 1.0, np.nan),
            "none": np.full(len(weights), np.nan),
        },
        5, resamples=50, min_patients=5, seed=0,
    )  # fmt: skip
    assert found["intervals"] == {"some": [1.0, 1.0], "none": None}


@pytest.mark.parametrize(
    ("patients", "tested", "resamples", "reason"),
    [
        (4, None, 10, "4 test patient(s), an interval needs 5"),
        (6, 3, 10, "3 test patient(s), an interval needs 5"),
        (6, None, 0, "evaluate.bootstrap_resamples is 0"),
    ],
)
def test_no_interval_and_why(patients: int, tested: int | None, resamples: int, reason: str) -> None:
    def never(weights: np.ndarray) -> dict[str, np.ndarray]:
        raise AssertionError("nothing is to be computed")

    found = patient_intervals(never, patients, tested=tested, resamples=resamples, min_patients=5, seed=0)
    assert found["intervals"] is None and found["reason"] == reason and found["patients"] == (tested or patients)
