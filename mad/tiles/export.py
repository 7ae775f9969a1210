"""Tile coordinates as CLAM and TRIDENT read them, from the tile tables: one HDF5 file per slide and magnification.

Both hold one data set `coords`, int64 [n, 2]: x and y of each tile's upper left corner in level-0 px of the slide, with
attributes on how to read there.

- CLAM (github.com/mahmoodlab/CLAM; written by `wsi_core/WholeSlideImage.py: process_contour`, read by
  `dataset_modules/dataset_h5.py: Whole_Slide_Bag_FP` as OpenSlide's `read_region(coord, patch_level, (patch_size,
  patch_size))`): `patch_level` and `patch_size` in pixels of that level, `downsample`, `level_dim`,
  `downsampled_level_dim`, `name`, `save_path`. `extract_features_fp.py` looks for `patches/{slide}.h5` of the slides of a CSV file.
- TRIDENT (github.com/mahmoodlab/TRIDENT; written by `trident/IO.py: coords_to_h5`, read by `WSI.extract_patch_features`
  and `wsi_objects/WSIPatcher.py`): `patch_size` in pixels at `target_magnification`, `level0_magnification`,
  `patch_size_level0`, `overlap`, `name`, `savetodir`, `level0_width`, `level0_height`. Of the magnifications it uses the
  quotient alone. `run_batch_of_slides.py` looks for `{magnification}x_{px}px_{overlap}px_overlap/patches/{slide}_patches.h5`.

Both look a slide up by its file's name without the suffix. A further data set `tile_id` (neither reads it) joins their
features to our tables.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import openslide
import pandas as pd
from numpy.typing import NDArray

from mad.files import MadError, atomic_path, read_json, read_parquet
from mad.slides.readers import open_slide

Format = Literal["clam", "trident"]
COLUMNS = ["tile_id", "magnification", "x", "y", "label", "status"]
COMPOUND_SUFFIXES = (".ome.tif", ".ome.tiff")  # TRIDENT takes these off whole


@dataclass(frozen=True)
class Selection:
    """Which tiles of the tile tables go out; None takes every label."""

    magnification: float
    status: Sequence[str] = ("ok",)
    labels: Sequence[str] | None = None

    def of(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of a tile table that are meant."""
        found = table[(table["magnification"] == self.magnification) & table["status"].isin(list(self.status))]
        return found if self.labels is None else found[found["label"].isin(list(self.labels))]


@dataclass(frozen=True)
class Target:
    """A slide that goes out at one magnification."""

    slide: str
    path: str
    name: str
    """Of its file without the suffix, as CLAM and TRIDENT look it up."""
    plan: Mapping[str, Any]
    """One of `levels` of `tile/{slide}.json`: how the slide gives the magnification."""

    def dimensions(self) -> list[tuple[int, int]]:
        """(width, height) of each level of the slide."""
        with open_slide(self.path) as reader:
            return list(reader.level_dimensions)

    def openslide_dimensions(self) -> list[tuple[int, int]]:
        """(width, height) of each level as CLAM finds them; of an OME-TIFF, whose levels are SubIFDs, OpenSlide has the first.

        Raises:
            MadError: OpenSlide cannot open the slide.
        """
        try:
            with openslide.OpenSlide(self.path) as slide:
                return list(slide.level_dimensions)
        except openslide.OpenSlideError as error:
            raise MadError(
                f"{self.path}: CLAM cannot read it, since OpenSlide cannot ({error}); convert it to a tiled TIFF, or export "
                "the other slides by name"
            ) from None


def targets(results: Path, slides: Sequence[str], magnification: float) -> list[Target]:
    """Those of `slides` that were tiled at a magnification; ones whose tiling failed, or that are too coarse, are left out.

    Raises:
        MadError: a slide was not tiled yet, two slides' files have the same name, or none was tiled at this magnification.
    """
    facts = {slide: read_json(_tiled(results, slide)) for slide in slides}
    found = [
        Target(slide, facts[slide]["path"], slide_name(facts[slide]["path"]), plan)
        for slide in slides
        if (plan := _level(facts[slide], magnification)) is not None
    ]
    if not found:
        known = ", ".join(f"{m:g}x" for m in tiled_magnifications(results, slides))
        raise MadError(f"no slide was tiled at {magnification:g}x; there is {known}")
    if twice := [name for name, count in Counter(target.name for target in found).items() if count > 1]:
        raise MadError(
            f"two slides have files of the name {twice[0]!r}, which CLAM and TRIDENT could not tell apart; export each with "
            "an --output of its own"
        )
    return found


def export(
    results: Path, slides: Sequence[str], format: Format, selection: Selection, tile_px: int, folder: Path
) -> dict[str, int]:
    """Write the coordinates of `slides` below `folder`, in the layout of `format`.

    Returns:
        Tiles written per slide id; slides without such a tile are left out.

    Raises:
        MadError: as `targets`.
    """
    where = folder / layout(selection.magnification, tile_px)
    written, files = {}, []
    for target in targets(results, slides, selection.magnification):
        table = selection.of(read_parquet(results / "tile" / f"{target.slide}.parquet", columns=COLUMNS))
        if table.empty:  # CLAM stops at a slide without a tile
            continue
        dimensions = target.dimensions()
        if format == "clam":
            theirs = target.openslide_dimensions()
            attributes = clam_attributes(target.plan, tile_px, dimensions, theirs, target.name, str(where / "patches"))
            path = where / "patches" / f"{target.name}.h5"
        else:
            attributes = trident_attributes(target.plan, tile_px, dimensions, target.name, str(where))
            path = where / "patches" / f"{target.name}_patches.h5"
        write_coords(path, table, attributes)
        written[target.slide] = len(table)
        files.append(Path(target.path).name)
    if format == "clam":
        _list_slides(where / "process_list_autogen.csv", files)
    return written


def _list_slides(path: Path, files: list[str]) -> None:
    """CLAM's list of slides, with those that earlier calls have put beside them."""
    known = pd.read_csv(path, dtype=str)["slide_id"].tolist() if path.exists() else []
    kept = [name for name in known if (path.parent / "patches" / f"{slide_name(name)}.h5").exists()]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["slide_id"], *([name] for name in dict.fromkeys([*kept, *files]))])


def layout(magnification: float, tile_px: int) -> str:
    """Name of the folder in which TRIDENT looks for all of one magnification and tile size."""
    return f"{magnification:g}x_{tile_px}px_0px_overlap"


def tiled_magnifications(results: Path, slides: Sequence[str]) -> list[float]:
    """Magnifications that some of `slides` were tiled at, coarsest first.

    Raises:
        MadError: a slide was not tiled yet.
    """
    plans = [plan for slide in slides for plan in read_json(_tiled(results, slide)).get("levels", [])]
    return sorted({float(plan["magnification"]) for plan in plans if plan["available"]})


def clam_attributes(
    plan: Mapping[str, Any],
    tile_px: int,
    dimensions: Sequence[tuple[int, int]],
    theirs: Sequence[tuple[int, int]],
    name: str,
    folder: str,
) -> dict[str, Any]:
    """What CLAM reads beside the coordinates.

    A magnification that the slide has no level of its own for is read as the larger square of a finer level, which CLAM's
    transform then shrinks: `patch_size` is the side of that square.

    Args:
        plan: one of `levels` of `tile/{slide}.json`.
        dimensions: (width, height) of each level of the slide.
        theirs: the same as OpenSlide gives them to CLAM, which may lack levels.
    """
    wanted, (width, height) = dimensions[plan["level"]], theirs[0]
    level = max(n for n, size in enumerate(theirs) if n == 0 or size[0] >= wanted[0])
    level_width, level_height = theirs[level]
    level_downsample = plan["level_downsample"] if theirs[level] == wanted else width / level_width
    return {
        "patch_size": round(tile_px * plan["downsample"] / level_downsample),
        "patch_level": level,
        "downsample": (width / level_width, height / level_height),
        "downsampled_level_dim": (level_width, level_height),
        "level_dim": (level_width, level_height),
        "name": name,
        "save_path": folder,
    }


def trident_attributes(
    plan: Mapping[str, Any], tile_px: int, dimensions: Sequence[tuple[int, int]], name: str, folder: str
) -> dict[str, Any]:
    """What TRIDENT reads beside the coordinates; arguments as `clam_attributes`.

    `level0_magnification` is what makes its quotient with the wanted one the downsample by which the tiles were laid: for
    a slide that keeps its own pixel grid a nominal 40x, not 10 / mpp.
    """
    return {
        "patch_size": tile_px,
        "patch_size_level0": round(tile_px * plan["downsample"]),
        "level0_magnification": _whole(plan["magnification"] * plan["downsample"]),
        "target_magnification": _whole(plan["magnification"]),
        "overlap": 0,
        "name": name,
        "savetodir": folder,
        "level0_width": dimensions[0][0],
        "level0_height": dimensions[0][1],
    }


def write_coords(
    path: Path,
    table: pd.DataFrame,
    attributes: Mapping[str, Any],
    features: tuple[NDArray[np.float32], Mapping[str, Any]] | None = None,
) -> None:
    """Write `coords` with its attributes, and `tile_id`, whole or not at all; `features` [n, d] with theirs where given."""
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        if features is not None:
            file.create_dataset("features", data=features[0]).attrs.update(features[1])
        coords = file.create_dataset("coords", data=table[["x", "y"]].to_numpy(np.int64), maxshape=(None, 2))
        coords.attrs.update(attributes)
        file.create_dataset("tile_id", data=table["tile_id"].to_numpy(object), dtype=h5py.string_dtype())


def slide_name(path: str) -> str:
    """A slide's file name without its suffix, as CLAM and TRIDENT look it up."""
    name = Path(path).name
    compound = next((suffix for suffix in COMPOUND_SUFFIXES if name.lower().endswith(suffix)), None)
    return name[: -len(compound)] if compound else Path(path).stem


def _tiled(results: Path, slide: str) -> Path:
    path = results / "tile" / f"{slide}.json"
    if not path.exists():
        raise MadError(f"{path}: no such file; tile the slides first: `snakemake --cores 2 tile`")
    return path


def _level(facts: Mapping[str, Any], magnification: float) -> dict[str, Any] | None:
    """How a slide gives a magnification; None where it does not."""
    plans: list[dict[str, Any]] = facts.get("levels", [])
    return next((plan for plan in plans if plan["magnification"] == magnification and plan["available"]), None)


def _whole(value: float) -> int | float:
    return round(value) if abs(value - round(value)) < 1e-6 else value
