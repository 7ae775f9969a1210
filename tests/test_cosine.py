"""Sums of cosines over all pairs against the double loop that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mad.metrics.cosine import aligned_cosines, group_sums, pair_sums, unit

SLIDES, CLASSES = 4, 3


def make(seed: int, num_parents: int = 9, num_children: int = 31, dim: int = 6):
    generator = np.random.default_rng(seed)
    parents = generator.normal(size=(num_parents, dim)).astype(np.float32)
    children = generator.normal(size=(num_children, dim)).astype(np.float32)
    parent_of = generator.integers(0, num_parents, num_children)
    slide = generator.integers(0, SLIDES, num_parents)
    codes = generator.integers(0, CLASSES, num_parents), generator.integers(0, CLASSES, num_children)
    return parents, children, parent_of, (slide, slide[parent_of]), SLIDES, codes, CLASSES


def brute(parents, children, parent_of, slides, num_slides, codes, num_classes):
    """Sums and counts [2 (aligned, other), S, C, S, C] by a double loop."""
    shape = (2, num_slides, num_classes, num_slides, num_classes)
    sums, counts = np.zeros(shape), np.zeros(shape, int)
    for i, parent in enumerate(parents.astype(np.float64)):
        for j, child in enumerate(children.astype(np.float64)):
            cosine = parent @ child / np.linalg.norm(parent) / np.linalg.norm(child)
            cell = int(parent_of[j] != i), slides[0][i], codes[0][i], slides[1][j], codes[1][j]
            sums[cell] += cosine
            counts[cell] += 1
    return sums, counts


def everything(sums):
    """Of all pairs that are not aligned: sum of cosines and number [C, C]."""
    total, count = sums.pooled(np.zeros(SLIDES, int), 1).others()
    return total[0], count[0]


@given(st.integers(0, 10_000))
def test_equals_the_double_loop(seed: int) -> None:
    data = make(seed)
    sums, counts = brute(*data)
    found = pair_sums(*data, chunk=7)
    own = np.arange(SLIDES)
    assert found.aligned_sum == pytest.approx(sums[0][own, :, own])
    assert (found.aligned_count == counts[0][own, :, own]).all()
    of_two = np.array([0, 1, 0, 1])  # slides 0 and 2 of one patient, 1 and 3 of another
    for pooled, mine in ((found, np.eye(SLIDES)), (found.pooled(of_two, 2), np.eye(2)[of_two])):
        total, count = pooled.others()
        assert total == pytest.approx(np.einsum("satb,sg,tg->gab", sums[1], mine, mine))
        assert (count == np.einsum("satb,sg,tg->gab", counts[1], mine, mine)).all()
    total, count = everything(found)
    assert total == pytest.approx(sums[1].sum((0, 2))) and (count == counts[1].sum((0, 2))).all()


def test_centres_are_subtracted_before_the_norm() -> None:
    parents, children, *rest = make(3)
    here, there = np.linspace(0, 1, 6), np.linspace(-1, 2, 6)
    found = pair_sums(parents, children, *rest, centres=(here, there))
    sums, _ = brute(parents - here, children - there, *rest)
    assert everything(found)[0] == pytest.approx(sums[1].sum((0, 2)))
    assert found.aligned_sum.sum() == pytest.approx(sums[0].sum())


def test_length_of_the_embeddings_does_not_matter() -> None:
    parents, children, *rest = make(4)
    scale = np.random.default_rng(0).uniform(0.1, 50, (len(children), 1)).astype(np.float32)
    before, after = pair_sums(parents, children, *rest), pair_sums(3 * parents, children * scale, *rest)
    assert after.others()[0] == pytest.approx(before.others()[0], abs=1e-5)


def test_without_codes_all_is_one_class() -> None:
    parents, children, parent_of, slides, num_slides, *_ = data = make(7)
    found = pair_sums(parents, children, parent_of, slides, num_slides)
    total, count = pair_sums(*data).others()
    assert found.others()[0].ravel() == pytest.approx(total.sum((1, 2)))
    assert (found.others()[1].ravel() == count.sum((1, 2))).all()


def test_a_child_of_another_slide_than_its_parent_is_named() -> None:
    parents, children, parent_of, slides, *rest = make(8)
    slides[1][5] += 1
    with pytest.raises(ValueError, match="child 5 is of another slide than its parent"):
        pair_sums(parents, children, parent_of, slides, *rest)


def test_zero_rows_have_cosine_zero() -> None:
    assert unit(np.zeros((2, 3))).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert aligned_cosines(np.zeros((1, 3)), np.ones((2, 3)), np.array([0, 0])).tolist() == [0, 0]


def test_collapsed_embeddings_have_cosine_one_everywhere() -> None:
    parents, children, *rest = make(5)
    found = pair_sums(np.full_like(parents, 3), np.full_like(children, 3), *rest)
    total, count = everything(found)
    assert total == pytest.approx(count)
    assert found.aligned_sum == pytest.approx(found.aligned_count)


def test_a_row_that_is_not_finite_is_named() -> None:
    parents, children, *rest = make(6)
    children[7, 2] = np.nan
    with pytest.raises(ValueError, match="row 7 holds NaN or infinite"):
        pair_sums(parents, children, *rest, chunk=5)


def test_empty_groups_are_zero() -> None:
    assert group_sums(np.ones((3, 2), np.float32), np.array([0, 2, 2]), 4)[[1, 3]].tolist() == [[0, 0], [0, 0]]
