"""Tiles from elsewhere: a CSV of image files with their scale and labels, as the protocols see a cohort.

Columns: `path` (relative to the CSV's folder), `mpp` or `magnification`, `label`, `patient_id`; optional are `split` (train, val or
test; drawn per patient where the column is missing), `slide_id` (the patient's where it is missing), and `parent`: the path of the
coarser tile that this one lies in. Public tile sets at several um/px are evaluated so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from mad.evaluation.data import UNLABELLED, Embedded, kind_of
from mad.files import MadError, Pathlike
from mad.progress import track
from mad.slides.sheet import SPLITS, draw_split

SHOWN = 5  # faults that an error lists


def read_tile_table(path: Pathlike, *, fractions: Mapping[str, float], seed: int) -> pd.DataFrame:
    """The table, checked: path slide_id patient_id magnification split label parent, one row per image.

    Args:
        path: of the CSV (or TSV, by its suffix).
        fractions: share of the patients per split, where the table has no `split`.
        seed: of the draw.

    Raises:
        MadError: names every kind of fault with the lines that have it.
    """
    path = Path(path)
    if not path.is_file():
        raise MadError(f"{path}: no such table of tiles")
    table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", dtype="string", skip_blank_lines=False)
    table = table.rename(columns=lambda name: str(name).strip().lower())
    table.index += 2  # as an editor counts the lines
    scale = [name for name in ("mpp", "magnification") if name in table]
    if missing := [name for name in ("path", "label", "patient_id") if name not in table] + ([] if scale else ["mpp"]):
        raise MadError(
            f"{path}: has no column {', '.join(missing)}; it needs path, mpp (or magnification), label, patient_id"
        )
    number = pd.to_numeric(table[scale[0]], errors="coerce").astype("float64")
    named = table["path"].fillna("").str.strip()
    faults = {
        "no path": named == "",
        "a path that an earlier line has": named.duplicated() & (named != ""),
        "no patient_id": table["patient_id"].fillna("").str.strip() == "",
        f"a {scale[0]} that is no positive number": ~(number > 0),
    }
    if "split" in table:
        faults[f"a split that is none of {', '.join(SPLITS)}"] = ~table["split"].isin(SPLITS)
    if "parent" in table:
        faults["a parent that is no path of the table"] = table["parent"].notna() & ~table["parent"].isin(named)
    told = [f"{what}: {_lines(where)}" for what, where in faults.items() if where.any()]
    if told:
        raise MadError(f"{path}: lines with " + "; lines with ".join(told))
    split = (
        table["split"] if "split" in table else table["patient_id"].map(lambda name: draw_split(name, fractions, seed))
    )
    read = pd.DataFrame(
        {
            "path": named,
            "slide_id": table["slide_id"] if "slide_id" in table else table["patient_id"],
            "patient_id": table["patient_id"],
            "magnification": 10 / number if scale[0] == "mpp" else number,
            "split": split,
            "label": table["label"],
            "parent": table["parent"] if "parent" in table else pd.Series(pd.NA, table.index, dtype="string"),
        }
    ).reset_index(drop=True)
    _check_sides(read, path)
    return read


def _lines(where: pd.Series) -> str:
    lines = [str(line) for line in where.index[where]]
    return ", ".join(lines[:SHOWN]) + (f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")


def _check_sides(table: pd.DataFrame, path: Path) -> None:
    """No patient, and no parent with its child, on two sides."""
    sides = table.groupby("patient_id")["split"].nunique()
    if (sides > 1).any():
        raise MadError(f"{path}: patient {sides.index[sides > 1][0]} has tiles in two splits")
    split_of = dict(zip(table["path"], table["split"], strict=True))
    child = table[table["parent"].notna()]
    apart = child[child["split"] != child["parent"].map(split_of)]
    if len(apart):
        raise MadError(f"{path}: {apart['path'].iloc[0]} and its parent are in two splits")


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image file as RGB [h, w, 3].

    Raises:
        MadError: it is missing, or no image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise MadError(f"{path}: cannot be read as an image ({error}); the table names it") from None


def check_images(table: pd.DataFrame, folder: Path) -> int:
    """The side that all images of a table have, in pixels.

    Raises:
        MadError: a file cannot be read, is not square or not of the size of the first; or two files of different splits show the
            same pixels, which would let a test tile be seen in training.
    """
    side, seen = 0, dict[bytes, int]()
    for row, name in enumerate(track(table["path"], "check tiles", unit="tiles")):
        pixels = read_image(folder / name)
        side = side or pixels.shape[0]
        if pixels.shape != (side, side, 3):
            raise MadError(
                f"{folder / name}: {pixels.shape[1]} x {pixels.shape[0]} px; all tiles of a table are squares of one size, the "
                f"first has {side} px"
            )
        twin = seen.setdefault(hashlib.sha256(pixels.tobytes()).digest(), row)
        if table["split"].iloc[twin] != table["split"].iloc[row]:
            raise MadError(
                f"{name} and {table['path'].iloc[twin]} show the same pixels in two splits; remove one or give both one split"
            )
    return side


def embedded_tiles(table: pd.DataFrame, features: NDArray[np.float32], background: str | None) -> Embedded:
    """A checked table and its embeddings [n, d] as the protocols take them; classes are the labels in order of their names."""
    classes = sorted(table["label"].dropna().unique())
    code = {name: number for number, name in enumerate(classes)}
    codes = table["label"].map(code).fillna(UNLABELLED).astype(np.int64)
    row_of = {name: row for row, name in enumerate(table["path"])}
    child = table.index[table["parent"].notna()].to_numpy()
    parent = table["parent"].iloc[child].map(row_of).to_numpy(np.int64)
    magnification = table["magnification"].to_numpy(np.float64)
    pairs = pd.DataFrame(
        {
            "kind": [kind_of(magnification[a], magnification[b]) for a, b in zip(parent, child, strict=True)],
            "parent": parent,
            "child": child.astype(np.int64),
        }
    )
    pairs["position"] = pairs.groupby("parent").cumcount().astype(np.int8)
    tiles = table.rename(columns={"path": "tile_id"}).assign(code=codes)
    columns = ["tile_id", "slide_id", "patient_id", "magnification", "split", "label", "code"]
    return Embedded(tiles=tiles[columns], features=features, pairs=pairs, classes=classes, background=background)
