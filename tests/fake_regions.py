"""Tile tables and whole `results/` folders of small regions, made without slides or encoders."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import strategies as st

from mad.config import Config, parse_config
from mad.files import digest, write_json, write_parquet
from mad.slides.sheet import write_sheet
from mad.tiles.pyramid import Ladder, parent, parse_tile_id, tile_id

TILE_PX = 16


def grid_of(
    ladder: Ladder, rows: int, columns: int, mpp: float, blank: float, seed: int, slide: str = "S"
) -> pd.DataFrame:
    """A tile table of `rows` x `columns` coarsest tiles, of which a share is blank or on the edge."""
    rng, lines = np.random.default_rng(seed), []
    for level in range(len(ladder)):
        digits = [range(step**2) for step in ladder.steps[:level]]
        for index in product(range(rows), range(columns), *digits):
            padded = [*index, *[None] * (4 - len(index))]
            magnification = ladder.magnifications[level]
            status = rng.choice(["ok", "blank", "edge"], p=[1 - blank, blank / 2, blank / 2])
            lines.append((tile_id(slide, index), slide, magnification, mpp * ladder.span(level), *padded, status))
    table = pd.DataFrame(lines, columns=["tile_id", "slide_id", "magnification", "mpp", "i", "j", "k", "m", "status"])
    return table.astype({"k": "Int16", "m": "Int16"})


@st.composite
def cases(draw: st.DrawFn) -> tuple[Ladder, pd.DataFrame, int, list[float]]:
    steps = draw(st.lists(st.integers(2, 4), max_size=2))
    ladder = Ladder(tuple(5.0 * float(np.prod(steps[:n], initial=1)) for n in range(len(steps) + 1)))
    chosen = draw(st.lists(st.sampled_from(ladder.magnifications), unique=True))
    size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    mpp = draw(st.sampled_from([0.25, 0.2465, 0.26]))
    tiles = grid_of(ladder, *size, mpp, draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.integers(0, 99)))
    return ladder, tiles, draw(st.integers(1, 3)), chosen


def fake_regions(folder: Path, slides: dict[str, str], *, size: int = 3, dim: int = 8, **mixer: Any) -> Config:
    """A cohort of slides (id -> split) of `size` x `size` coarsest tiles with an encoder's dense embeddings, and its configuration.

    An embedding is the sum of a vector of the tile and one of its parent, turned and shifted by its magnification, and noise:
    something of a hidden tile can be told from the others of its region, and nothing from its magnification alone.
    """
    ladder, results = Ladder((2.5, 10.0)), folder / "results"
    rng = np.random.default_rng(0)
    turns, shifts = [np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(2)], 5 * rng.normal(size=(2, dim))
    records = [{"slide_id": s, "path": f"{s}.tiff", "patient_id": s, "split": split} for s, split in slides.items()]
    write_sheet(folder / "slides.tsv", records)
    dense = results / "embed" / "tiles" / "dense"
    dense.mkdir(parents=True)
    for number, slide in enumerate(slides):
        tiles = grid_of(ladder, size, size, 0.25, 0.1, number, slide)
        write_parquet(results / "tile" / f"{slide}.parquet", tiles)
        indices = [parse_tile_id(name)[1] for name in tiles["tile_id"]]
        own = {index: rng.normal(size=dim) * (2.0 if len(index) == 2 else 1.0) for index in indices}
        base = np.stack([own[index] + (own[parent(index)] if parent(index) else 0) for index in indices])
        level = np.array([len(index) - 2 for index in indices])
        features = (
            np.einsum("nd,nde->ne", base, np.stack(turns)[level]) + shifts[level] + 0.1 * rng.normal(size=base.shape)
        )
        kept = (tiles["status"] == "ok").to_numpy()
        order = rng.permutation(int(kept.sum()))  # rows of embeddings have an order of their own
        np.save(dense / f"{slide}.npy", features[kept][order].astype(np.float32))
        ids = tiles["tile_id"][kept].iloc[order].astype("string")
        write_parquet(dense / f"{slide}.parquet", pd.DataFrame({"tile_id": ids}))
        write_json(dense / f"{slide}.json", {"key": digest(features.tolist()), "tiles": int(kept.sum())})
    write_json(dense.parent / "audit.json", {"encoder": "tiles", "weights_sha256": "0" * 64})
    small = {
        "name": "mma",
        "encoder": "tiles",
        "width": 32,
        "depth": 1,
        "heads": 4,
        "batch": 8,
        "steps": 60,
        "warmup": 5,
    }
    return parse_config(
        {
            "results": str(results),
            "cohort": {"sheet": str(folder / "slides.tsv")},
            "tile": {"magnifications": [2.5, 10], "tile_px": TILE_PX},
            "encoders": [{"name": "tiles", "spec": "colour"}],
            "mixers": [{**small, "lr": 3e-3, "health_every": 20, "runtime": {"threads": 1}, **mixer}],
        }
    )
