"""The files of stage `embed`: one slide's embeddings, their tile ids, and a stamp, written last, of what they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mad.files import atomic_path, digest, read_json, write_json, write_parquet

ABSENT = "absent"  # `status` of an encoder whose weights cannot be had


def is_fresh(folder: Path, slide_id: str, key: dict[str, Any]) -> bool:
    """Whether a slide's embeddings are whole and were made from just these inputs by just this encoder."""
    files = [folder / f"{slide_id}.{kind}" for kind in ("json", "npy", "parquet")]
    return all(file.exists() for file in files) and read_json(files[0])["key"] == digest(key)


def write_embeddings(
    folder: Path, slide_id: str, key: dict[str, Any], tile_ids: pd.Series, vectors: np.ndarray
) -> None:
    """Write a slide's embeddings [n, d] as float32, with the `tile_ids` [n] of their rows."""
    (folder / f"{slide_id}.json").unlink(missing_ok=True)
    with atomic_path(folder / f"{slide_id}.npy") as temporary:
        np.save(temporary, vectors.astype(np.float32))
    write_parquet(folder / f"{slide_id}.parquet", pd.DataFrame({"tile_id": tile_ids.astype("string")}))
    write_json(folder / f"{slide_id}.json", {"key": digest(key), "tiles": len(tile_ids)})
