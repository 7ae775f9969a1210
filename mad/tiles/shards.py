"""WebDataset shards with byte offsets: tar files whose bytes depend on their content alone.

A pair is `KEY.parent.jpg KEY.00.jpg … KEY.15.jpg KEY.json`, a standalone tile `KEY.jpg KEY.json`; KEY is the sample's tile
id. Members carry a fixed time, owner and mode. Labels are not inside: relabelling never rewrites pixels.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import cv2
import imagecodecs
import numpy as np
import simplejpeg

from mad.files import MadError, atomic_path

BLOCK = tarfile.BLOCKSIZE
BLANK_HEADER = tarfile.TarInfo().tobuf(tarfile.GNU_FORMAT)
BLANK_SUM = sum(BLANK_HEADER) - sum(BLANK_HEADER[124:135]) - sum(BLANK_HEADER[148:156]) + 8 * ord(" ")


def encode(pixels: np.ndarray, *, format: str, quality: int, subsampling: str) -> bytes:
    """An RGB uint8 tile as JPEG, or losslessly as PNG or WebP. The same pixels give the same bytes."""
    if format == "jpg":
        return bytes(imagecodecs.jpeg8_encode(pixels, level=quality, subsampling=subsampling))
    return bytes(imagecodecs.png_encode(pixels) if format == "png" else imagecodecs.webp_encode(pixels, lossless=True))


def decode(data: bytes | memoryview) -> np.ndarray:
    """An encoded tile as RGB uint8 [h, w, 3]."""
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(data, strict=True)
    return imagecodecs.png_decode(data) if data[:4] == b"\x89PNG" else imagecodecs.webp_decode(data)  # type: ignore[arg-type]


def blur_score(pixels: np.ndarray) -> float:
    """Variance of the Laplacian of the grey image: small where a tile is out of focus (or blank)."""
    laplacian = cv2.Laplacian(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.CV_16S)
    mean = cv2.sumElems(laplacian)[0] / laplacian.size
    return cv2.norm(laplacian, cv2.NORM_L2SQR) / laplacian.size - mean * mean


def member_header(name: str, size: int) -> bytes:
    """The tar header of a member of `size` bytes, with a fixed time, owner and mode: a block, or three for a long name.

    It is that of `tarfile`, which takes as long as the digest of a tile; here only name, size and checksum are filled in.
    """
    raw = name.encode()
    if len(raw) > tarfile.LENGTH_NAME or size > 0o77777777777:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)
    header = bytearray(BLANK_HEADER)
    header[: len(raw)] = raw
    header[124:135] = b"%011o" % size
    header[148:154] = b"%06o" % (BLANK_SUM + sum(raw) + sum(header[124:135]))
    return bytes(header)


class ShardWriter:
    """Writes the samples of one slide, split and kind into numbered tars of at most `max_bytes` (one sample at least).

    A context manager: each tar gets its final name when it is complete, and none is left behind by an exception. `names` are
    those begun; `tars` tells the finished ones' `bytes` and `sha256`.
    """

    def __init__(self, folder: Path, stem: str, max_bytes: int) -> None:
        self._folder, self._stem, self._max_bytes = folder, stem, max_bytes
        self._open = ExitStack()
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self.names: list[str] = []
        self.tars: dict[str, dict[str, Any]] = {}

    def add(self, key: str, images: Mapping[str, bytes], meta: Mapping[str, Any]) -> list[tuple[str, int, int]]:
        """Append one sample.

        Args:
            key: the sample's tile id.
            images: extension (`jpg`, `parent.jpg`, `00.jpg`, …) -> encoded bytes, in the order of the tar.
            meta: the content of its JSON member.

        Returns:
            (shard file name, offset, size) of each image, in the same order.
        """
        parts: list[bytes] = []
        offsets, end = [], 0
        for extension, data in (*images.items(), ("json", json.dumps(meta, sort_keys=True).encode())):
            header = member_header(f"{key}.{extension}", len(data))
            parts += (header, data, bytes(-len(data) % BLOCK))
            offsets.append(end + len(header))
            end = offsets[-1] + len(data) + len(parts[-1])
        if self._file and self._file.tell() + end > self._max_bytes:
            self._finish()
        if self._file is None:
            self.names.append(f"{self._stem}-{len(self.names):06d}.tar")
            temporary = self._open.enter_context(atomic_path(self._folder / self.names[-1]))
            self._file = self._open.enter_context(temporary.open("wb"))
        start = self._file.tell()
        self._write(b"".join(parts))
        return [(self.names[-1], start + at, len(data)) for at, data in zip(offsets, images.values(), strict=False)]

    def _write(self, data: bytes) -> None:
        assert self._file
        self._file.write(data)
        self._digest.update(data)

    def _finish(self) -> None:
        if self._file:
            self._write(bytes(2 * BLOCK))
            self.tars[self.names[-1]] = {"bytes": self._file.tell(), "sha256": self._digest.hexdigest()}
            self._file, self._digest = None, hashlib.sha256()
            self._open.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *fault: Any) -> None:
        if fault[0] is None:
            self._finish()
        else:
            self._open.__exit__(*fault)


def read_member(folder: Path, shard: str, offset: int, size: int, sha256: str | None = None) -> bytes:
    """The bytes of one member of a tar, by its place in the shard table.

    Raises:
        MadError: the file is missing or short, or its bytes differ from the recorded digest.
    """
    path = folder / shard
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except FileNotFoundError:
        raise MadError(f"{path}: no such shard; {_mend(path)}") from None
    if len(data) != size or (sha256 and hashlib.sha256(data).hexdigest() != sha256):
        raise MadError(f"{path}: {size} bytes at {offset} are not those of its index; {_mend(path)}")
    return data


def _mend(path: Path) -> str:
    return f"make it again with `snakemake --cores 1 --force {path.parent}.parquet`"
