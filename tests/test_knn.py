"""Chunked k-NN against scikit-learn and brute force; ties; copies of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from mad.metrics.knn import knn_predict, vote


def make(seed: int, num_rows: int = 200, num_queries: int = 60, num_classes: int = 4) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_rows)
    bank = generator.normal(size=(num_rows, 8)) + 0.7 * np.eye(8)[labels]
    return bank.astype(np.float32), labels, generator.normal(size=(num_queries, 8)).astype(np.float32)


def brute(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int, num_classes: int) -> list[int]:
    """Majority of the k most similar rows; among equal votes the class met first."""
    similarity = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        bank / np.linalg.norm(bank, axis=1, keepdims=True)
    ).T
    predicted = []
    for row in similarity:
        neighbours = labels[np.argsort(-row)[:k]]
        votes = np.bincount(neighbours, minlength=num_classes)
        predicted.append(next(int(label) for label in neighbours if votes[label] == votes.max()))
    return predicted


@given(st.integers(0, 1000), st.integers(1, 25))
def test_equals_brute_force_with_ties(seed: int, k: int) -> None:
    bank, labels, queries = make(seed)
    found = knn_predict(bank, labels, queries, k=k, num_classes=4, query_chunk=17, bank_chunk=33)
    assert found.tolist() == [brute(bank, labels, queries, k, 4)]


def test_equals_scikit_learn_where_two_classes_cannot_tie() -> None:
    bank, labels, queries = make(0, num_classes=2)
    theirs = KNeighborsClassifier(21, metric="cosine").fit(bank, labels).predict(queries)
    assert (knn_predict(bank, labels, queries, k=21, num_classes=2)[0] == theirs).all()


def test_copies_equal_a_bank_with_repeated_rows() -> None:
    bank, labels, queries = make(1)
    copies = np.random.default_rng(0).integers(0, 4, (3, len(labels)))
    found = knn_predict(bank, labels, queries, k=20, num_classes=4, copies=copies, bank_chunk=70)
    for run, times in enumerate(copies):
        repeated = np.repeat(np.arange(len(labels)), times)
        assert found[run].tolist() == brute(bank[repeated], labels[repeated], queries, 20, 4)


@given(st.integers(0, 1000))
def test_banks_of_whole_patients_equal_banks_of_their_own(seed: int) -> None:
    """Neighbours of one patient, who may be left out or come twice: the parts' first k hold none of the run's."""
    bank, labels, queries = make(seed, num_rows=120, num_queries=20)
    generator = np.random.default_rng(seed)
    patient = np.sort(generator.integers(0, 6, len(labels)))
    bank += 3 * generator.normal(size=(6, 8)).astype(np.float32)[patient]
    copies = generator.multinomial(6, [1 / 6] * 6, size=4)[:, patient]
    copies = copies[copies.sum(1) > 0]
    found = knn_predict(bank, labels, queries, k=7, num_classes=4, copies=copies, query_chunk=9, bank_chunk=25)
    for run, times in enumerate(copies):
        repeated = np.repeat(np.arange(len(labels)), times)
        assert found[run].tolist() == brute(bank[repeated], labels[repeated], queries, 7, 4)


def test_a_class_without_rows_is_never_predicted() -> None:
    bank, labels, queries = make(4)
    kept = labels != 2
    found = knn_predict(bank[kept], labels[kept], queries, num_classes=4)
    assert found.tolist() == [brute(bank[kept], labels[kept], queries, 20, 4)] and 2 not in found


def test_collapsed_embeddings_get_a_class_of_the_bank() -> None:
    found = knn_predict(np.ones((30, 3)), np.full(30, 1), np.ones((4, 3)), num_classes=3, bank_chunk=8)
    assert found.tolist() == [[1, 1, 1, 1]]


def test_rows_that_are_not_finite_are_named() -> None:
    bank, labels, queries = make(5)
    broken = bank.copy()
    broken[77, 1] = np.nan
    with pytest.raises(ValueError, match="row 77 holds NaN"):
        knn_predict(broken, labels, queries, num_classes=4, bank_chunk=50)
    queries[3] = np.inf
    with pytest.raises(ValueError, match="row 3 holds NaN or inf"):
        knn_predict(bank, labels, queries, num_classes=4)


@pytest.mark.parametrize("offset", [100, 1000, 10_000])
def test_neighbours_are_told_apart_under_a_shared_offset(offset: float) -> None:
    """Where float32 cosines are all 1: float64 brute force on the same float32 rows."""
    bank, labels, queries = make(6)
    common = offset * np.random.default_rng(0).normal(size=8)
    bank, queries = (bank + common).astype(np.float32), (queries + common).astype(np.float32)
    expected = brute(bank.astype(np.float64), labels, queries.astype(np.float64), 20, 4)
    found = knn_predict(bank, labels, queries, num_classes=4, query_chunk=17, bank_chunk=33)
    assert (found[0] == expected).mean() >= 0.98


def test_rows_beyond_float32_are_named() -> None:
    bank, labels, queries = make(7)
    for large in (1e25, 1e39):
        broken = bank.astype(np.float64)
        broken[9, 3] = large
        with pytest.raises(ValueError, match="row 9 holds numbers of 1e"):
            knn_predict(broken, labels, queries, num_classes=4)


def test_length_does_not_matter() -> None:
    bank, labels, queries = make(2)
    longer = bank * np.random.default_rng(0).uniform(0.5, 9, (len(bank), 1)).astype(np.float32)
    assert (
        knn_predict(longer, labels, queries, num_classes=4) == knn_predict(bank, labels, queries, num_classes=4)
    ).all()


def test_tie_goes_to_the_nearest_member() -> None:
    neighbours = torch.tensor([[2, 1, 1, 2], [1, 2, 2, 1], [0, 1, 2, 1]])
    assert vote(neighbours, torch.ones_like(neighbours), 4, 3).tolist() == [2, 1, 1]


def test_copies_take_places_and_no_more_than_k() -> None:
    neighbours = torch.tensor([[0, 1, 1, 1]])
    assert vote(neighbours, torch.tensor([[5, 1, 1, 1]]), 4, 2).tolist() == [0]
    assert vote(neighbours, torch.tensor([[1, 1, 1, 1]]), 4, 2).tolist() == [1]
    assert vote(neighbours, torch.tensor([[0, 1, 1, 1]]), 4, 2).tolist() == [1]


def test_small_banks_and_empty_ones() -> None:
    bank, labels, queries = make(3, num_rows=5)
    assert knn_predict(bank, labels, queries, k=20, num_classes=4).tolist() == [brute(bank, labels, queries, 5, 4)]
    with pytest.raises(ValueError, match="empty bank"):
        knn_predict(bank, labels, queries, num_classes=4, copies=np.zeros((1, 5), int))
