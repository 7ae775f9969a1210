"""Retrieval@1 and @5 against brute force; ties by expectation, against drawing at random."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from mad.metrics import retrieval
from mad.metrics.cosine import unit
from mad.metrics.retrieval import least_difference, retrieval_at


@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force(seed: int) -> None:
    generator = np.random.default_rng(seed)
    queries, candidates = generator.normal(size=(40, 5)), generator.normal(size=(64, 5))
    query_key, candidate_key = generator.integers(0, 8, 40), generator.integers(0, 8, 64)
    hits, chance = retrieval_at(queries, candidates, query_key, candidate_key, chunk=13)
    nearest = (-cosine_similarity(queries, candidates)).argsort(1)
    for place, k in enumerate((1, 5)):
        assert (hits[place] == (candidate_key[nearest[:, :k]] == query_key[:, None]).any(1)).all()
        own = [(candidate_key == key).sum() for key in query_key]
        assert chance[place] == pytest.approx([1 - comb(64 - number, k) / comb(64, k) for number in own])


@pytest.mark.parametrize("seed", range(3))
def test_ties_equal_drawing_at_random(seed: int) -> None:
    """Few distinct directions: candidates of equal cosine are put in random order, many times."""
    generator = np.random.default_rng(seed)
    directions = np.concatenate([np.eye(3), -np.eye(3)])
    queries, candidates = directions[generator.integers(0, 6, 12)], directions[generator.integers(0, 6, 20)]
    query_key, candidate_key = generator.integers(0, 6, 12), generator.integers(0, 6, 20)
    hits, _ = retrieval_at(queries, candidates, query_key, candidate_key)
    similarity = cosine_similarity(queries, candidates)
    found = np.zeros((2, 12))
    for _ in range(3000):
        order = generator.permutation(20)
        ranked = order[(-similarity[:, order]).argsort(1, kind="stable")]
        found += [(candidate_key[ranked[:, :k]] == query_key[:, None]).any(1) for k in (1, 5)]
    assert hits == pytest.approx(found / 3000, abs=0.04)


def test_fewer_candidates_than_places_are_all_found() -> None:
    hits, chance = retrieval_at(np.eye(3), np.eye(3), np.arange(3), np.array([1, 2, 2]))
    assert hits.tolist() == [[0, 0, 1], [0, 1, 1]] and chance[1].tolist() == [0, 1, 1]


def test_collapsed_embeddings_score_chance() -> None:
    keys = np.repeat(np.arange(5), 4)
    hits, chance = retrieval_at(np.ones((5, 3)), np.ones((20, 3)), np.arange(5), keys)
    assert hits == pytest.approx(chance)
    assert chance[0] == pytest.approx(np.full(5, 0.2))
    assert chance[1] == pytest.approx(np.full(5, 1 - comb(16, 5) / comb(20, 5)))


def test_perfect_embeddings_always_hit() -> None:
    keys = np.repeat(np.arange(6), 3)
    hits, _ = retrieval_at(np.eye(6), np.eye(6)[keys], np.arange(6), keys)
    assert (hits == 1).all()


@pytest.mark.parametrize("seed", range(40))
def test_equal_candidates_of_any_number_and_length_are_tied(seed: int) -> None:
    """Products of equal vectors differ in the last digit by where in the matrix they stand."""
    generator = np.random.default_rng(seed)
    d, queries, count = generator.choice([7, 64, 384, 768]), generator.integers(1, 6), generator.integers(6, 300)
    vector = generator.normal(size=d).astype(np.float32)
    keys = np.arange(count) % queries
    hits, chance = retrieval_at(np.tile(vector, (queries, 1)), np.tile(vector, (count, 1)), np.arange(queries), keys)
    assert hits == pytest.approx(chance)


def test_a_shared_offset_hides_nothing() -> None:
    """All cosines are 1 to eight digits; the order is that of float64."""
    generator = np.random.default_rng(0)
    candidates = generator.normal(size=(40, 16)) + 1e4
    queries = candidates[:10] + 0.01 * generator.normal(size=(10, 16))
    hits, _ = retrieval_at(queries, candidates, np.arange(10), np.arange(40))
    assert (hits == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_what_float32_cannot_order_is_asked_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines that differ in the seventh digit, against brute force in float64."""
    generator = np.random.default_rng(seed)
    centre = generator.normal(size=64)
    queries, candidates = (centre + 2e-3 * generator.normal(size=(rows, 64)) for rows in (300, 200))
    query_key, candidate_key = generator.integers(0, 20, 300), generator.integers(0, 20, 200)
    nearest = (-cosine_similarity(queries, candidates)).argsort(1)
    expected = [(candidate_key[nearest[:, :k]] == query_key[:, None]).any(1) for k in (1, 5)]
    assert (retrieval_at(queries, candidates, query_key, candidate_key)[0] == expected).all()
    monkeypatch.setattr(retrieval, "least_difference", lambda dim: 0.0)
    assert (retrieval_at(queries, candidates, query_key, candidate_key)[0] != expected).any(), (
        "this is hard for float32"
    )


@pytest.mark.parametrize("seed", range(5))
def test_ties_among_close_candidates_equal_float64_throughout(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies, near copies and others, so that some queries are decided in float32 and some ties decide the last places."""
    generator = np.random.default_rng(seed)
    places = generator.normal(size=(40, 32))
    candidates = np.concatenate([places, places, places + 1e-7 * generator.normal(size=(40, 32)), -places]).astype("f4")
    queries = (places[:30] + generator.normal(size=(30, 32))).astype("f4")
    keys = generator.integers(0, 10, 30), generator.integers(0, 10, 160)
    asked: list[int] = []
    real = retrieval._exact
    monkeypatch.setattr(retrieval, "_exact", lambda *given: asked.append(len(given[0])) or real(*given))
    found = retrieval_at(queries, candidates, *keys, ks=(1, 4, 5))
    monkeypatch.setattr(retrieval, "least_difference", lambda dim: np.inf)
    assert np.array_equal(found, retrieval_at(queries, candidates, *keys, ks=(1, 4, 5)))
    assert 0 < asked[0] <= 30 and asked[1:] == [30] and ((found[0] > 0) & (found[0] < 1)).any()


def test_clear_queries_are_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_exact", None)
    angle = np.linspace(0, 1.5, 8)
    candidates = np.stack([np.cos(angle), np.sin(angle)], 1)
    hits, _ = retrieval_at(candidates[[0, 0, 7]], candidates, np.array([0, 1, 5]), np.arange(8), ks=(1, 3, 9))
    assert hits.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("dim", [1, 6, 768, 4096])
def test_float32_errs_less_than_is_assumed(dim: int) -> None:
    generator = np.random.default_rng(dim)
    one, other = (unit(np.abs(generator.normal(size=(200, dim)))) for _ in range(2))  # one sign: errors add up
    error = np.abs(one.astype(np.float32) @ other.astype(np.float32).T - one @ other.T).max()
    assert 0 <= 2 * error < least_difference(dim) < 1e-3


@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_are_not_finite_are_named(side: int) -> None:
    rows = [np.eye(6), np.eye(6)]
    rows[side][4, 0] = np.nan
    with pytest.raises(ValueError, match="row 4 holds NaN"):
        retrieval_at(*rows, np.arange(6), np.arange(6))
