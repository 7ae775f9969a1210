"""Are the shards still what was written: every byte of every tar against the shard table and the tars' own digests.

A tar's layout follows from the shard table but for its JSON members: names, sizes and offsets give every header, SHA-256
every image, and padding is zero. What a JSON member holds is known by form, and to the byte where `shard/{slide}/index.json`
records the tar's digest.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pandas as pd

from mad.files import read_json
from mad.tiles.shards import BLOCK, member_header

FORMATS = ("jpg", "png", "webp")
JSON_KEYS = {"tile_id", "kind", "x", "y", "side", "magnification", "mpp"}
MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True)
class Fault:
    """What is wrong with a tar, or with the table of a slide; `tile_id` is empty where no single tile is concerned."""

    slide_id: str
    shard: str
    tile_id: str
    cause: str


def verify_slide(folder: Path, slide_id: str) -> Iterator[tuple[str, list[Fault]]]:
    """Check the tars of one slide.

    Args:
        folder: of the shard tables.

    Yields:
        Each tar's path below `folder` and what is wrong with it; last the table itself, with what concerns no tar.
    """
    path, stamp = folder / f"{slide_id}.parquet", folder / slide_id / "index.json"
    on_disk = {f"{slide_id}/{tar.name}" for tar in (folder / slide_id).glob("*.tar")}
    try:
        table = pd.read_parquet(path)
        recorded = read_json(stamp).get("tars", {}) if stamp.exists() else {}
    except Exception as error:  # a damaged Parquet or JSON file has as many exceptions as libraries
        cause = f"no readable table or stamp beside the tars ({type(error).__name__}: {error})"
        yield path.name, [Fault(slide_id, path.name, "", cause)]
        return
    rows = table[table["status"] == "ok"]
    for shard, members in rows.groupby("shard", sort=True):
        yield str(shard), verify_tar(folder, str(shard), members, recorded.get(Path(str(shard)).name), slide_id)
    strangers = sorted(on_disk - set(rows["shard"]))
    yield path.name, [Fault(slide_id, shard, "", _stranger(Path(shard).name in recorded)) for shard in strangers]


def _stranger(is_recorded: bool) -> str:
    """Why a tar is there that the shard table does not name; stage `shard` keeps those that it cannot cut again."""
    if is_recorded:
        return "kept from before its slide was lost; put the slide back before the mend, which then takes up this tar again"
    return "the shard table does not name this tar"


def verify_tar(
    folder: Path, shard: str, members: pd.DataFrame, recorded: dict[str, Any] | None, slide_id: str
) -> list[Fault]:
    """Read one tar from its first byte to its last, and tell all that is not as it was written.

    Args:
        members: its rows of the shard table.
        recorded: its `bytes` and `sha256` from index.json, if they stand there.
    """
    faults: list[Fault] = []

    def fault(tile_id: str, cause: str) -> None:
        faults.append(Fault(slide_id, shard, tile_id, cause))

    try:
        with (folder / shard).open("rb") as file:
            tar = _Tar(file)
            ordered = members.sort_values("offset")
            samples = ordered["sample_id"].tolist()
            for row, following in zip(ordered.itertuples(), [*samples[1:], None], strict=True):
                for cause in _image_faults(tar, row):
                    fault(row.tile_id, cause)
                if row.sample_id != following:
                    for cause in _json_faults(tar, row):
                        fault(row.sample_id, cause)
            if not tar.lost:
                if tar.take(2 * BLOCK) != bytes(2 * BLOCK):
                    fault("", "does not end with two blocks of zeros after its last member")
                if rest := tar.drain():
                    fault("", f"{rest} more bytes follow the end of the archive")
    except OSError as error:
        fault("", f"cannot be read: {error.strerror}")
    else:
        if recorded and not faults and tar.digest.hexdigest() != recorded["sha256"]:
            fault("", "its SHA-256 is not that of index.json: a JSON member was changed")
    return faults


class _Tar:
    """A file that is read from front to back, hashed on the way; `lost` where a member's end is not known."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.position, self.digest, self.lost = file, 0, hashlib.sha256(), False

    def take(self, size: int) -> bytes:
        data = self._file.read(size)
        self.position += len(data)
        self.digest.update(data)
        return data

    def seek(self, position: int) -> bool:
        """Go to where the next header should be; False where the last member is known to have ended elsewhere."""
        follows = self.lost or position == self.position
        if position != self.position:
            self._file.seek(position)
        self.position, self.lost = position, False
        return follows

    def drain(self) -> int:
        """Read the rest; returns how much it was."""
        start = self.position
        while self.take(1 << 20):
            pass
        return self.position - start


def _image_faults(tar: _Tar, row: Any) -> Iterator[str]:
    """Header, pixels and padding of one row's member."""
    part = {"parent": "parent.", "child": f"{row.position:02d}.", "standalone": ""}[row.role]
    headers = {member_header(f"{row.sample_id}.{part}{format}", int(row.size)) for format in FORMATS}
    gap = int(row.offset) - tar.position
    length = gap if gap in map(len, headers) else BLOCK
    if not tar.seek(int(row.offset) - length):
        yield f"its offset {row.offset} does not follow the member before it"
    found, data, padding = tar.take(length), tar.take(int(row.size)), tar.take(-int(row.size) % BLOCK)
    if found not in headers:
        yield "the tar header before it is not the one that was written"
    if len(data) != row.size:
        yield f"the tar ends within it, at byte {tar.position}"
    elif hashlib.sha256(data).hexdigest() != row.sha256:
        yield "its bytes are not those of its SHA-256"
    if any(padding):
        yield "the padding after it is not zero"


def _json_faults(tar: _Tar, row: Any) -> Iterator[str]:
    """Header, form and padding of the JSON member that ends a sample."""
    found = tar.take(len(member_header(f"{row.sample_id}.json", 0)))
    try:
        size = tarfile.TarInfo.frombuf(found[-BLOCK:], "utf-8", "strict").size
    except tarfile.HeaderError:
        size = -1
    if not 0 <= size <= MAX_JSON_BYTES or found != member_header(f"{row.sample_id}.json", size):
        yield "the tar header of its sample's JSON member is not the one that was written"
        tar.lost = True
        return
    data, padding = tar.take(size), tar.take(-size % BLOCK)
    try:
        meta = json.loads(data)
        as_written = json.dumps(meta, sort_keys=True).encode() == data and set(meta) == JSON_KEYS
        as_written = as_written and meta["tile_id"] == row.sample_id and meta["kind"] == row.kind
    except (ValueError, TypeError):
        as_written = False
    if not as_written:
        yield "its sample's JSON member is not what was written"
    if any(padding):
        yield "the padding after its sample's JSON member is not zero"
