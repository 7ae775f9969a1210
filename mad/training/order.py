"""Which sample the n-th of a run is: kinds in turn by weight, and within a kind one seeded permutation after the other."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mad.files import MadError

GOLDEN = (5**0.5 - 1) / 2
ORDER_STREAM = 1  # one of the independent random streams of a seed


class SampleOrder:
    """Which kind of sample, and which sample of this kind, the n-th of a run is.

    Kinds follow the additive golden-ratio sequence: after any number of turns each has had its weight's share, give or take
    one or two. Within a kind the samples come in seeded permutations, one after the other.
    """

    def __init__(self, counts: dict[str, int], weights: dict[str, float], batch: int, steps: int, mode: str, seed: int):
        self.kinds = list(counts)
        self._counts, self._batch, self._seed = counts, batch, seed
        shares = np.array([weights[kind] for kind in self.kinds], dtype=np.float64)
        turns = np.arange(steps if mode == "alternate" else steps * batch)
        start = np.random.default_rng([seed, ORDER_STREAM]).random()
        position = np.mod(start + turns * GOLDEN, 1.0)
        kinds = np.minimum(np.searchsorted(np.cumsum(shares) / shares.sum(), position, side="right"), len(shares) - 1)
        self._kinds = kinds.astype(np.int8).reshape(steps, -1)  # [steps, 1] or [steps, batch]
        repeats = batch // self._kinds.shape[1]
        per_step = np.stack([(self._kinds == kind).sum(axis=1) for kind in range(len(shares))], axis=1) * repeats
        self._before = np.concatenate(
            [np.zeros((1, len(shares)), np.int64), per_step.cumsum(axis=0)]
        )  # [steps + 1, kinds]

    def kind(self, n: int) -> str:
        """Kind of sample n."""
        step, place = divmod(n, self._batch)
        row = self._kinds[step]
        return self.kinds[row[place % len(row)]]

    def __getitem__(self, n: int) -> tuple[str, int]:
        """Kind of sample n, and its place in the index of this kind."""
        step, place = divmod(n, self._batch)
        row = self._kinds[step]
        kind = int(row[place % len(row)])
        earlier = int((row[:place] == kind).sum()) if len(row) > 1 else place
        epoch, turn = divmod(int(self._before[step, kind]) + earlier, self._counts[self.kinds[kind]])
        return self.kinds[kind], int(self._permutation(kind, epoch)[turn])

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
