"""Sample n of a run is a pure function of (seed, n): resuming is exact and the number of processes does not matter.

`SampleOrder` says which sample n is, `Pairing` which tiles it shows, `ViewMaker` what is made of them. `batches` yields one
process's share of each step's global batch. `stream.StreamSet` reads the same tars in their own order instead.
"""

from __future__ import annotations

import multiprocessing
import os
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mad.config.kinds import STANDALONE, is_triple
from mad.config.training import RunConfig
from mad.files import MadError
from mad.progress import log
from mad.training import ranks
from mad.training.batch import Batch, collate, samples_per_process
from mad.training.features import Features
from mad.training.index import Index
from mad.training.masking import Masking
from mad.training.order import SampleOrder, mixing_weights
from mad.training.pairing import Pairing
from mad.training.samples import Reader, ViewMaker
from mad.training.seeds import generators
from mad.training.tile_reader import TileReader
from mad.training.views import Views

VIEW_STREAM = 2  # beside the stream of the order


class TrainingSet(Dataset[list[Views]]):
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
        features: Features | None = None,
    ) -> None:
        """
        Args:
            grid: rows and columns of patches of a tile, where patches are masked or children answer to a part of their parent.
            features: stored embeddings of a frozen teacher, by row of `index`; None where there is none, or it embeds anew.
        """
        self.index, self.run, self.seed = index, run, seed
        masking = Masking(grid, run.ibot, run.batch, seed) if grid and run.ibot.weight else None
        self.maker = ViewMaker(run, local_px, masking, features, grid if run.targets == "cell" else None)
        self.reader: Reader[Any] = TileReader(index, tile_px)
        self.pairing = Pairing(index, run)
        alone = {STANDALONE: len(index.standalone)} if len(index.standalone) and run.distill is None else {}
        counts = self.pairing.counts() | alone
        known = counts if run.mix else {kind: count for kind, count in counts.items() if not is_triple(kind)}
        self.weights = mixing_weights(known, run.mix)
        usable = {kind: self.pairing.usable.get(kind, index.standalone) for kind in self.weights}
        self.counts = {kind: len(places) for kind, places in usable.items()}
        self.skipped = {kind: counts[kind] - count for kind, count in self.counts.items() if counts[kind] > count}
        if empty := [kind for kind, count in self.counts.items() if not count]:
            kinds = ", ".join(map(repr, empty))
            raise MadError(
                f"runs.{run.name}: no pair of kind {kinds} has all of its children; look at the tables of `shard`"
                if run.distill
                else f"runs.{run.name}.pairs: shuffled: no slide has two parents of kind {kinds}; take it off the run's `mix`"
            )
        if self.skipped and ranks.rank() == 0:
            what = (
                "without pairs that lack a child"
                if run.distill
                else "shuffled pairs leave out parents alone in their slide"
            )
            log(f"{run.name}: {what}: {self.skipped}")
        self.order = SampleOrder(self.counts, self.weights, run.batch, run.steps, run.mix_mode, seed)

    def begin(self, step: int, rank: int) -> None:
        """Called before the first batch of `step` is asked for: what came before is counted once, not by each loading process."""
        if step < self.run.steps:
            self.order[step * self.run.batch]

    def trial(self) -> TrainingSet:
        """The same, to be asked for a few samples only."""
        return self

    def __getitem__(self, n: int) -> list[Views]:
        """Views of sample n."""
        return self.maker.show(self.reader, *self._drawn(n, *generators(self.seed, VIEW_STREAM, [n])))

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """What a `DataLoader` asks for: these samples as a batch. All are drawn before the first is made: between two images,
        whose decoder has emptied the processor's caches, drawing takes twice as long."""
        drawn = list(map(self._drawn, numbers, generators(self.seed, VIEW_STREAM, numbers)))
        return collate((self.maker.show(self.reader, *sample) for sample in drawn), len(numbers))

    def _drawn(self, n: int, rng: np.random.Generator) -> tuple[str, Sequence[Any], int, np.random.Generator]:
        kind, tiles = self.tiles(n, rng)
        return kind, self.maker.pick(kind, tiles, rng), n, rng

    def tiles(self, n: int, rng: np.random.Generator) -> tuple[str, Sequence[Any]]:
        """Kind of sample n, and the tiles that it shows, as `reader` takes them: a parent with its children, or one alone."""
        kind, turn = self.order[n]
        if kind == STANDALONE:
            return kind, [int(self.index.standalone[turn])]
        parent, children = self.pairing.draw(kind, int(self.pairing.usable[kind][turn]), rng)
        return kind, [parent, *children]


class _Told(Dataset[list[Views]]):
    """`data`, whose MadErrors are values: a `DataLoader` would put its own words and a traceback around those of its processes."""

    def __init__(self, data: TrainingSet) -> None:
        self.data = data

    def __getitem__(self, n: int) -> list[Views]:
        return self.data[n]

    def __getitems__(self, numbers: Sequence[int]) -> Batch | MadError:
        try:
            return self.data.__getitems__(numbers)
        except MadError as error:
            return error


def _as_it_is(batch: Batch | MadError) -> Batch | MadError:
    return batch


def batches(data: TrainingSet, *, start: int, rank: int, world: int, workers: int, passes: int = 1) -> Iterator[Batch]:
    """Yield process `rank`'s share of the batches of steps `start`, `start + 1`, ... to the last one.

    With `passes`, a step's batch is first cut into as many equal parts, and each part is shared out: which samples go
    through the networks together depends on the size of a part alone.

    Raises:
        MadError: the global batch cannot be shared out evenly.
    """
    batch, share = data.run.batch, samples_per_process(data.run.batch, world) // passes
    parts = range(start * batch, data.run.steps * batch, batch // passes)
    numbers = (range(part + rank * share, part + (rank + 1) * share) for part in parts)  # of ViT-g's: millions
    data.begin(start, rank)
    if not workers:
        return map(data.__getitems__, numbers)
    leaving = multiprocessing.RawValue("b", 0)
    loader = DataLoader(
        _Told(data),
        batch_sampler=numbers,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        worker_init_fn=partial(_quiet_worker, leaving),
        generator=torch.Generator().manual_seed(0),
    )
    iterator = iter(loader)
    weakref.finalize(iterator, setattr, leaving, "value", 1)  # with the iterator, at the latest when this process ends
    return _raised(iterator)


def _raised(parts: Iterator[Batch | MadError]) -> Iterator[Batch]:
    for part in parts:
        if isinstance(part, MadError):
            raise part
        yield part


def _quiet_worker(leaving: Any, _: int) -> None:
    """One thread per loading process, and signals left to the training process, which alone ends it by SIGTERM, once it leaves.

    A job's SIGTERM goes to every process; the training process still needs its batch then.
    """
    import signal

    import cv2

    def end(*_: object) -> None:
        if leaving.value:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
