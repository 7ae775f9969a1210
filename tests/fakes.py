"""Small shards that obey the contract of stage `shard`, for tests of training: random but structured tissue."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from mad.config import Config, parse_config
from mad.files import write_parquet

TILE_PX = 32
LADDER = [2.5, 10.0, 40.0]


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Smooth coloured noise [side, side, 3] uint8 with a random grain and tint."""
    noise = rng.normal(size=(side, side, 3)) * 90
    smooth = cv2.GaussianBlur(noise, (0, 0), float(rng.uniform(1, 6)))
    smooth *= 40 / max(smooth.std(), 1e-6)
    return np.clip(smooth + rng.uniform(90, 200, size=3), 0, 255).astype(np.uint8)


def pyramid(rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """A parent tile and its 16 children, whose 4 x 4 mosaic shrinks to the parent."""
    mosaic = texture(rng, 4 * TILE_PX)
    children = [mosaic[r * TILE_PX :, c * TILE_PX :][:TILE_PX, :TILE_PX] for r in range(4) for c in range(4)]
    return cv2.resize(mosaic, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA), children


def write_slide(folder: Path, slide: str, split: str, pairs: int, standalone: int, seed: int = 0) -> pd.DataFrame:
    """Write `folder`/{slide}.parquet and its tars: `pairs` per transition and `standalone` tiles per magnification."""
    rng = np.random.default_rng([seed, *slide.encode()])
    rows: list[dict[str, object]] = []
    for level, (coarse, fine) in enumerate(itertools.pairwise(LADDER)):
        kind = f"{coarse:g}x-{fine:g}x"
        members = []
        for number in range(pairs):
            key = f"{slide}_L{level}_0_{number}" + "_0" * level
            child = key.replace(f"_L{level}_", f"_L{level + 1}_")
            parent, children = pyramid(rng)
            members.append((key, "parent", key, -1, coarse, parent))
            members += [(f"{child}_{k}", "child", key, k, fine, image) for k, image in enumerate(children)]
        rows += _write_tar(folder, slide, split, kind, members)
    for level, magnification in enumerate(LADDER):
        ids = [f"{slide}_L{level}_1_{number}" + "_1" * level for number in range(standalone)]
        members = [(tile, "standalone", tile, -1, magnification, texture(rng, TILE_PX)) for tile in ids]
        rows += _write_tar(folder, slide, split, f"{magnification:g}x", members)
    table = pd.DataFrame(rows)
    write_parquet(folder / f"{slide}.parquet", table)
    return table


def _write_tar(folder: Path, slide: str, split: str, kind: str, members: list[tuple]) -> list[dict[str, object]]:
    shard = f"{slide}/{split}-{kind}-000000.tar"
    path = folder / shard
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for tile, role, key, position, magnification, image in members:
            name = (
                f"{key}.{role}.png"
                if role == "parent"
                else f"{key}.{position:02d}.png"
                if role == "child"
                else f"{key}.png"
            )
            data = cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            offset = tar.offset + 512
            tar.addfile(info, io.BytesIO(data))
            rows.append(
                {
                    "tile_id": tile, "kind": kind, "role": role, "sample_id": key, "position": np.int8(position),
                    "split": split, "magnification": magnification, "shard": shard, "offset": offset, "size": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(), "status": "ok", "blur": np.float32(1),
                }
            )  # fmt: skip
    return rows


def write_cohort(results: Path, pairs: int = 8, standalone: int = 4) -> None:
    """Two training slides and one validation slide under `results`/shard."""
    for slide, split in (("S01", "train"), ("S02", "train"), ("S03", "val")):
        write_slide(results / "shard", slide, split, pairs, standalone)


def tiny_run(**changes: object) -> dict[str, object]:
    """An entry of `runs:` that trains in seconds."""
    runtime = {"threads": 1, "checkpoint_steps": 4, "health_every": 5, "health_samples": 8, "log_seconds": 1000}
    return {
        "name": "tiny", "method": "mad", "steps": 10, "batch": 4, "lr": 1e-3, "warmup": 2, "ema": 0.9, "freeze_last_layer": 2,
        "backbone": {"model": "vit_tiny_patch16_224", "args": {"depth": 1, "embed_dim": 24, "patch_size": 8, "reg_tokens": 1}},
        "head": {"hidden": 32, "bottleneck": 16, "prototypes": 24}, "precision": "fp32",
        "views": {"local_px": 16, "local_crops": 2}, "runtime": runtime,
    } | changes  # fmt: skip


def tiny_config(results: Path, *runs: dict[str, object], seed: int = 3) -> Config:
    """A configuration for 32 px tiles with these runs (one `tiny_run` where none is given)."""
    entries = list(runs) or [tiny_run()]
    settings = {"results": str(results), "seed": seed, "tile": {"tile_px": TILE_PX}, "synthetic": {"patients": 3}}
    return parse_config({**settings, "runs": entries})


def tiny_xmag(**changes: object) -> dict[str, object]:
    """An entry of `runs:` that distils in seconds; `distill` is merged over a teacher."""
    distill = {"teacher": "teacher"} | changes.pop("distill", {})
    entry = tiny_run(method="xmag", distill=distill, ema=0.9, ema_end=0.9, **{"mix": {"10x-40x": 1}} | changes)
    return {key: value for key, value in entry.items() if key not in ("head", "views", "freeze_last_layer")}


def distill_config(results: Path, *runs: dict[str, object], teacher: str = "random:source") -> Config:
    """A configuration with these runs, and the untrained one that the teacher is made of."""
    return parse_config(
        {
            "results": str(results), "seed": 3, "tile": {"tile_px": TILE_PX}, "synthetic": {"patients": 3},
            "runs": [*(runs or [tiny_xmag()]), tiny_run(name="source")], "evaluate": {"segmentation_num_slides": 0},
            "encoders": [{"name": "teacher", "spec": teacher, "precision": "fp32"}],
        }
    )  # fmt: skip
