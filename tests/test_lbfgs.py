"""The ask-and-tell minimiser against solutions known in closed form and scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, rosen, rosen_der

from mad.evaluation.lbfgs import Lbfgs


def run(start, function, *, most=500, converged=1e-10, **options):
    """The minimiser after `most` evaluations or once it is done."""
    search = Lbfgs(torch.tensor(start, dtype=torch.float64), **options)
    count = 0
    while not search.done and count < most:
        count += 1
        value, gradient = function(search.point.numpy())
        search.tell(float(value), torch.from_numpy(gradient), converged=bool(np.abs(gradient).max() <= converged))
    return search, count


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_finds_the_minimum_of_a_quadratic(spread: float) -> None:
    generator = np.random.default_rng(0)
    axes, _ = np.linalg.qr(generator.normal(size=(12, 12)))
    matrix, wanted = (axes * np.geomspace(1, spread, 12)) @ axes.T, generator.normal(size=12)
    search, count = run(
        np.zeros(12), lambda x: ((x - wanted) @ matrix @ (x - wanted) / 2, matrix @ (x - wanted)), tolerance=0
    )
    assert search.best.numpy() == pytest.approx(wanted, abs=1e-6)
    assert search.done and count < 300


def test_follows_a_curved_valley_as_scipy_does() -> None:
    start = np.array([-1.2, 1.0, -0.5, 2.0])
    search, _ = run(start, lambda x: (rosen(x), rosen_der(x)), tolerance=0)
    theirs = minimize(rosen, start, jac=rosen_der, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10})
    assert search.best.numpy() == pytest.approx(theirs.x, abs=1e-5)


def test_a_bad_scale_and_values_that_do_not_exist_cost_steps_and_nothing_else() -> None:
    """-log x + 1e4 x, which is infinite or NaN where a first step of one ends."""
    with np.errstate(invalid="ignore", divide="ignore"):
        search, _ = run([1e-3], lambda x: (-np.log(x).sum() + 1e4 * x.sum(), 1e4 - 1 / x), converged=1e-6, tolerance=0)
    assert search.best.numpy() == pytest.approx([1e-4], rel=1e-6)


def test_stops_where_nothing_is_gained() -> None:
    at_the_minimum, count = run(np.zeros(3), lambda x: (x @ x, 2 * x))
    assert at_the_minimum.done and count == 1
    flat, count = run(np.ones(3), lambda x: (1.0, np.full(3, 1e-3)), converged=0)  # a gradient of noise
    assert flat.done and count < 45 and flat.best.tolist() == [1, 1, 1]
