"""Stored embeddings, as stage `embed` leaves them in `embed/{encoder}/`: an array and a table of tile ids per slide, an audit."""

from __future__ import annotations

import errno
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mad.files import MadError, Pathlike, digest, read_json, read_parquet, sha256_file

BESIDE = ("encoder", "config", "mpp_seen")  # in audit.json, beside what the encoder tells of itself


def read_audit(folder: Pathlike) -> dict[str, Any]:
    """What `folder`/audit.json tells of an encoder; `"status": "absent"` where it could not be had.

    Raises:
        MadError: there are no finished embeddings.
    """
    folder = Path(folder)
    if not (folder / "audit.json").exists():
        raise MadError(f"{folder}: no finished embeddings; run `mad embed` for encoder {folder.name!r} first")
    audit: dict[str, Any] = read_json(folder / "audit.json")
    return audit


def encoder_digest(audit: dict[str, Any]) -> str | None:
    """What made embeddings, of their audit: the weights' digest, or one of weights, arguments and configuration where it has these.

    None where there are no weights.
    """
    weights: str | None = audit.get("weights_sha256")
    more = {key: audit[key] for key in ("args", "config_sha256") if key in audit}
    return digest([weights, more], length=64) if weights and more else weights


def read_embeddings(folder: Pathlike, slide: str) -> tuple[pd.DataFrame, np.ndarray]:
    """A slide's table (`tile_id`) and, row for row, its embeddings float32 [n, d], memory-mapped.

    Raises:
        MadError: the slide is not embedded whole, the two do not fit, or too many files are open.
    """
    folder = Path(folder)
    path = folder / f"{slide}.npy"
    if not all((folder / f"{slide}.{kind}").exists() for kind in ("json", "npy", "parquet")):
        encoder = folder.parent.name if folder.name == "dense" else folder.name
        raise MadError(f"{path}: not embedded whole; run `mad embed` for encoder {encoder!r} again")
    rows = read_parquet(folder / f"{slide}.parquet", ["tile_id"])
    features = map_array(path)
    if features.ndim != 2 or len(features) != len(rows):
        raise MadError(f"{path}: {features.shape} for {len(rows)} tiles; delete it and run `mad embed` again")
    return rows, features


def map_array(path: Pathlike) -> np.ndarray:
    """A stored array, memory-mapped; while it is held, it is one of the files that the process may have open.

    Raises:
        MadError: too many are.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise MadError(
            f"{path}: too many open files. Every slide's array is one, and this process may open {soft}: `ulimit -n` has to allow "
            f"some hundreds more than there are slides. The hard limit is {hard} (`ulimit -Hn`); whoever runs the machine raises it"
        ) from None


def source_key(audit: dict[str, Any], source: str) -> dict[str, Any]:
    """What a slide's embeddings of its shards are known by: the encoder's audit, and the digest of what it read."""
    return {"encoder": {name: value for name, value in audit.items() if name not in BESIDE}, "input": source}


def check_source(folder: Pathlike, slide: str, table: Pathlike) -> None:
    """Fail unless a slide's stored embeddings were made from the shard table `table` as it is now.

    Raises:
        MadError: they were made from another one, or by another encoder than the audit's.
    """
    folder, audit = Path(folder), read_audit(folder)
    if str(audit.get("spec")).startswith("adapter:"):  # it has read its base's embeddings
        base = folder.parent / audit["base"]["encoder"]
        check_source(base, slide, table)
        source = read_json(base / f"{slide}.json")["key"]
    else:
        source = sha256_file(table)
    if read_json(folder / f"{slide}.json")["key"] != digest(source_key(audit, source)):
        raise MadError(
            f"{folder / slide}.npy: embedded from other tiles than those of {table} now; run `mad embed {folder.name}` again"
        )
