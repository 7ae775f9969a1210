"""Embeddings as TRIDENT writes them, from `embed/{encoder}/`: one HDF5 file per slide and magnification.

TRIDENT (github.com/mahmoodlab/TRIDENT; written by `trident/wsi_objects/WSI.py: extract_patch_features`, read by
`extract_slide_features` and by the multiple-instance learning built on it) keeps them in
`{magnification}x_{px}px_{overlap}px_overlap/features_{encoder}/{slide}.h5` (with `dense` in `features_{encoder}_dense/`, so that
no folder holds slides of both kinds):

- `features` float32 [n, d], with attributes `name`, `savetodir` and `encoder`; `weights_sha256` beside them is ours.
- `coords` int64 [n, 2], row for row, with the attributes of its coordinate files (`mad.tiles.export`).

A further data set `tile_id` (TRIDENT does not read it) joins the rows to our tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mad.files import MadError, read_json, read_parquet
from mad.tiles.export import COLUMNS, Selection, layout, targets, trident_attributes, write_coords


def export_features(
    results: Path,
    slides: Sequence[str],
    encoder: str,
    selection: Selection,
    tile_px: int,
    folder: Path,
    *,
    dense: bool = False,
) -> dict[str, int]:
    """Write the embeddings of `slides` by one encoder below `folder`.

    Args:
        dense: every tile of the slides of the segmentation maps, from `embed/{encoder}/dense/`, instead of the tiles that the
            shards hold.

    Returns:
        Tiles written per slide id; slides without such a tile are left out.

    Raises:
        MadError: as `mad.tiles.export.targets`, or the embeddings are absent, not whole, or of tiles that are cut no more.
    """
    source = results / "embed" / encoder
    audit = _audit(source)
    where = folder / layout(selection.magnification, tile_px)
    out = where / f"features_{encoder}{'_dense' if dense else ''}"
    written = {}
    for target in targets(results, slides, selection.magnification):
        found = _embedded(source / "dense" if dense else source, target.slide)
        if found is None:
            continue
        ids, vectors = found
        tiles = read_parquet(results / "tile" / f"{target.slide}.parquet", columns=COLUMNS)
        if not ids.isin(tiles["tile_id"]).all():
            raise MadError(
                f"{source}: {target.slide} was tiled anew since it was embedded; run `snakemake --cores 2 embed` again"
            )
        row_of = pd.Series(np.arange(len(ids)), index=ids)
        chosen = selection.of(tiles[tiles["tile_id"].isin(ids)])
        if chosen.empty:
            continue
        attributes = trident_attributes(target.plan, tile_px, target.dimensions(), target.name, str(where))
        about = {"name": target.name, "savetodir": str(out), "encoder": encoder}
        if audit.get("weights_sha256"):
            about["weights_sha256"] = audit["weights_sha256"]
        rows = row_of[chosen["tile_id"]].to_numpy()
        write_coords(out / f"{target.name}.h5", chosen, attributes, (np.asarray(vectors[rows], np.float32), about))
        written[target.slide] = len(chosen)
    return written


def not_embedded(results: Path, slides: Sequence[str], encoder: str, *, dense: bool = False) -> list[str]:
    """Those of `slides` that the encoder has not embedded, or with `dense` not every tile of."""
    source = results / "embed" / encoder / ("dense" if dense else "")
    return [slide for slide in slides if not (source / f"{slide}.json").exists()]  # written last


def _audit(source: Path) -> dict[str, Any]:
    """What the encoder was.

    Raises:
        MadError: it has not embedded the cohort, or its weights could not be had.
    """
    path = source / "audit.json"
    if not path.exists():
        raise MadError(f"{path}: no such file; embed the slides first: `snakemake --cores 2 embed`")
    audit: dict[str, Any] = read_json(path)
    if audit.get("status") == "absent":
        raise MadError(f"encoder {source.name!r} is absent: {audit['reason']}")
    return audit


def _embedded(folder: Path, slide: str) -> tuple[pd.Series, NDArray[np.float32]] | None:
    """Tile ids [n] and embeddings [n, d] of a slide; None where it has none.

    Raises:
        MadError: they are not whole.
    """
    array = folder / f"{slide}.npy"
    if not (folder / f"{slide}.json").exists():  # written last
        return None
    ids = read_parquet(folder / f"{slide}.parquet", columns=["tile_id"])["tile_id"]
    vectors: NDArray[np.float32] = np.load(array, mmap_mode="r", allow_pickle=False)
    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise MadError(f"{array}: {vectors.shape} for {len(ids)} tiles; delete it and run `mad embed` again")
    return ids, vectors
