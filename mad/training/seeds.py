"""One generator per sample, seeded for hundreds at once: numpy's own streams at less than half their cost.

`numpy.random.default_rng([seed, stream, n])` spends its time in hashing three words. The hash (`SeedSequence`, after O'Neill's
`seed_seq_fe`; numpy keeps it as it is for the sake of reproducible streams) is done here for many n in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

BLOCK = 256  # numbers that are hashed at once
WORD = 2**32
POOL = 4  # words
MIX_LEFT, MIX_RIGHT, SHIFT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715), np.uint32(16)

Words = npt.NDArray[np.uint32]


def generators(seed: int, stream: int, numbers: Sequence[int]) -> list[np.random.Generator]:
    """`numpy.random.default_rng([seed, stream, n])` for each n of `numbers`."""
    if max(seed, stream, *numbers) >= WORD:
        return [np.random.default_rng([seed, stream, n]) for n in numbers]
    words = (_states(seed, stream, n // BLOCK)[n % BLOCK] for n in numbers)
    return [np.random.Generator(np.random.PCG64(_Hashed(one))) for one in words]  # type: ignore[arg-type]


class _Hashed(ISeedSequence):
    """Words that are hashed already."""

    def __init__(self, words: npt.NDArray[np.uint64]) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: npt.DTypeLike = np.uint32) -> npt.NDArray[np.uint64]:  # type: ignore[override]
        return self._words


def _constants(value: int, factor: int, count: int) -> Words:
    """`value`, `value * factor`, ...: column vector [count + 1, 1]."""
    return np.array([value * pow(factor, n, WORD) % WORD for n in range(count + 1)], dtype=np.uint32)[:, None]


ENTROPY_CONSTANTS = _constants(0x43B0D7E5, 0x931E8875, POOL * POOL)
STATE_CONSTANTS = _constants(0x8B51F9DD, 0x58F38DED, 2 * POOL)
OTHERS = [[target for target in range(POOL) if target != source] for source in range(POOL)]


@lru_cache(maxsize=16)
def _states(seed: int, stream: int, block: int) -> npt.NDArray[np.uint64]:
    """What `SeedSequence([seed, stream, n]).generate_state(4, numpy.uint64)` gives, [BLOCK, 4], for the n-s of a block."""
    entropy = np.zeros((POOL, BLOCK), dtype=np.uint32)
    entropy[0], entropy[1], entropy[2] = seed, stream, range(block * BLOCK, (block + 1) * BLOCK)
    pool = _hash(entropy, ENTROPY_CONSTANTS[: POOL + 1])
    for source, others in enumerate(OTHERS):
        used = POOL + source * len(others)
        mixed = MIX_LEFT * pool[others] - MIX_RIGHT * _hash(pool[source], ENTROPY_CONSTANTS[used : used + POOL])
        pool[others] = mixed ^ (mixed >> SHIFT)
    words = _hash(np.concatenate([pool, pool]), STATE_CONSTANTS)
    return np.ascontiguousarray(words.T, dtype="<u4").view("<u8").astype(np.uint64)


def _hash(words: Words, constants: Words) -> Words:
    """Words [K, N] (or [N], for each constant anew), each row with its own of K + 1 constants and the next one."""
    hashed = (words ^ constants[:-1]) * constants[1:]
    return hashed ^ (hashed >> SHIFT)
