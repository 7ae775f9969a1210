"""Scores of a confusion matrix against scikit-learn, and the bound that ties mean Dice to mean IoU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import accuracy_score, f1_score, jaccard_score
from sklearn.metrics import confusion_matrix as sklearn_matrix

from mad.metrics.confusion import accuracy, class_dice, class_iou, confusion_matrix, drop_truth, macro

matrices = st.integers(2, 6).flatmap(lambda c: arrays(np.int64, (c, c), elements=st.integers(0, 50)))


def draw(seed: int, num_tiles: int = 300, num_classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, num_classes, num_tiles), generator.integers(0, num_classes, num_tiles)


@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(seed: int) -> None:
    truth, predicted = draw(seed)
    matrix = confusion_matrix(truth, predicted, 5)
    assert (matrix == sklearn_matrix(truth, predicted)).all()
    assert class_iou(matrix) == pytest.approx(jaccard_score(truth, predicted, average=None))
    assert class_dice(matrix) == pytest.approx(f1_score(truth, predicted, average=None))
    assert accuracy(matrix) == pytest.approx(accuracy_score(truth, predicted))
    assert macro(class_iou(matrix)) == pytest.approx(jaccard_score(truth, predicted, average="macro"))


def test_class_absent_from_the_truth_has_no_score_and_no_weight() -> None:
    matrix = confusion_matrix(np.array([0, 0, 1]), np.array([0, 2, 1]), 3)
    assert class_iou(matrix)[:2] == pytest.approx([0.5, 1])
    assert np.isnan(class_iou(matrix)[2]) and np.isnan(class_dice(matrix)[2])
    assert macro(class_iou(matrix)) == pytest.approx(0.75)


def test_no_tiles_give_nan_not_zero() -> None:
    empty = confusion_matrix(np.array([], int), np.array([], int), 3)
    assert np.isnan(accuracy(empty)) and np.isnan(macro(class_iou(empty)))


def test_wrong_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="codes"):
        confusion_matrix(np.array([0, -1]), np.array([0, 1]), 3)
    with pytest.raises(ValueError, match="codes"):
        confusion_matrix(np.array([0, 1]), np.array([0, 3]), 3)
    with pytest.raises(ValueError, match="one length"):
        confusion_matrix(np.array([0, 1]), np.array([0]), 3)


def test_drop_truth_removes_rows_but_keeps_errors() -> None:
    matrix = np.array([[3, 1], [2, 4]])
    kept = drop_truth(matrix, 1)
    assert kept.tolist() == [[3, 1], [0, 0]]
    assert accuracy(kept) == pytest.approx(0.75)
    assert matrix[1].tolist() == [2, 4]
    assert (drop_truth(matrix, None) == matrix).all()


@given(matrices)
def test_mean_dice_is_bounded_by_mean_iou(matrix: np.ndarray) -> None:
    iou, dice = macro(class_iou(matrix)), macro(class_dice(matrix))
    if np.isfinite(iou):
        assert iou - 1e-12 <= dice <= 2 * iou / (1 + iou) + 1e-12


@given(matrices, st.randoms(use_true_random=False))
def test_order_of_classes_does_not_matter(matrix: np.ndarray, random) -> None:
    order = list(range(len(matrix)))
    random.shuffle(order)
    shuffled = matrix[np.ix_(order, order)]
    assert class_iou(shuffled) == pytest.approx(class_iou(matrix)[order], nan_ok=True)
    assert macro(class_dice(shuffled)) == pytest.approx(macro(class_dice(matrix)), nan_ok=True)


def test_batches_equal_single_matrices() -> None:
    stack = np.stack([confusion_matrix(*draw(seed), 5) for seed in range(4)])
    assert class_iou(stack) == pytest.approx(np.stack([class_iou(matrix) for matrix in stack]))
    assert macro(class_dice(stack)) == pytest.approx([float(macro(class_dice(matrix))) for matrix in stack])
