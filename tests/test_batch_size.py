"""The search for a batch size, on made-up rates; and that `embed_tiles` follows it without losing a tile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mad.config.encoders import EncoderConfig
from mad.models import embedding
from mad.models.batch_size import MOST, PASSES, BatchSize
from mad.models.embedding import embed_tiles
from mad.training.teacher import Teacher


def search(rate_of: Callable[[int, int], float], fit: BatchSize, passes: int = 60) -> list[int]:
    """Sizes in the order of their first pass, where `rate_of` gives tiles/s by size and number of the pass at it."""
    sizes: list[int] = []
    for _ in range(passes):
        sizes.append(fit.size)
        fit.passed(fit.size, fit.size / rate_of(fit.size, sizes.count(fit.size)))
    return list(dict.fromkeys(sizes))


@pytest.mark.parametrize(
    ("rates", "tried", "found"),
    [
        ({256: 100, 512: 104}, [256, 512], 256),
        ({256: 100, 512: 106, 1024: 110}, [256, 512, 1024], 512),
        ({256: 100, 512: 90, 1024: 500}, [256, 512], 256),
        ({256: 100, 512: 200, 1024: 400, 2048: 800}, [256, 512, 1024, 2048], MOST),
    ],
)
def test_it_doubles_while_throughput_rises_by_five_per_cent(
    rates: dict[int, float], tried: list[int], found: int
) -> None:
    fit = BatchSize(size=256, grows=True)
    assert search(lambda size, _: rates[size], fit) == tried
    assert (fit.size, fit.grows) == (found, False) and list(fit.rates) == tried
    assert fit.rates == pytest.approx({size: rates[size] for size in tried})


def test_first_and_slow_passes_are_not_what_a_size_is_judged_by() -> None:
    """The first pass of a size also chooses kernels; another may have waited for the reader's thread."""
    fit = BatchSize(size=256, grows=True)
    search(lambda size, turn: {1: 1e6 if size == 256 else 1, 2: 10}.get(turn, {256: 100, 512: 120}.get(size, 1)), fit)
    assert fit.size == 512 and fit.rates[256] == pytest.approx(100)


def test_it_ends_once_and_says_so() -> None:
    fit = BatchSize(size=MOST, grows=True)
    assert [fit.passed(MOST, 1.0) for _ in range(2 * PASSES)] == [turn == PASSES - 1 for turn in range(2 * PASSES)]


def test_passes_of_other_sizes_tell_nothing() -> None:
    fit = BatchSize(size=256, grows=True)
    for tiles in (255, 1, 512) * 20:
        fit.passed(tiles, 1e-9)
    assert fit.size == 256 and not fit.rates


def test_a_larger_size_that_memory_refuses_ends_the_search() -> None:
    fit = BatchSize(size=256, grows=True)
    for _ in range(PASSES):
        fit.passed(256, 1.0)
    assert fit.size == 512
    fit.refused()
    assert search(lambda size, _: size, fit) == [256]
    fit.refused()
    assert search(lambda size, _: size, fit) == [128]


def test_a_given_size_is_not_left() -> None:
    assert search(lambda size, _: size, BatchSize(size=48)) == [48]


class Counting:
    """An encoder whose passes take as long as `rate_of` tiles/s of a made-up clock say, and at most `limit` tiles."""

    def __init__(self, rate_of: Callable[[int], float], limit: int = 10**9) -> None:
        self.audit, self.sizes, self.clock = {"dim": 1}, list[int](), 0.0
        self.rate_of, self.limit = rate_of, limit

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        if len(tiles) > self.limit:
            raise torch.OutOfMemoryError("full")
        self.sizes.append(len(tiles))
        self.clock += len(tiles) / self.rate_of(len(tiles))
        return tiles[:, :, 0, :].reshape(len(tiles), -1)[:, :3].astype(np.float32) @ [[65536.0], [256.0], [1.0]]


def stream(count: int) -> list[np.ndarray]:
    """Tiles that hold their own numbers."""
    return [np.array([[[n >> 16, n >> 8 & 255, n & 255]]], np.uint8) for n in range(count)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Counting], Counting]:
    """A machine that says that it has a GPU, with the clock of an encoder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def set_clock(encoder: Counting) -> Counting:
        monkeypatch.setattr(embedding, "perf_counter", lambda: encoder.clock)
        return encoder

    return set_clock


@pytest.mark.parametrize(
    ("limit", "best", "largest", "found"), [(10**9, 512, 1024, 512), (600, 2048, 512, 512), (300, 2048, 256, 256)]
)
def test_on_a_gpu_batches_grow_and_no_tile_is_lost(
    gpu: Callable[[Counting], Counting], limit: int, best: int, largest: int, found: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    encoder = gpu(Counting(lambda size: min(size, best), limit))
    vectors = embed_tiles(encoder, stream(15_000), None, "embed")
    assert vectors[:, 0].tolist() == list(range(15_000))
    assert encoder.sizes[0] == 256 and max(encoder.sizes) == largest and encoder.sizes[-2] == found
    assert f"goes on with {'' if limit > 1000 else 'batches of '}{found}" in capsys.readouterr().err
    encoder.sizes.clear()
    vectors = embed_tiles(encoder, stream(3000), None, "the next slide")
    assert vectors[:, 0].tolist() == list(range(3000)) and set(encoder.sizes[:-1]) == {found}, "it is remembered"


def test_a_configured_batch_and_a_cpu_stay(gpu: Callable[[Counting], Counting], monkeypatch) -> None:
    encoder = gpu(Counting(float))
    embed_tiles(encoder, stream(3000), 100, "embed")
    assert set(encoder.sizes) == {100}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    encoder = Counting(float)
    embed_tiles(encoder, stream(3200), None, "embed")
    assert set(encoder.sizes) == {64}


@pytest.mark.parametrize(("configured", "taken"), [(None, 256), (7, 7)])
def test_a_teacher_has_the_same_batch_in_every_run(gpu: Callable[[Counting], Counting], configured, taken) -> None:
    encoder = gpu(Counting(float))
    teacher = Teacher(EncoderConfig(name="t", spec="colour", batch=configured), {}, None, Path(), encoder)
    embed_tiles(encoder, stream(3000), teacher.batch, "run: teacher")
    assert set(encoder.sizes[:-1]) == {taken}


def test_what_memory_taught_holds_for_every_batch(gpu: Callable[[Counting], Counting]) -> None:
    encoder = gpu(Counting(float, 100))
    embed_tiles(encoder, stream(500), 128, "embed")
    encoder.sizes.clear()
    for asked, first in ((96, 64), (None, 64), (32, 32)):
        embed_tiles(encoder, stream(500), asked, "the same encoder")
        assert encoder.sizes[0] == max(encoder.sizes) == first
        encoder.sizes.clear()
