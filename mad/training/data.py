"""Sample n of a run is a pure function of (seed, n): resuming is exact and the number of processes does not matter.

`SampleOrder` says which sample n is, `TrainingSet` reads it and makes its views, `batches` yields one process's share of
each step's global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mad.config.training import STANDALONE, RunConfig
from mad.files import MadError
from mad.training import views
from mad.training.index import Index, TileReader

GOLDEN = (5**0.5 - 1) / 2
ORDER_STREAM, VIEW_STREAM = 1, 2  # independent random streams of one seed


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


class TrainingSet(Dataset[list[views.Views]]):
    """Sample n as views. `method` decides what a pair sample gives; standalone tiles always give multi-crop views."""

    def __init__(self, index: Index, run: RunConfig, tile_px: int, local_px: int, seed: int) -> None:
        self.index, self.run, self.local_px, self.seed = index, run, local_px, seed
        self.reader = TileReader(index, tile_px)
        counts = index.counts()
        self.weights = mixing_weights(counts, run.mix)
        chosen = {kind: counts[kind] for kind in self.weights}
        self.order = SampleOrder(chosen, self.weights, run.batch, run.steps, run.mix_mode, seed)

    def __getitem__(self, n: int) -> list[views.Views]:
        """Views of sample n: one entry, or with `pair_tiles: all` one per tile."""
        kind, place = self.order[n]
        rng = np.random.default_rng([self.seed, VIEW_STREAM, n])
        if kind == STANDALONE:
            return [self._multicrop(int(self.index.standalone[place]), rng)]
        parent, children = self.draw_tiles(kind, place, rng)
        if self.run.method == "mad":
            tiles = tuple(self.reader.tile_id(row) for row in (parent, *children))
            images = [self.reader.read(row) for row in children]
            return [views.pair_views(self.reader.read(parent), images, self.run.photometric, rng, tiles)]
        if self.run.pair_tiles == "all":
            return [self._multicrop(row, rng) for row in (parent, *children)]
        of_parent = rng.random() < 2 / (2 + len(children))
        return [self._multicrop(parent if of_parent else children[int(rng.integers(len(children)))], rng)]

    def draw_tiles(self, kind: str, place: int, rng: np.random.Generator) -> tuple[int, list[int]]:
        """Rows of a pair's parent and of the children drawn this time: the first draw of every method, so the same tiles."""
        pairs = self.index.pairs[kind]
        readable = pairs.children[place][pairs.children[place] >= 0]
        return int(pairs.parents[place]), [int(row) for row in rng.permutation(readable)[: self.run.children]]

    def _multicrop(self, row: int, rng: np.random.Generator) -> views.Views:
        image, tile_id = self.reader.read(row), self.reader.tile_id(row)
        return views.multicrop_views(image, self.run.views, self.local_px, self.run.photometric, rng, tile_id)


@dataclass(frozen=True)
class Group:
    """Views of one kind in a batch, uint8: teacher [B, T, P, P, 3], student [B, S, P, P, 3] or None, local [B, L, p, p, 3]."""

    kind: str
    teacher: Tensor
    student: Tensor | None
    local: Tensor


@dataclass(frozen=True)
class Batch:
    """One process's share of a step: its groups and the tiles that were read."""

    groups: list[Group]
    tiles: list[str] = field(default_factory=list)


def collate(samples: list[list[views.Views]]) -> Batch:
    """Stack the views of samples, grouped by kind in the order of their names."""
    flat = [view for sample in samples for view in sample]
    groups = []
    for kind in sorted({view.kind for view in flat}):
        same = [view for view in flat if view.kind == kind]
        students = [view.student for view in same if view.student is not None]
        groups.append(
            Group(
                kind,
                torch.from_numpy(np.stack([view.teacher for view in same])),
                torch.from_numpy(np.stack(students)) if students else None,
                torch.from_numpy(np.stack([view.local for view in same])),
            )
        )
    return Batch(groups, [tile for view in flat for tile in view.tiles])


def samples_per_process(batch: int, world: int) -> int:
    """Samples of a global batch that each of `world` processes gets.

    Raises:
        MadError: they cannot be shared out evenly.
    """
    if batch % world:
        raise MadError(
            f"batch: {batch} samples cannot be shared evenly by {world} processes; make batch a multiple of {world}"
        )
    return batch // world


def batches(data: TrainingSet, *, start: int, rank: int, world: int, workers: int) -> Iterator[Batch]:
    """Yield process `rank`'s share of the batches of steps `start`, `start + 1`, ... to the last one.

    Raises:
        MadError: the global batch cannot be shared out evenly.
    """
    batch, share = data.run.batch, samples_per_process(data.run.batch, world)
    steps = range(start, data.run.steps)
    numbers = [range(step * batch + rank * share, step * batch + (rank + 1) * share) for step in steps]
    loader = DataLoader(
        data,
        batch_sampler=numbers,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_quiet_worker,
        generator=torch.Generator().manual_seed(0),
    )
    return iter(loader)


def _quiet_worker(_: int) -> None:
    """One thread per loading process, and signals left to the training process."""
    import signal

    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
