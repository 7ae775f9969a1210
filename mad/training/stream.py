"""The same samples from tars read end to end, with webdataset: for object stores, slow disks and very large sets.

A kind's tars are drawn at random with replacement and read whole, so that every sample comes as often as any other and no
process runs dry, however unevenly slides are filled. Of each pair the tiles that will be shown are drawn as it passes, and the
next sample of a kind is drawn from a buffer. Which kind sample n is, and how its tiles are augmented and masked, are functions
of (seed, n) as in `TrainingSet`; which sample it is follows from (seed, first step, process, loading process) alone, so that a
resumed run goes on with other ones.
"""

from __future__ import annotations

import copy
import hashlib
import random
import shlex
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import webdataset as wds
from torch.utils.data import get_worker_info
from webdataset.tariterators import tarfile_samples

from mad.config.kinds import STANDALONE
from mad.config.training import RunConfig
from mad.files import MadError
from mad.progress import log
from mad.tiles.pyramid import parse_tile_id, tile_id
from mad.training.data import TrainingSet
from mad.training.index import Index
from mad.training.tile_reader import mend_tar, not_a_tile, readable
from mad.training.views import Image

STREAM = 4  # beside the streams of order, views and masks
TARS = 64  # whose digests are kept at hand: those that the buffers hold samples of


@dataclass(frozen=True)
class Member:
    """A tile as a tar holds it; `position` under its parent, -1 where it is no child."""

    url: str
    tile_id: str
    position: int
    data: bytes


class MemberReader:
    """Decodes members of side `tile_px` whose bytes are those of their table.

    `places` tells the rows of each tar by its URL; their digests are looked up when its first tile comes.
    """

    def __init__(self, tile_px: int, rows: pd.DataFrame, places: dict[str, npt.NDArray[np.int64]]) -> None:
        self.tile_px = tile_px
        self._digests = lru_cache(maxsize=TARS)(partial(_digests, rows, places))

    def read(self, member: Member) -> Image:
        """Its RGB pixels [tile_px, tile_px, 3].

        Raises:
            MadError: its bytes are not those of its table or no image, or the image's size differs.
        """
        known = hashlib.sha256(member.data).hexdigest() == self._digests(member.url).get(member.tile_id)
        image = readable(member.data) if known else None
        if image is None or image.shape != (self.tile_px, self.tile_px, 3):
            raise not_a_tile(f"{member.url}: tile {member.tile_id}", image, self.tile_px)
        return image

    def tile_id(self, member: Member) -> str:
        """Its id."""
        return member.tile_id

    def position(self, member: Member) -> int:
        """Its place under its parent."""
        return member.position


class StreamSet(TrainingSet):
    """`TrainingSet`, except for which sample of its kind sample n is: the next one."""

    def __init__(
        self, index: Index, run: RunConfig, tile_px: int, local_px: int, seed: int, grid: tuple[int, int] | None = None
    ) -> None:
        super().__init__(index, run, tile_px, local_px, seed, grid)
        self._base = run.runtime.shard_url or str(index.folder.resolve())
        tars = index.rows.groupby("shard", observed=True).indices
        self.reader = MemberReader(
            tile_px, index.rows, {shard_url(self._base, str(tar)): rows for tar, rows in tars.items()}
        )
        self._shards = {kind: shard_sizes(index, kind) for kind in self.weights}
        self._open: dict[str, Iterator[list[Member]]] = {}
        self._begun = (0, 0)

    def begin(self, step: int, rank: int) -> None:
        """Close what is open; streams opened from now on are those of this step and process."""
        self._open.clear()
        self._begun = (step, rank)
        if step and rank == 0:
            log(f"{self.run.name}: loader: stream goes on with other samples than an unbroken run would have seen")

    def trial(self) -> StreamSet:
        """The same with streams of its own, which read ahead no further than they must."""
        other = copy.copy(self)
        other.run, other._open = self.run.model_copy(update={"shuffle_buffer": 1}), {}
        return other

    def tiles(self, n: int, rng: np.random.Generator) -> tuple[str, Sequence[Any]]:
        """Kind of sample n, and the tiles of the next sample of this kind."""
        kind = self.order.kind(n)
        if kind not in self._open:
            self._open[kind] = self._stream(kind)
        return kind, next(self._open[kind])

    def _stream(self, kind: str) -> Iterator[list[Member]]:
        worker = get_worker_info()
        place = (*self._begun, worker.id if worker else 0, self.order.kinds.index(kind))
        rng = np.random.default_rng([self.seed, STREAM, *place])
        urls = {shard_url(self._base, shard): size for shard, size in self._shards[kind].items()}
        children = 0 if kind == STANDALONE else self.run.children
        size, picks = self.run.shuffle_buffer, random.Random(int(rng.integers(2**63)))
        return iter(
            wds.DataPipeline(partial(resampled, urls, children, rng), wds.shuffle(size, initial=size, rng=picks))
        )


def _digests(rows: pd.DataFrame, places: dict[str, npt.NDArray[np.int64]], url: str) -> dict[str, str]:
    """SHA-256 of a tar's tiles by their ids."""
    own = rows[["tile_id", "sha256"]].iloc[places[url]]
    return dict(zip(own["tile_id"], own["sha256"], strict=True))


def shard_sizes(index: Index, kind: str) -> dict[str, int]:
    """Samples in each tar of a kind, by the tar's path below the folder of shards."""
    rows = index.standalone if kind == STANDALONE else index.pairs[kind].parents
    tars, names = pd.factorize(index.rows["shard"].iloc[rows], sort=True)
    return dict(zip(map(str, names), np.bincount(tars).tolist(), strict=True))


def shard_url(base: str, shard: str) -> str:
    """Where webdataset finds a tar: `base` with the tar's path for `{shard}`, or at its end."""
    if base.startswith("pipe:"):
        shard = shlex.quote(shard)
    return base.replace("{shard}", shard) if "{shard}" in base else f"{base.rstrip('/')}/{shard}"


def resampled(urls: dict[str, int], children: int, rng: np.random.Generator) -> Iterator[list[Member]]:
    """Yield without end what is shown of the samples of tars drawn at random; `urls` tells how many samples each should hold.

    A tar that ends early or cannot be read is named in a warning, once, and its samples before the fault are used; one that
    has none is not drawn again.

    Raises:
        MadError: no tar is left.
    """
    left, warned, url, fault, mend = list(urls), set[str](), "", "", ""
    while left:
        url, found = left[int(rng.integers(len(left)))], 0
        try:
            for sample in tarfile_samples([{"url": url}], select_files=_is_image):
                if shown := draw(sample, children, rng):
                    found += 1
                    yield shown
            mend = mend_tar()
            fault = "" if found >= urls[url] else f"it holds {found} of the {urls[url]} samples of its table"
        except (OSError, tarfile.TarError, ValueError) as error:
            fault, mend = str(error) if isinstance(error, OSError) else str(error.args[0]), mend_tar(error)
        if fault and url not in warned:
            warned.add(url)
            log(f"WARNING: {url}: {fault}; {found} samples of it are used; {mend}")
        if not found:
            left.remove(url)
    raise MadError(
        f"{url}: {fault}; no tar of this kind can be read: look at the folder of shards, or at runtime.shard_url"
    )


def draw(sample: dict[str, Any], children: int, rng: np.random.Generator) -> list[Member]:
    """The tiles that a sample of webdataset shows: its parent and `children` of its children; one alone with `children` 0.

    None of them where it lacks its parent or so many children.
    """
    url, key = sample["__url__"], sample["__key__"]
    images = {name.rpartition(".")[0]: data for name, data in sample.items() if not name.startswith("__")}
    if not children:
        return [Member(url, key, -1, images[""])] if "" in images else []
    parent = images.pop("parent", None)
    if parent is None or len(images) < children:
        return []
    slide, place = parse_tile_id(key)
    drawn = rng.permutation([int(name) for name in images])[:children].tolist()
    shown = [Member(url, tile_id(slide, (*place, k)), k, images[f"{k:02d}"]) for k in drawn]
    return [Member(url, key, -1, parent), *shown]


def _is_image(name: str) -> bool:
    return not name.endswith(".json")
