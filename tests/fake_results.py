"""A small `results/` folder with the files that `evaluate` and `report` read, made without slides or training.

Every slide is a grid of 2.5x tiles whose classes run from left to right; Background is standalone. An embedding is the mean
of its class + a vector of its 10x neighbourhood + a shift of its magnification + noise, so that every protocol has an answer.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mad.config import Config, parse_config
from mad.files import write_json, write_parquet

CLASSES = ["Gray Matter", "White Matter", "Leptomeninges", "Superficial Cortex", "Background"]
TILE_PX = 112


def fake_config(results: Path, encoders: list[str], **changes: Any) -> Config:
    """A configuration for the fake folder, with short probes."""
    evaluate = {
        "probe_steps": 300,
        "probe_lr": 1e-2,
        "bootstrap_resamples": 50,
        "kmeans_starts": 4,
        "figure_parents": 20,
    }
    value = {
        "results": str(results),
        "tile": {"tile_px": TILE_PX},
        "encoders": [{"name": name, "spec": "colour"} for name in encoders],
        "evaluate": evaluate | changes.pop("evaluate", {}),
    }
    return parse_config(value | changes)


def fake_results(
    results: Path,
    encoders: dict[str, float],
    *,
    patients: int = 8,
    columns: int = 5,
    rows: int = 1,
    dim: int = 16,
    labelled: bool = True,
    splits: dict[str, str] | None = None,
    split_by: str = "patient",
    finest: int = 2,
    seed: int = 0,
    noise: float = 0.5,
    slide_path: str = "missing.tif",
) -> None:
    """Write cohort/, tile/, shard/ and embed/ for slides S00, S01, …

    Args:
        results: folder.
        encoders: name -> shift of its embeddings between magnifications (0: scale-free).
        patients: one slide each; the last two are tested, the one before validates, unless `splits` says otherwise.
        columns: 2.5x tiles per slide in x; classes change with x.
        rows: 2.5x tiles in y.
        dim: of the embeddings.
        labelled: whether tiles bear labels.
        splits: slide id -> split.
        split_by: as in the cohort.
        finest: ladder level of the finest magnification.
        seed: of the embeddings.
        noise: standard deviation of the noise of an embedding.
        slide_path: path column of the cohort.
    """
    generator = np.random.default_rng(seed)
    slides = [f"S{number:02d}" for number in range(patients)]
    drawn = {s: "test" if n >= patients - 2 else "val" if n == patients - 3 else "train" for n, s in enumerate(slides)}
    split_of = drawn | (splits or {})
    cohort = pd.DataFrame({"slide_id": slides, "path": slide_path, "patient_id": [f"P{s}" for s in slides]})
    cohort["annotation"], cohort["mpp"] = "a.geojson", 0.25
    cohort["split"] = [split_of[s] for s in slides] if split_by == "patient" else None
    cohort["split_by"] = split_by
    text = [name for name in cohort if name != "mpp"]
    write_parquet(results / "cohort" / "slides.parquet", cohort.astype(dict.fromkeys(text, "string")))
    class_means = 3 * generator.normal(size=(len(CLASSES), dim))
    shifts = generator.normal(size=(3, dim))
    for slide in slides:
        tiles = _grid(slide, columns, rows, finest, labelled)
        shard = _shard(tiles, split_of[slide])
        text = ["tile_id", "slide_id", "label", "parent_id", "status"]
        write_parquet(results / "tile" / f"{slide}.parquet", tiles.astype(dict.fromkeys(text, "string")))
        text = ["tile_id", "kind", "role", "sample_id", "split", "shard", "sha256", "status"]
        write_parquet(results / "shard" / f"{slide}.parquet", shard.astype(dict.fromkeys(text, "string")))
        place = {name: generator.normal(size=dim) for name in sorted(set(_neighbourhood(t) for t in tiles["tile_id"]))}
        code = np.array([_column_class(x, columns) for x in tiles["x"] + tiles["side"] / 2])
        base = class_means[code] + np.stack([place[_neighbourhood(t)] for t in tiles["tile_id"]])
        base += noise * generator.normal(size=base.shape)
        level = tiles["tile_id"].str.extract(r"_L(\d)")[0].astype(int).to_numpy()
        for encoder, shift in encoders.items():
            features = (base + shift * 4 * shifts[level]).astype(np.float32)
            unique = tiles["tile_id"].isin(set(shard["tile_id"])).to_numpy()
            _save(results / "embed" / encoder, slide, tiles["tile_id"][unique], features[unique])
            if split_of[slide] == "test" or split_by == "block":
                dense = ((tiles["magnification"] >= 10) & (tiles["status"] != "edge")).to_numpy()
                _save(results / "embed" / encoder / "dense", slide, tiles["tile_id"][dense], features[dense])
    for encoder in encoders:
        write_json(results / "embed" / encoder / "audit.json", {"encoder": encoder, "weights_sha256": "0" * 64})


def _grid(slide: str, columns: int, rows: int, finest: int, labelled: bool) -> pd.DataFrame:
    lines = []
    for i, j in itertools.product(range(rows), range(columns)):
        lines.append((f"{slide}_L0_{i}_{j}", None, 2.5, j * 16 * TILE_PX, i * 16 * TILE_PX, 16 * TILE_PX))
        for k in range(16 if finest >= 1 else 0):
            x, y = (j * 4 + k % 4) * 4 * TILE_PX, (i * 4 + k // 4) * 4 * TILE_PX
            lines.append((f"{slide}_L1_{i}_{j}_{k}", f"{slide}_L0_{i}_{j}", 10.0, x, y, 4 * TILE_PX))
            for m in range(16 if finest >= 2 else 0):
                place = x + m % 4 * TILE_PX, y + m // 4 * TILE_PX, TILE_PX
                lines.append((f"{slide}_L2_{i}_{j}_{k}_{m}", f"{slide}_L1_{i}_{j}_{k}", 40.0, *place))
    tiles = pd.DataFrame(lines, columns=["tile_id", "parent_id", "magnification", "x", "y", "side"])
    names = [CLASSES[_column_class(x, columns)] for x in tiles["x"] + tiles["side"] / 2]
    place = tiles["tile_id"].str.extract(r"_L\d_(\d+)_(\d+)").astype(int)
    tiles = tiles.assign(i=place[0], j=place[1])
    shares = {f"share_{name}": np.float32(labelled) * np.equal(names, name) for name in CLASSES}
    return tiles.assign(
        slide_id=slide, label=names if labelled else None, status="ok", native=True, tissue=1.0, pen=0.0, **shares
    )


def _shard(tiles: pd.DataFrame, split: str) -> pd.DataFrame:
    """Every labelled parent makes a pair, Background is standalone; unlabelled parents make pairs too."""
    label = dict(zip(tiles["tile_id"], tiles["label"], strict=True))
    magnification = dict(zip(tiles["tile_id"], tiles["magnification"], strict=True))
    lines = []
    for parent, group in tiles[tiles["parent_id"].notna()].groupby("parent_id"):
        if label[parent] == "Background":
            continue
        kind = f"{magnification[parent]:g}x-{magnification[parent] * 4:g}x"
        lines.append((parent, kind, "parent", parent, -1, magnification[parent]))
        lines += [
            (tile, kind, "child", parent, n, magnification[parent] * 4) for n, tile in enumerate(group["tile_id"])
        ]
    in_pairs = {line[0] for line in lines}
    alone = tiles[(tiles["label"] == "Background") & ~tiles["tile_id"].isin(in_pairs)]
    for number, (tile, value) in enumerate(zip(alone["tile_id"], alone["magnification"], strict=True)):
        if value < 40 or number % 8 == 0:
            lines.append((tile, f"{value:g}x", "standalone", tile, -1, value))
    shard = pd.DataFrame(lines, columns=["tile_id", "kind", "role", "sample_id", "position", "magnification"])
    return shard.assign(split=split, status="ok", shard="x.tar", offset=0, size=1, sha256="", blur=np.float32(0))


def _column_class(x: float, columns: int) -> int:
    return min(int((x / (16 * TILE_PX) + 0.3) * len(CLASSES) / columns), len(CLASSES) - 1)


def _neighbourhood(tile_id: str) -> str:
    """Id of the 10x tile that holds a tile (of the 2.5x tile itself, at 2.5x)."""
    slide, level, *index = (
        tile_id.rsplit("_L", 1)[0],
        tile_id.rsplit("_L", 1)[1][0],
        *tile_id.rsplit("_L", 1)[1][2:].split("_"),
    )
    return "_".join([slide, *(index if level == "0" else index[:3])])


def _save(folder: Path, slide: str, ids: pd.Series, features: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(folder / f"{slide}.parquet", pd.DataFrame({"tile_id": ids.to_numpy()}))
    np.save(folder / f"{slide}.npy", features)
    write_json(folder / f"{slide}.json", {"key": "fake", "tiles": len(ids)})
