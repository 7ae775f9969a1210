"""Tiles in, embeddings out: the next tiles are decoded while the network runs, in batches of the size that suits the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from time import perf_counter
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mad.files import MadError
from mad.models.batch_size import BatchSize
from mad.models.encoders import Encoder
from mad.progress import log

CPU_BATCH, GPU_BATCH = 64, 256
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
)  # what torch says of a CPU's, as a RuntimeError
_fitted: WeakKeyDictionary[Encoder, dict[int | None, BatchSize]] = WeakKeyDictionary()
"""What was found of an encoder's batches, by the batch that was asked for."""


def usual_batch() -> int:
    """Tiles per forward pass where nothing is known: 64 on a CPU, 256 on a GPU."""
    return GPU_BATCH if torch.cuda.is_available() else CPU_BATCH


def embed_tiles(
    encoder: Encoder, images: Iterable[np.ndarray], batch: int | None, what: str,
    name_of: Callable[[int], str] = "tile {} of the stream, from 0,".format,
) -> np.ndarray:  # fmt: skip
    """Embeddings float32 [n, d] of a stream of n tiles, in its order.

    Args:
        encoder: from uint8 RGB [b, h, w, 3] to [b, d].
        images: uint8 RGB [h, w, 3] each; consumed in a thread of its own, one batch ahead.
        batch: tiles per forward pass, at most; None: `usual_batch`, on a GPU twice as many while that pays. Halved where the
            device's memory does not suffice. What was found holds for the encoder's next tiles.
        what: name of the work, for messages.
        name_of: name of the n-th tile of the stream, for messages.

    Raises:
        MadError: an embedding is not finite (the first such tile is named), or a single tile is too much for the device.
    """
    known = _fitted.setdefault(encoder, {})
    most = [
        other.size for other in known.values() if other.short
    ]  # what memory has taught holds for every batch asked for
    grows = batch is None and torch.cuda.is_available() and not most
    fit = known.setdefault(batch, BatchSize(size=min([batch or usual_batch(), *most]), grows=grows))
    parts, embedded = [], 0
    for tiles in _ahead(_stacks(images, fit)):
        done = 0
        while done < len(tiles):
            begin = perf_counter()
            try:
                vectors = encoder(tiles[done : done + fit.size])
            except RuntimeError as error:
                if not _is_memory(error):
                    raise
                if fit.size == 1:
                    raise MadError(f"{what}: one tile is too much for the memory of this device ({error})") from None
                fit.refused()
                torch.cuda.empty_cache()
                log(f"{what}: out of memory, goes on with batches of {fit.size}")
                continue
            if fit.passed(len(vectors), perf_counter() - begin):
                told = ", ".join(f"{rate:.0f} tiles/s in batches of {size}" for size, rate in fit.rates.items())
                log(f"{what}: the network takes {told}; goes on with {fit.size}")
            if len(broken := np.flatnonzero(~np.isfinite(vectors).all(1))):
                raise MadError(
                    f"{what}: the encoder gives numbers that are not finite for {name_of(embedded + int(broken[0]))} and "
                    f"{len(broken) - 1} more of {len(vectors)} tiles: of all tiles its weights or dtype are at fault, of few of "
                    "them their pixels or the range of float16"
                )
            parts.append(vectors)
            done += len(vectors)
            embedded += len(vectors)
    return np.concatenate(parts) if parts else np.zeros((0, encoder.audit["dim"]), np.float32)


def _is_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in NO_MEMORY)


def _stacks(images: Iterable[np.ndarray], fit: BatchSize) -> Iterator[np.ndarray]:
    """The tiles in order, each time as many as a pass takes by then."""
    stream = iter(images)
    while part := list(islice(stream, fit.size)):
        yield np.stack(part)


def _ahead(stacks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same arrays, each made in one thread while the one before is in use."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, stacks, None)
        while (stack := following.result()) is not None:
            following = reader.submit(next, stacks, None)
            yield stack
