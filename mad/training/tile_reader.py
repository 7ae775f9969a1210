"""The pixels behind a row of an index: its bytes in the tar, compared with their digest and decoded."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mad.files import MadError
from mad.tiles.shards import decode
from mad.training.index import Index
from mad.training.views import Image

MAX_OPEN_TARS = 256


def readable(data: bytes | memoryview) -> Image | None:
    """The image [h, w, 3] that `data` encodes, or None where it encodes none."""
    try:
        return decode(data)
    except (RuntimeError, ValueError):  # of imagecodecs, of simplejpeg
        return None


def mend_tar(error: BaseException | None = None) -> str:
    """What mends a tar that could not be read."""
    return (
        "mend its permissions"
        if isinstance(error, PermissionError)
        else "cut this slide's shards again with `mad shard`"
    )


def not_a_tile(where: str, image: Image | None, tile_px: int) -> MadError:
    """What to raise for another image than the table's, an unreadable one or one of another size; `where` names tar and tile."""
    found = (
        "is no readable image, or not that of its table"
        if image is None
        else f"has {image.shape[1]} x {image.shape[0]} px"
    )
    return MadError(f"{where} {found} (tile_px is {tile_px}); {mend_tar()}")


class TileReader:
    """Decodes tiles by row of an index; keeps the tars open. Safe to use after a fork: reads carry their own position; for one
    thread.

    A tile's bytes are compared with the digest of its table when they are first read, as shards do not change under a run.
    They are read into one space for all: with new memory for each, and for its pixels, the heap grows and shrinks every time.
    """

    def __init__(self, index: Index, tile_px: int) -> None:
        self.tile_px = tile_px
        self._folder = index.folder
        self._ids = _fixed_width(index.rows["tile_id"])
        tars, self._tars = pd.factorize(index.rows["shard"])
        offsets, sizes = (index.rows[name].to_numpy(dtype=np.int64) for name in ("offset", "size"))
        self._places = np.column_stack([tars, offsets, sizes])
        self._space = bytearray(sizes.max(initial=0))
        self._digests = _fixed_width(index.rows["sha256"])
        self._positions = index.rows["position"].to_numpy()
        self._known = bytearray(len(index.rows))
        self._open: OrderedDict[int, int] = OrderedDict()

    def tile_id(self, row: int) -> str:
        """The id of the tile in `row`."""
        return self._ids[row].decode()

    def position(self, row: int) -> int:
        """The place of the child in `row` under its parent, row-major; -1 for other tiles."""
        return int(self._positions[row])

    def read(self, row: int) -> Image:
        """The RGB pixels [tile_px, tile_px, 3] of the tile in `row`.

        Raises:
            MadError: the tar is missing, the bytes are not those of its table or no image, or the image's size differs.
        """
        tar, offset, size = self._places[row].tolist()
        space = memoryview(self._space)[:size]
        data = space[: os.preadv(self._descriptor(tar), [space], offset)]
        if not self._known[row]:
            self._known[row] = hashlib.sha256(data).hexdigest().encode() == self._digests[row]
        image, tile_px = readable(data) if self._known[row] else None, self.tile_px
        if image is None or image.shape != (tile_px, tile_px, 3):
            where = f"{self._folder / str(self._tars[tar])}: tile {self.tile_id(row)} at byte {offset}"
            raise not_a_tile(where, image, tile_px)
        return image

    def _descriptor(self, tar: int) -> int:
        if tar in self._open:
            self._open.move_to_end(tar)
            return self._open[tar]
        path = self._folder / str(self._tars[tar])
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise MadError(f"{path}: {error.strerror}; {mend_tar(error)}") from None
        self._open[tar] = descriptor
        if len(self._open) > MAX_OPEN_TARS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        """Close every tar."""
        while self._open:
            os.close(self._open.popitem()[1])


def _fixed_width(texts: pd.Series) -> npt.NDArray[np.bytes_]:
    """As bytes: of Python objects a forked process makes copies, as it counts references to them. Digests stay where they are."""
    array = pa.array(texts).cast(pa.large_string()).fill_null("")
    lengths = pc.binary_length(array)
    width = pc.max(lengths).as_py() or 1
    if pc.min(lengths).as_py() != width:
        array = pc.ascii_rpad(array, width, padding="\0")
    _, ends, data = array.buffers()
    start = np.frombuffer(ends, np.int64)[array.offset] if len(array) else 0
    return np.frombuffer(data or b"", f"S{width}", len(array), start)
