"""Whole files or none: atomic writes, JSON, Parquet and digests.

Every file of `results/` is written to a temporary name beside its final one and renamed into place, so that whatever bears
a final name is complete (DESIGN §6.2). JSON is sorted and Parquet carries no time stamp: equal content gives equal bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Pathlike = str | os.PathLike[str]
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class MadError(Exception):
    """An error for the user: its text says what is wrong, in which file or key, and what would mend it."""


class StorageError(MadError):
    """A file cannot be written, or read for the machine's own reasons: never the fault of a slide."""


def unreadable(path: Pathlike, error: OSError) -> StorageError:
    """What to raise where the system cannot read a file that is there: its content is not at fault."""
    return StorageError(f"{path}: cannot be read ({error}); mend the disk or its mount, and run again")


@contextmanager
def atomic_path(path: Pathlike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it is flushed to disk and renamed to `path`, otherwise removed.

    The temporary name keeps the suffix, since writers choose their format by it.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:60]}.", suffix=path.suffix)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error}); mend the folder or the key `results`") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if not temporary.exists():  # some writers remove what they could not finish, and say nothing
            raise StorageError(f"{path}: could not be written; is the disk full?")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StorageError(
            f"{path}: cannot be written ({os.strerror(error.errno)}; {shutil.disk_usage(path.parent).free / 1e9:.3g} GB are "
            "free there); make room and run it again: what is finished is kept"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Pathlike) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on a clean exit it takes the place of `path`, otherwise it is removed.

    Raises:
        StorageError: the folder cannot be made.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:60]}."))
    except OSError as error:
        raise StorageError(f"{path}: cannot be made ({error}); mend the folder or the key `results`") from None
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def to_json(value: Any) -> str:
    """`value` as sorted, indented JSON. NaN and infinities are refused: a missing number is `null`."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Pathlike, value: Any) -> None:
    """Write `value` atomically as `to_json` renders it."""
    with atomic_path(path) as temporary:
        temporary.write_text(to_json(value), encoding="utf-8")


def write_json_if_changed(path: Pathlike, value: Any) -> bool:
    """Write `value` only where it differs from what `path` holds, so that its time stamp tells of a change. True if written."""
    path, text = Path(path), to_json(value)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_json(path, value)
    return True


def read_json(path: Pathlike) -> Any:
    """The content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_parquet(path: Pathlike, table: pd.DataFrame) -> None:
    """Write a table atomically, without its index."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


def read_parquet(path: Pathlike, columns: list[str] | None = None) -> pd.DataFrame:
    """A table, or some columns of it.

    Raises:
        MadError: the file is missing; its folder is named after the stage that makes it.
    """
    import pandas as pd

    if not Path(path).exists():
        raise MadError(f"{path}: no such table; run the stage that makes it first")
    return pd.read_parquet(path, columns=columns)


def digest(value: Any, length: int = 16) -> str:
    """Hexadecimal SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()[:length]


def sha256_file(path: Pathlike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_there(path: Pathlike) -> bool:
    """Whether there is such a file; False where a folder above it may not be entered, of which `Path.exists` makes an error."""
    return os.path.exists(path)  # noqa: PTH110


def file_stamp(path: Pathlike) -> list[str | int] | None:
    """Path, size and time of change of a large file, by which a later run tells whether it is still the same.

    None where it is gone, or in a folder that may not be entered.
    """
    path = Path(path)
    try:
        found = path.stat()
    except OSError:
        return None
    return [str(path), found.st_size, found.st_mtime_ns]
