"""Whole files or none."""

import json
from pathlib import Path

import pandas as pd
import pytest

from mad.files import (
    MadError,
    StorageError,
    atomic_folder,
    atomic_path,
    digest,
    read_json,
    read_parquet,
    write_json,
    write_json_if_changed,
    write_parquet,
)


def test_a_failure_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.txt"]


def test_json_is_sorted_stable_and_finite(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert write_json_if_changed(path, {"b": 1, "a": [1.5, None]})
    stamp = path.stat().st_mtime_ns
    assert not write_json_if_changed(path, {"a": [1.5, None], "b": 1})
    assert path.stat().st_mtime_ns == stamp
    assert list(json.loads(path.read_text())) == ["a", "b"]
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": [1.5, None], "b": 1}
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


def test_parquet_bytes_depend_on_content_alone(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": ["x", None], "b": [1, 2]}).astype({"a": "string"})
    write_parquet(tmp_path / "1.parquet", table)
    write_parquet(tmp_path / "2.parquet", table.copy())
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
    pd.testing.assert_frame_equal(read_parquet(tmp_path / "1.parquet"), table)
    with pytest.raises(MadError, match="run the stage that makes it"):
        read_parquet(tmp_path / "3.parquet")


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "made" / "folder") as folder:
        (folder / "first").write_text("1")
    with pytest.raises(ValueError), atomic_folder(tmp_path / "made" / "folder") as folder:
        (folder / "second").write_text("2")
        raise ValueError
    assert [path.name for path in (tmp_path / "made").rglob("*")] == ["folder", "first"]
    with atomic_folder(tmp_path / "made" / "folder") as folder:
        (folder / "second").write_text("2")
    assert [path.name for path in (tmp_path / "made").rglob("*")] == ["folder", "second"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"), atomic_folder(tmp_path / "file" / "folder"):
        pass
