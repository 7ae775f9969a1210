"""Sums of cosines over all pairs against the double loop that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mad.metrics.cosine import aligned_cosines, group_sums, pair_sums, unit


def make(seed: int, num_parents: int = 9, num_children: int = 31, num_groups: int = 4, dim: int = 6):
    generator = np.random.default_rng(seed)
    parents = generator.normal(size=(num_parents, dim)).astype(np.float32)
    children = generator.normal(size=(num_children, dim)).astype(np.float32)
    parent_of = generator.integers(0, num_parents, num_children)
    groups = generator.integers(0, num_groups, num_parents), generator.integers(0, num_groups, num_children)
    return parents, children, parent_of, *groups


def brute(parents, children, parent_of, parent_group, child_group, num_groups):
    """Sums and counts [2 (aligned, other), G, G] by a double loop."""
    sums, counts = np.zeros((2, num_groups, num_groups)), np.zeros((2, num_groups, num_groups), int)
    for i, parent in enumerate(parents.astype(np.float64)):
        for j, child in enumerate(children.astype(np.float64)):
            cosine = parent @ child / np.linalg.norm(parent) / np.linalg.norm(child)
            cell = int(parent_of[j] != i), parent_group[i], child_group[j]
            sums[cell] += cosine
            counts[cell] += 1
    return sums, counts


@given(st.integers(0, 10_000))
def test_equals_the_double_loop(seed: int) -> None:
    data = make(seed)
    sums, counts = brute(*data, 4)
    found = pair_sums(*data, 4, chunk=7)
    assert found.aligned_sum == pytest.approx(sums[0])
    assert found.other_sum == pytest.approx(sums[1])
    assert (found.aligned_count == counts[0]).all()
    assert (found.other_count == counts[1]).all()


def test_centres_are_subtracted_before_the_norm() -> None:
    parents, children, parent_of, *groups = make(3)
    here, there = np.linspace(0, 1, 6), np.linspace(-1, 2, 6)
    found = pair_sums(parents, children, parent_of, *groups, 4, parent_centre=here, child_centre=there)
    sums, _ = brute(parents - here, children - there, parent_of, *groups, 4)
    assert found.other_sum == pytest.approx(sums[1])
    assert found.aligned_sum == pytest.approx(sums[0])


def test_length_of_the_embeddings_does_not_matter() -> None:
    parents, children, parent_of, *groups = make(4)
    scale = np.random.default_rng(0).uniform(0.1, 50, (len(children), 1)).astype(np.float32)
    before = pair_sums(parents, children, parent_of, *groups, 4)
    after = pair_sums(3 * parents, children * scale, parent_of, *groups, 4)
    assert after.other_sum == pytest.approx(before.other_sum, abs=1e-5)


def test_zero_rows_have_cosine_zero() -> None:
    assert unit(np.zeros((2, 3))).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert aligned_cosines(np.zeros((1, 3)), np.ones((2, 3)), np.array([0, 0])).tolist() == [0, 0]


def test_collapsed_embeddings_have_cosine_one_everywhere() -> None:
    parents, children, parent_of, *groups = make(5)
    found = pair_sums(np.full_like(parents, 3), np.full_like(children, 3), parent_of, *groups, 4)
    assert found.other_sum == pytest.approx(found.other_count)
    assert found.aligned_sum == pytest.approx(found.aligned_count)


def test_a_row_that_is_not_finite_is_named() -> None:
    parents, children, parent_of, *groups = make(6)
    children[7, 2] = np.nan
    with pytest.raises(ValueError, match="row 7 holds NaN or infinite"):
        pair_sums(parents, children, parent_of, *groups, 4, chunk=5)


def test_empty_groups_are_zero() -> None:
    assert group_sums(np.ones((3, 2), np.float32), np.array([0, 2, 2]), 4)[[1, 3]].tolist() == [[0, 0], [0, 0]]
