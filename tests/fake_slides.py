"""A small `results/` folder for slide-level heads: a sheet with targets, tile tables and dense embeddings, without slides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mad.config import Config, parse_config
from mad.files import write_json, write_parquet
from mad.slides.sheet import write_sheet
from mad.tiles.pyramid import Ladder, tile_id

LADDER = (10.0, 40.0)
TILE_PX = 112
DIM = 8


def slide_config(results: Path, **changes: Any) -> Config:
    """Two magnifications, four aggregators, an untrained mixer."""
    biomarkers = {
        "targets": [
            {"name": "fine", "column": "fine"},
            {"name": "lots", "column": "lots"},
            {"name": "level", "column": "level", "task": "regression"},
        ],
        "aggregators": [
            {"name": "abmil-fine", "encoder": "enc", "tokens": "finest"},
            {"name": "abmil-coarse", "encoder": "enc", "tokens": "coarsest"},
            {"name": "mean", "encoder": "enc", "tokens": "all", "head": "mean"},
            {"name": "mma", "mixer": "mixer", "tokens": "all"},
            {"name": "mma-region", "mixer": "mixer", "tokens": "region"},
        ],
        "folds": 5, "repeats": 1, "steps": 60, "lr": 5e-3, "hidden": 16, "tile_shares": [1.0, 0.5],
    }  # fmt: skip
    value = {
        "results": str(results),
        "cohort": {"sheet": str(results / "slides.tsv")},
        "tile": {"tile_px": TILE_PX, "magnifications": list(LADDER)},
        "encoders": [{"name": "enc", "spec": "colour"}],
        "mixers": [{"name": "mixer", "encoder": "enc", "width": 16, "depth": 1, "heads": 2, "steps": 0, "warmup": 0}],
        "evaluate": {"bootstrap_resamples": 200, "transition": LADDER},
        "biomarkers": biomarkers | changes.pop("biomarkers", {}),
    }
    return parse_config(value | changes)


def fake_slides(
    results: Path, *, patients: int = 40, rows: int = 2, columns: int = 2, seed: int = 0, path: str = "no.tif"
) -> None:
    """Write slides.tsv, cohort/, tile/, embed/enc/dense/ for slides of rows x columns coarse tiles; the first coarse tile is blank.

    Targets: `fine`, borne by a quarter of the finest tiles of its slides; `lots`, drawn by lot; `level`, a number that shifts every
    tile at any magnification.
    """
    rng = np.random.default_rng(seed)
    slides = [f"S{n:02d}" for n in range(patients)]
    fine = np.arange(patients) % 2
    level = rng.normal(size=patients)
    cohort = pd.DataFrame(
        {
            "slide_id": slides, "path": path, "patient_id": [f"P{s}" for s in slides], "annotation": None,
            "split": "train", "split_by": "patient",
        }
    ).astype("string")  # fmt: skip
    targets = {
        "fine": fine.astype(str),
        "lots": rng.permutation(fine).astype(str),
        "level": [f"{v:.3f}" for v in level],
    }
    sheet = cohort[["slide_id", "patient_id", "split"]].assign(path=[f"{slide}.tif" for slide in slides], **targets)
    write_sheet(results / "slides.tsv", sheet.to_dict("records"))
    write_parquet(results / "cohort" / "slides.parquet", cohort.assign(mpp=0.25))
    ladder, folder = Ladder(LADDER), results / "embed" / "enc" / "dense"
    folder.mkdir(parents=True)
    for n, slide in enumerate(slides):
        lines = []
        for depth, side in ((0, 4 * TILE_PX), (1, TILE_PX)):
            for row in range(rows * 4**depth):
                for column in range(columns * 4**depth):
                    index = tuple(int(v) for v in ladder.index(depth, row, column))
                    blank = row * 4 ** (1 - depth) < 4 and column * 4 ** (1 - depth) < 4
                    digits = [*index, *[pd.NA] * (4 - len(index))]
                    lines.append(
                        (
                            tile_id(slide, index),
                            slide,
                            LADDER[depth],
                            10 / LADDER[depth],
                            *digits,
                            column * side,
                            row * side,
                            side,
                            "blank" if blank else "ok",
                        )
                    )
        names = ["tile_id", "slide_id", "magnification", "mpp", "i", "j", "k", "m", "x", "y", "side", "status"]
        tiles = pd.DataFrame(lines, columns=names).astype({"i": "int32", "j": "int32", "k": "Int16", "m": "Int16"})
        write_parquet(results / "tile" / f"{slide}.parquet", tiles)
        write_json(results / "tile" / f"{slide}.json", {"mpp": 0.25})
        embedded = tiles[tiles["status"] == "ok"].sample(frac=1, random_state=n)  # in an order of their own
        features = rng.normal(size=(len(embedded), DIM))
        features[:, 1] += level[n]
        finest = (embedded["magnification"] == LADDER[1]).to_numpy()
        features[np.flatnonzero(finest)[: finest.sum() // 4], 0] += 5 * fine[n]
        write_parquet(folder / f"{slide}.parquet", embedded[["tile_id"]])
        np.save(folder / f"{slide}.npy", features.astype(np.float32))
        write_json(folder / f"{slide}.json", {"key": f"fake {n}", "tiles": len(embedded)})
    write_json(folder.parent / "audit.json", {"encoder": "enc", "weights_sha256": "0" * 64})
