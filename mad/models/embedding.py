"""Tiles in, embeddings out: the next tiles are decoded while the network runs, and batches shrink where memory ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mad.files import MadError
from mad.models.encoders import Encoder
from mad.progress import log

CPU_BATCH, GPU_BATCH = 64, 256  # tiles per forward pass, where the configuration gives none
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
)  # what torch says of a CPU's, as a RuntimeError
_fitted: WeakKeyDictionary[Encoder, int] = WeakKeyDictionary()
"""Tiles per pass that an encoder was brought down to."""


def embed_tiles(
    encoder: Encoder, images: Iterable[np.ndarray], batch: int | None, what: str,
    name_of: Callable[[int], str] = "tile {} of the stream, from 0,".format,
) -> np.ndarray:  # fmt: skip
    """Embeddings float32 [n, d] of a stream of n tiles, in its order.

    Args:
        encoder: from uint8 RGB [b, h, w, 3] to [b, d].
        images: uint8 RGB [h, w, 3] each; consumed in a thread of its own, one batch ahead.
        batch: tiles per forward pass; None: 64 on a CPU, 256 on a GPU. Halved where the device's memory does not suffice, and not
            tried again with this encoder.
        what: name of the work, for messages.
        name_of: name of the n-th tile of the stream, for messages.

    Raises:
        MadError: an embedding is not finite (the first such tile is named), or a single tile is too much for the device.
    """
    batch, parts, embedded = batch or (GPU_BATCH if torch.cuda.is_available() else CPU_BATCH), [], 0
    batch = min(batch, _fitted.get(encoder, batch))
    for tiles in _ahead(_stacks(images, batch)):
        done = 0
        while done < len(tiles):
            try:
                vectors = encoder(tiles[done : done + batch])
            except RuntimeError as error:
                if not _is_memory(error):
                    raise
                if batch == 1:
                    raise MadError(f"{what}: one tile is too much for the memory of this device ({error})") from None
                batch //= 2
                _fitted[encoder] = batch
                torch.cuda.empty_cache()
                log(f"{what}: out of memory, goes on with batches of {batch}")
                continue
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


def _stacks(images: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    stream = iter(images)
    while part := list(islice(stream, size)):
        yield np.stack(part)


def _ahead(stacks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same arrays, each made in one thread while the one before is in use."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, stacks, None)
        while (stack := following.result()) is not None:
            following = reader.submit(next, stacks, None)
            yield stack
