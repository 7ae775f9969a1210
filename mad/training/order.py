"""Which sample the n-th of a run is: kinds in turn by weight, and within a kind one seeded permutation after the other."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mad.files import MadError

GOLDEN = (5**0.5 - 1) / 2
ORDER_STREAM = 1  # one of the independent random streams of a seed
PIECE = 1 << 16  # turns that are counted at once


class SampleOrder:
    """Which kind of sample, and which sample of this kind, the n-th of a run is.

    Kinds follow the additive golden-ratio sequence: after any number of turns each has had its weight's share, give or take
    one or two. Within a kind the samples come in seeded permutations, one after the other. Turns are counted in pieces of steps
    as they are asked for: the turns of a long run with `mode` "within" would fill the memory.
    """

    def __init__(self, counts: dict[str, int], weights: dict[str, float], batch: int, steps: int, mode: str, seed: int):
        self.kinds = list(counts)
        self._counts, self._batch, self._steps, self._seed = counts, batch, steps, seed
        self._turns = 1 if mode == "alternate" else batch  # of a step
        self._piece_steps = max(1, PIECE // self._turns)
        shares = np.array([weights[kind] for kind in self.kinds], dtype=np.float64)
        self._edges = (np.cumsum(shares) / shares.sum())[:-1]
        self._start = np.random.default_rng([seed, ORDER_STREAM]).random()
        self._before = [np.zeros(len(shares), np.int64)]  # samples of each kind before each piece so far

    def kind(self, n: int) -> str:
        """Kind of sample n."""
        step, place = divmod(n, self._batch)
        piece, row = divmod(step, self._piece_steps)
        return self.kinds[self._drawn(piece)[row, place % self._turns]]

    def __getitem__(self, n: int) -> tuple[str, int]:
        """Kind of sample n, and its place in the index of this kind."""
        step, place = divmod(n, self._batch)
        piece, number = divmod(step, self._piece_steps)
        row = self._drawn(piece)[number]
        kind = int(row[place % len(row)])
        earlier = int((row[:place] == kind).sum()) if len(row) > 1 else place
        epoch, turn = divmod(int(self._counted(piece)[number, kind]) + earlier, self._counts[self.kinds[kind]])
        return self.kinds[kind], int(self._permutation(kind, epoch)[turn])

    @lru_cache(maxsize=2)  # noqa: B019  one order lives as long as its run
    def _drawn(self, piece: int) -> npt.NDArray[np.int8]:
        """Kinds of the turns of a piece's steps, [steps, turns]."""
        first = piece * self._piece_steps
        steps = min(self._piece_steps, self._steps - first)
        position = self._start + np.arange(first * self._turns, (first + steps) * self._turns) * GOLDEN
        position -= np.floor(position)
        kinds = np.zeros(len(position), np.int8)
        for edge in self._edges:
            kinds += position >= edge
        return kinds.reshape(steps, -1)

    @lru_cache(maxsize=2)  # noqa: B019
    def _counted(self, piece: int) -> npt.NDArray[np.int64]:
        """Samples of each kind before each of a piece's steps, [steps, kinds]."""
        repeats = self._batch // self._turns
        while len(self._before) <= piece:
            samples = np.bincount(self._drawn(len(self._before) - 1).ravel(), minlength=len(self.kinds)) * repeats
            self._before.append(self._before[-1] + samples)
        kinds = self._drawn(piece)
        per_step = np.stack([(kinds == kind).sum(axis=1) for kind in range(len(self.kinds))], axis=1) * repeats
        return self._before[piece] + np.concatenate(
            [np.zeros((1, len(self.kinds)), np.int64), per_step.cumsum(axis=0)[:-1]]
        )

    @lru_cache(maxsize=8)  # noqa: B019  one order lives as long as its run
    def _permutation(self, kind: int, epoch: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self._seed, ORDER_STREAM, kind, epoch])
        return rng.permutation(self._counts[self.kinds[kind]])


def mixing_weights(counts: dict[str, int], mix: dict[str, float]) -> dict[str, float]:
    """Weight of each available kind: `mix`, or the counts where it is empty.

    Raises:
        MadError: there is nothing to train on, or `mix` names a kind that the shards do not hold.
    """
    if not counts:
        raise MadError(
            "train: the shards hold no readable sample of split 'train'; look at the tables of `sample` and `shard`"
        )
    if missing := sorted(kind for kind, weight in mix.items() if weight > 0 and kind not in counts):
        raise MadError(
            f"mix: no samples of kind {', '.join(map(repr, missing))} in the shards; there are {sorted(counts)}. Take "
            "them off the run's `mix`, or leave `mix` out to weigh by counts"
        )
    weights = {kind: float(mix.get(kind, 0.0)) if mix else float(count) for kind, count in counts.items()}
    return {kind: weight for kind, weight in weights.items() if weight > 0}
