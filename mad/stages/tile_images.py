"""The images of a tile table: read once, embedded once.

`images.parquet` keeps what was found in every image file, by its stamp (path, size, time of change). Embeddings are kept by the
digest of the pixels, in the files of `mad.stages.embedded`: part by part in `parts/` as they come, at the end whole. So a killed
call goes on where it was, and what the same encoder has embedded of the same pixels is not embedded again.
"""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from mad.evaluation.tile_table import image_facts, read_image
from mad.files import digest, file_stamp, read_parquet, write_parquet
from mad.models.batch_size import MOST
from mad.models.embedding import embed_tiles
from mad.models.encoders import Encoder
from mad.progress import log, track
from mad.stages.embedded import is_fresh, write_embeddings
from mad.tiles.embeddings import read_embeddings

PART = MOST
"""Tiles that are written at once: the largest batch that is found."""
WHOLE = "embeddings"


def look_at_images(paths: list[Path], store: Path) -> pd.DataFrame:
    """`image_facts` of every image, row for row, with its `stamp`. Those that `store` holds are not read; the others go there.

    Raises:
        MadError: a file cannot be read; what was found until then is kept.
    """
    stamps = pd.Series([digest(file_stamp(path.absolute())) for path in paths])
    known = [read_parquet(store)] if store.exists() else []
    new = np.flatnonzero(~stamps.isin(known[0]["stamp"])) if known else np.arange(len(paths))
    if len(new) < len(paths):
        log(f"check tiles: {len(paths) - len(new)} of {len(paths)} images are as they were: not read again")
    found = []
    try:
        for row in track(new, "check tiles", unit="tiles") if len(new) else ():
            found.append({"stamp": stamps[row], **image_facts(read_image(paths[row]))})
    finally:
        if found:
            known.append(pd.DataFrame(found))
            write_parquet(store, pd.concat(known, ignore_index=True))
    return pd.concat(known).drop_duplicates("stamp").set_index("stamp").loc[stamps].reset_index()


def embed_images(
    encoder: Encoder, name: str, paths: list[Path], pixels: pd.Series, batch: int | None, folder: Path
) -> np.ndarray:
    """Embeddings float32 [n, d] of images, row for row; also in `folder`/embeddings.{npy,parquet,json}.

    Args:
        encoder: takes the images.
        name: of the encoder, for messages.
        paths: of the images [n].
        pixels: digests of their pixels [n]; equal ones are embedded once.
        batch: tiles per forward pass, as `embed_tiles` takes it.
        folder: of this encoder.

    Raises:
        MadError: an image cannot be read any more, or an embedding is not finite.
    """
    key, parts, what = {"encoder": encoder.audit}, folder / "parts", f"embed {name}"
    first = pixels.drop_duplicates()
    ids, rows = pd.Index(first), first.index.to_numpy()
    features, done = np.empty((len(ids), encoder.audit["dim"]), np.float32), np.zeros(len(ids), bool)

    def fill(tile_ids: pd.Series, vectors: np.ndarray) -> None:
        place = ids.get_indexer(pd.Index(tile_ids))
        features[place[place >= 0]] = vectors[place >= 0]
        done[place[place >= 0]] = True

    for store, part in ((folder, WHOLE), *((parts, stamp.stem) for stamp in sorted(parts.glob("*.json")))):
        if is_fresh(store, part, key):
            table, vectors = read_embeddings(store, part)
            fill(table["tile_id"], vectors)
    missing = np.flatnonzero(~done)
    if done.any():
        log(f"{what}: {done.sum()} of {len(ids)} different tiles were embedded before and are reused")
    images = track((read_image(paths[row]) for row in rows[missing]), what, total=len(missing), unit="tiles")
    for start in range(0, len(missing), PART):
        now = missing[start : start + PART]
        names = [str(paths[row]) for row in rows[now]]
        vectors = embed_tiles(encoder, islice(images, PART), batch, what, names.__getitem__)
        write_embeddings(parts, ids[now[0]], key, first.iloc[now], vectors)
        fill(first.iloc[now], vectors)
    whole = features if len(ids) == len(pixels) else features[ids.get_indexer(pd.Index(pixels))]
    if not is_fresh(folder, WHOLE, key) or read_embeddings(folder, WHOLE)[0]["tile_id"].tolist() != pixels.tolist():
        if is_fresh(folder, WHOLE, key):  # a part of what is written now: not to be lost if that is interrupted
            parts.mkdir(exist_ok=True)
            for suffix in (".npy", ".parquet", ".json"):
                (folder / f"{WHOLE}{suffix}").replace(parts / f"{WHOLE}{suffix}")
        write_embeddings(folder, WHOLE, key, pixels, whole)
    shutil.rmtree(parts, ignore_errors=True)
    return whole
