"""Retrieval@1 against brute force; ties by expectation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from mad.metrics.retrieval import retrieval_at_1


@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    queries, candidates = generator.normal(size=(40, 5)), generator.normal(size=(64, 5))
    query_key, candidate_key = generator.integers(0, 8, 40), generator.integers(0, 8, 64)
    hits, chance = retrieval_at_1(queries, candidates, query_key, candidate_key, chunk=13)
    nearest = cosine_similarity(queries, candidates).argmax(1)
    assert (hits == (candidate_key[nearest] == query_key)).all()
    assert chance == pytest.approx([(candidate_key == key).mean() for key in query_key])


def test_collapsed_embeddings_score_chance() -> None:
    keys = np.repeat(np.arange(5), 4)
    hits, chance = retrieval_at_1(np.ones((5, 3)), np.ones((20, 3)), np.arange(5), keys)
    assert hits == pytest.approx(chance)
    assert chance == pytest.approx(np.full(5, 0.2))


def test_perfect_embeddings_always_hit() -> None:
    keys = np.repeat(np.arange(6), 3)
    hits, _ = retrieval_at_1(np.eye(6), np.eye(6)[keys], np.arange(6), keys)
    assert (hits == 1).all()
