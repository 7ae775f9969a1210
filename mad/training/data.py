"""Sample n of a run is a pure function of (seed, n): resuming is exact and the number of processes does not matter.

`SampleOrder` says which sample n is, `Pairing` which tiles it shows, `TrainingSet` reads them and makes its views, `batches`
yields one process's share of each step's global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mad.config.training import STANDALONE, RunConfig, is_triple
from mad.files import MadError
from mad.progress import log
from mad.training import ranks, views
from mad.training.index import Index, TileReader
from mad.training.masking import Masking
from mad.training.pairing import Pairing

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
    """Sample n as views. `method` and `pairs` decide what a pair sample gives; standalone tiles always give multi-crop views.

    `weights` and `counts` tell the kinds that are drawn, `skipped` the samples that `pairs: shuffled` leaves out because
    theirs is the only parent of its slide.
    """

    def __init__(
        self,
        index: Index,
        run: RunConfig,
        tile_px: int,
        local_px: int,
        seed: int,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """`grid`: rows and columns of patches of a tile, where patches are masked."""
        self.index, self.run, self.local_px, self.seed = index, run, local_px, seed
        self.masking = Masking(grid, run.ibot, run.batch, seed) if grid else None
        self.reader = TileReader(index, tile_px)
        self.pairing = Pairing(index, run)
        counts = self.pairing.counts() | ({STANDALONE: len(index.standalone)} if len(index.standalone) else {})
        known = counts if run.mix else {kind: count for kind, count in counts.items() if not is_triple(kind)}
        self.weights = mixing_weights(known, run.mix)
        usable = {kind: self.pairing.usable.get(kind, index.standalone) for kind in self.weights}
        self.counts = {kind: len(places) for kind, places in usable.items()}
        self.skipped = {kind: counts[kind] - count for kind, count in self.counts.items() if counts[kind] > count}
        if empty := [kind for kind, count in self.counts.items() if not count]:
            raise MadError(
                f"runs.{run.name}.pairs: shuffled: no slide has two parents of kind {', '.join(map(repr, empty))}; take it off "
                "the run's `mix`"
            )
        if self.skipped and ranks.rank() == 0:
            log(f"{run.name}: shuffled pairs leave out parents that are alone in their slide: {self.skipped}")
        self.order = SampleOrder(self.counts, self.weights, run.batch, run.steps, run.mix_mode, seed)

    def __getitem__(self, n: int) -> list[views.Views]:
        """Views of sample n: one entry, or with `pair_tiles: all` one per tile; masks are drawn last."""
        rng = np.random.default_rng(self._entropy(n))
        shown = self._views(n, rng)
        if self.masking is None:
            return shown
        masks = np.split(self.masking.masks(n, sum(len(view.teacher) for view in shown), rng), len(shown))
        return [
            replace(view, masks=np.zeros_like(mask) if view.kind == "pair" else mask)
            for view, mask in zip(shown, masks, strict=True)
        ]

    def _views(self, n: int, rng: np.random.Generator) -> list[views.Views]:
        kind, turn = self.order[n]
        if kind == STANDALONE:
            return [self._multicrop(int(self.index.standalone[turn]), rng)]
        parent, children = self.draw_tiles(kind, int(self.pairing.usable[kind][turn]), rng)
        if self.run.method != "dinov2":
            return [self._pair(kind, parent, children, rng)]
        if self.run.pair_tiles == "all":
            return [self._multicrop(row, rng) for row in (parent, *children)]
        return [self._multicrop(self._one_of(parent, children, rng), rng)]

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """What a `DataLoader` asks for: these samples as a batch, made one after the other."""
        return collate(map(self.__getitem__, numbers), len(numbers))

    def _entropy(self, n: int) -> list[int] | npt.NDArray[np.uint32]:
        """What seeds sample n. An array saves numpy half of its time, but holds no seed beyond 32 bits."""
        entropy = [self.seed, VIEW_STREAM, n]
        return np.array(entropy, dtype=np.uint32) if max(entropy) < 2**32 else entropy

    def draw_tiles(self, kind: str, place: int, rng: np.random.Generator) -> tuple[int, list[int]]:
        """Rows of the parent at `place` of a kind and of the tiles drawn to go with it."""
        return self.pairing.draw(kind, place, rng)

    def _one_of(self, parent: int, children: list[int], rng: np.random.Generator) -> int:
        of_parent = rng.random() < 2 / (2 + len(children))
        return parent if of_parent else children[int(rng.integers(len(children)))]

    def _pair(self, kind: str, parent: int, children: list[int], rng: np.random.Generator) -> views.Views:
        if self.run.pairs == "same":
            parent = self._one_of(parent, children, rng)
            rows, image = [parent], self.reader.read(parent)
            images = [image] * len(children)
        elif self.run.pairs == "interpolated":
            rows, image = [parent], self.reader.read(parent)
            coarse, fine = (float(name.removesuffix("x")) for name in kind.split("-"))
            images = [views.enlarged_cell(image, self.reader.position(row), round(fine / coarse)) for row in children]
        else:
            rows, images = [parent, *children], [self.reader.read(row) for row in children]
            image = self.reader.read(parent)
        tiles = tuple(self.reader.tile_id(row) for row in rows)
        shown = views.pair_views(image, images, self.run.photometric, rng, tiles)
        return replace(shown, kind="global_pair") if self.run.method == "mad_global" else shown

    def _multicrop(self, row: int, rng: np.random.Generator) -> views.Views:
        image, tile_id = self.reader.read(row), self.reader.tile_id(row)
        return views.multicrop_views(image, self.run.views, self.local_px, self.run.photometric, rng, tile_id)


@dataclass(frozen=True)
class Group:
    """Views of one kind in a batch, uint8: teacher [B, T, P, P, 3], student [B, S, P, P, 3] or None, local [B, L, p, p, 3].

    `kind`: "pair" (the student sees children alone), "global_pair" (the teacher's views of the parent too) or "multicrop".
    `masks` [B, T, N] are those of the teacher's views where the student sees them too.
    """

    kind: str
    teacher: Tensor
    student: Tensor | None
    local: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """One process's share of a step: its groups and the tiles that were read."""

    groups: list[Group]
    tiles: list[str] = field(default_factory=list)


class _Pile:
    """Views of one kind, copied into the tensors of a batch as they come: while an image is still in the processor's cache."""

    def __init__(self, first: views.Views, room: int) -> None:
        self.size = 0
        self._parts = [_space(part, room) for part in (first.teacher, first.student, first.local, first.masks)]

    def add(self, view: views.Views) -> None:
        for space, part in zip(self._parts, (view.teacher, view.student, view.local, view.masks), strict=True):
            if space is not None and part is not None:
                for place, image in enumerate(part):
                    space[self.size, place] = image
        self.size += 1

    def group(self, kind: str) -> Group:
        parts = [None if space is None else torch.from_numpy(space[: self.size]) for space in self._parts]
        return Group(kind, *parts)  # type: ignore[arg-type]


def _space(part: Sequence[npt.NDArray[Any]] | npt.NDArray[Any] | None, room: int) -> npt.NDArray[Any] | None:
    """Space for `room` samples with as many images (or masks) as `part`; [room, 0, 0, 0, 3] where it has none."""
    if part is None:
        return None
    shape, dtype = (part[0].shape, part[0].dtype) if len(part) else ((0, 0, 3), np.uint8)
    return np.empty((room, len(part), *shape), dtype)


def collate(samples: Iterable[list[views.Views]], count: int | None = None) -> Batch:
    """The views of `samples` as tensors, grouped by kind in the order of their names; `count` of them, if they come one by one."""
    if count is None:
        samples = list(samples)
        count = len(samples)
    piles: dict[str, _Pile] = {}
    tiles: list[str] = []
    for number, sample in enumerate(samples):
        for view in sample:
            if view.kind not in piles:
                piles[view.kind] = _Pile(view, (count - number) * len(sample))
            piles[view.kind].add(view)
            tiles += view.tiles
    return Batch([piles[kind].group(kind) for kind in sorted(piles)], tiles)


def _as_it_is(batch: Batch) -> Batch:
    return batch


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


def batches(data: TrainingSet, *, start: int, rank: int, world: int, workers: int, passes: int = 1) -> Iterator[Batch]:
    """Yield process `rank`'s share of the batches of steps `start`, `start + 1`, ... to the last one.

    With `passes`, a step's batch is first cut into as many equal parts, and each part is shared out: which samples go
    through the networks together depends on the size of a part alone.

    Raises:
        MadError: the global batch cannot be shared out evenly.
    """
    batch, share = data.run.batch, samples_per_process(data.run.batch, world) // passes
    parts = range(start * batch, data.run.steps * batch, batch // passes)
    numbers = [range(part + rank * share, part + (rank + 1) * share) for part in parts]
    loader = DataLoader(
        data,
        batch_sampler=numbers,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
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
