"""Tiles from elsewhere: a CSV of image files with their scale and labels, as the protocols see a cohort.

Columns: `path` (relative to the CSV's folder), `mpp` or `magnification`, `label`, `patient_id`; optional are `split` (train, val or
test; drawn per patient where the column is missing), `slide_id` (the patient's where it is blank or missing), and `parent`: the
path of the coarser tile of the same slide that this one lies in; `site` and `scanner`, to leave each out in turn. Public tile sets
at several um/px are evaluated so; where they name no parents, what compares a parent with its children is left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from mad.evaluation.data import SHEET_COLUMNS, UNLABELLED, Embedded, kind_of
from mad.evaluation.duplicates import UNIFORM
from mad.files import MadError, Pathlike
from mad.slides.sheet import SPLITS, draw_split
from mad.tiles.shards import blur_score

SHOWN, SHOWN_TWINS = 5, 10  # faults that an error lists
MODES = ("L", "RGB", "RGBA", "P", "1")  # of Pillow, whose colours 8-bit RGB holds


def read_tile_table(
    path: Pathlike, *, fractions: Mapping[str, float], seed: int, magnifications: Sequence[float], tolerance: float
) -> pd.DataFrame:
    """The table, checked: path slide_id patient_id magnification split label parent (site scanner), one row per image.

    Args:
        path: of the CSV (or TSV, by its suffix).
        fractions: share of the patients per split, where the table has no `split`.
        seed: of the draw.
        magnifications: the ladder; every tile gets the step that its um/px is nearest to.
        tolerance: share of a step's um/px by which a tile's may differ.

    Raises:
        MadError: names every kind of fault with the lines that have it.
    """
    path = Path(path)
    table = _cells(path)
    scale = [name for name in ("mpp", "magnification") if name in table]
    if missing := [name for name in ("path", "label", "patient_id") if name not in table] + ([] if scale else ["mpp"]):
        raise MadError(
            f"{path}: has no column {', '.join(missing)}; it needs path, mpp (or magnification), label, patient_id"
        )
    if table.empty:
        raise MadError(f"{path}: has no line below its header; it needs one line per image")
    for name in {"slide_id", "parent"} - set(table):
        table[name] = pd.Series(pd.NA, table.index, dtype="string")
    named, parent = (_one_spelling(table[name], path.parent) for name in ("path", "parent"))
    patient = table["patient_id"]
    slide = table["slide_id"].fillna(patient)
    number = pd.to_numeric(table[scale[0]], errors="coerce").astype("float64")
    is_scale = (number > 0) & np.isfinite(number)
    magnification = _snap(number if scale[0] == "mpp" else 10 / number, magnifications, tolerance)
    ladder = ", ".join(f"{step:g}" for step in magnifications)
    line_of = {name: line for line, name in named.dropna().items()}
    known = parent.isin(line_of.keys()) & parent.notna()
    of = parent[known].map(line_of).astype("int64")
    home = pd.Series(list(zip(patient.fillna(""), slide.fillna(""), strict=True)), table.index)
    elsewhere, no_coarser = (pd.Series(False, table.index) for _ in range(2))
    elsewhere[known] = home[of].to_numpy() != home[known].to_numpy()
    no_coarser[known] = magnification[of].to_numpy() >= magnification[known].to_numpy()
    faults = {
        "no path": named.isna(),
        "a path that an earlier line has": named.duplicated() & named.notna(),
        "no patient_id": patient.isna(),
        "a slide_id that two patients share": patient.groupby(slide).transform("nunique").fillna(0) > 1,
        f"a {scale[0]} that is no positive number": ~is_scale,
        f"a {scale[0]} of no magnification in tile.magnifications ({ladder}; put it there)": is_scale
        & magnification.isna(),
        "a parent that is no path of the table": parent.notna() & ~known,
        "a parent of another patient or slide": elsewhere,
        "a parent that is no coarser tile": no_coarser,
    }
    if "split" in table:
        faults[f"a split that is none of {', '.join(SPLITS)}"] = ~table["split"].isin(SPLITS)
    told = [f"{what}: {_lines(where)}" for what, where in faults.items() if where.any()]
    if told:
        raise MadError(f"{path}: lines with " + "; lines with ".join(told))
    split = table["split"] if "split" in table else patient.map(lambda name: draw_split(name, fractions, seed))
    sides = split.groupby(patient).nunique()
    if (sides > 1).any():
        raise MadError(f"{path}: patient {sides.index[sides > 1][0]} has tiles in two splits; give them one")
    columns = {
        "path": named, "slide_id": slide, "patient_id": patient, "magnification": magnification, "split": split,
        "label": table["label"], "parent": parent, **{name: table[name] for name in SHEET_COLUMNS if name in table},
    }  # fmt: skip
    return pd.DataFrame(columns).reset_index(drop=True)


def _cells(path: Path) -> pd.DataFrame:
    """The cells as text without blanks around it, NA where nothing is left; indexed by line, columns in lower case."""
    if not path.is_file():
        raise MadError(f"{path}: no such table of tiles")
    mark = "\t" if path.suffix == ".tsv" else ","
    try:
        table = pd.read_csv(
            path, sep=mark, header=None, dtype="string", skip_blank_lines=False, keep_default_na=False, na_values=[""]
        )
    except ValueError as error:  # empty, not UTF-8, or lines of more cells than the first
        raise MadError(
            f"{path}: cannot be read as a table ({str(error).strip()}); save it as UTF-8 text with the cells separated by {mark!r}"
        ) from None
    table = table.apply(lambda cells: cells.str.strip()).replace("", pd.NA)
    table.index += 1  # as an editor counts the lines
    names = table.iloc[0].str.lower()
    table = table.loc[2:].dropna(how="all").loc[:, names.notna()].set_axis(names.dropna().tolist(), axis=1)
    if twice := sorted(set(table.columns[table.columns.duplicated()])):
        raise MadError(f"{path}: has more than one column {', '.join(twice)} (case does not count); keep one of each")
    return table


def _one_spelling(files: pd.Series, folder: Path) -> pd.Series:
    """Paths as counted from the table's folder, whole where they lie outside it; `./3.png` and `../here/3.png` are `3.png`."""
    here = folder.absolute()
    home = os.path.normpath(here) + os.sep

    def spell(name: str) -> str:
        return os.path.normpath(here / name).removeprefix(home)

    return files.map(spell, na_action="ignore").astype("string")


def _snap(mpp: pd.Series, magnifications: Sequence[float], tolerance: float) -> pd.Series:
    """The magnification of the ladder whose um/px a tile has, within a share of it; NaN where there is none."""
    steps = np.asarray(magnifications, np.float64)
    off = np.abs(mpp.fillna(np.inf).to_numpy()[:, None] * steps / 10 - 1)
    nearest = np.where(off.min(axis=1) <= tolerance, steps[off.argmin(axis=1)], np.nan)
    return pd.Series(nearest, mpp.index)


def _lines(where: pd.Series) -> str:
    lines = [str(line) for line in where.index[where]]
    return ", ".join(lines[:SHOWN]) + (f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image file of 8 bits as RGB [h, w, 3].

    Raises:
        MadError: it is missing, no image, or not of 8 bits.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise MadError(
                    f"{path}: is an image of mode {image.mode}; tiles are 8-bit ({', '.join(MODES)}): convert it"
                )
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise MadError(f"{path}: cannot be read as an image ({error}); the table names it") from None


def image_facts(pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """What `check_images` asks of an image [h, w, 3]: `height`, `width`, `sha256` of its pixels, and `blur` as in shard tables."""
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return {"height": pixels.shape[0], "width": pixels.shape[1], "sha256": digest, "blur": blur_score(pixels)}


def check_images(table: pd.DataFrame, facts: pd.DataFrame) -> int:
    """The side that all images of a table have, in pixels.

    Args:
        table: of `read_tile_table`.
        facts: of `image_facts`, row for row.

    Raises:
        MadError: an image is not square or not of the size of the first; or files of different splits show the same pixels, which
            would let a test tile be seen in training. A tile without structure, such as glass, may equal others
            (`mad.evaluation.duplicates`).
    """
    side = int(facts["height"].iloc[0])
    fits = ((facts["height"] == side) & (facts["width"] == side)).to_numpy()
    if not fits.all():
        odd = int(np.argmin(fits))
        more = f" (and {(~fits).sum() - 1} more)" if (~fits).sum() > 1 else ""
        raise MadError(
            f"{table['path'].iloc[odd]}{more}: {facts['width'].iloc[odd]} x {facts['height'].iloc[odd]} px; all tiles of a table "
            f"are squares of one size, the first has {side} px"
        )
    structured = (facts["blur"] >= UNIFORM).to_numpy()
    known = table.loc[structured, ["path", "split"]].assign(sha256=facts["sha256"])
    first = known.groupby("sha256")[["path", "split"]].transform("first")
    twins = known["path"][known["split"] != first["split"]]
    if len(twins):
        pairs = [f"{name} and {first['path'][row]}" for row, name in twins.head(SHOWN_TWINS).items()]
        more = f" and {len(twins) - SHOWN_TWINS} more" if len(twins) > SHOWN_TWINS else ""
        raise MadError(
            f"{len(twins)} pair(s) of images show the same pixels in two splits: {'; '.join(pairs)}{more}; remove one of each or "
            "give both one split"
        )
    return side


def uniform_twins(table: pd.DataFrame, facts: pd.DataFrame) -> int:
    """Tiles without structure that show the same pixels as one of another split, which `check_images` lets be.

    Args:
        table: of `read_tile_table`.
        facts: of `image_facts`, row for row.
    """
    flat = table.loc[(facts["blur"] < UNIFORM).to_numpy(), ["split"]].assign(sha256=facts["sha256"])
    return int((flat.groupby("sha256")["split"].transform("nunique") > 1).sum())


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
    columns = ["tile_id", "slide_id", "patient_id", "magnification", "split", "label", "code", *SHEET_COLUMNS]
    columns = [column for column in columns if column in tiles]
    return Embedded(tiles=tiles[columns], features=features, pairs=pairs, classes=classes, background=background)
