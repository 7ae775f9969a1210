"""What a cohort will take, before anything runs: tiles per slide, samples under the caps, disk of the shards, hours.

Headers give the grid, and so the number of tiles, exactly. What is tissue is estimated on a thumbnail, bytes and seconds per
tile by cutting a few footprints here and now (`mad.reporting.trial`); `how` tells of every figure where it comes from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mad.config import Config
from mad.files import MadError, read_json
from mad.progress import track
from mad.reporting.inspect import describe
from mad.reporting.trial import COARSE_MPP, JSON_MEMBER_BYTES, Trial, tissue_tiles, try_slides
from mad.slides.sheet import SlideRow, cohort_rows
from mad.tiles.aligned import open_aligned
from mad.tiles.annotated import check_annotation
from mad.tiles.pyramid import Ladder
from mad.tiles.sampling import UNLABELLED, Caps, block_shares
from mad.tiles.shards import BLOCK

THREADS = 8
HOW = {
    "tiles": "every tile of the grid that holds a pixel of the slide, from its header: exact",
    "tissue": f"tiles with enough tissue on a thumbnail of about {COARSE_MPP:g} um/px: an estimate; the stage's mask is finer",
    "samples": "what the caps of `sample:` leave of them if every class filled its own: an upper estimate; tissue outside the "
    "annotations of an annotated slide comes on top, as far as sample.max_unlabelled lets it; of split_by: block the guards are "
    "taken off, as if tissue and classes were spread evenly",
    "failing": "slide and annotation are opened as stage `tile` opens them; polygons are read (not with --quick), the pixels of "
    "slides and masks are not",
}


def plan(config: Config, *, quick: bool = False) -> dict[str, Any]:
    """Plan the whole cohort.

    Args:
        quick: read headers alone: no tissue, so every whole tile counts as tissue; no annotation, only whether it is there; no
            disk and no hours, unless shards exist.

    Returns:
        JSON-able: `slides` (those that will fail first, with `error`), `totals`, `runs` and `how`. A figure that cannot be
        told is None.

    Raises:
        MadError: the sheet is wrong, or the synthetic cohort is not made yet.
    """
    rows = cohort_rows(config)
    if not config.cohort.sheet and not all(Path(row.path).exists() for row in rows):
        raise MadError("the synthetic cohort is not made yet, so there are no slides to plan for; `mad synth` makes it")
    ladder = Ladder(tuple(config.tile.magnifications))
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(partial(plan_slide, config, quick=quick), rows)
        slides = list(track(found, "plan", total=len(rows), unit="slides"))
    good = [slide for slide in slides if not slide["error"]]
    share_samples(config, ladder, good)
    by_id = {row.slide_id: row for row in rows}
    trial = None if quick else try_slides(config, [by_id[slide["slide_id"]] for slide in good if _tissue(slide)])
    sizes, source = bytes_per_tile(config, good, trial)
    for slide in good:
        slide["cut"] = cut_tiles(slide["samples"], ladder)
        slide["bytes"] = shard_bytes(slide["samples"], sizes, ladder) if sizes else None
    return {
        "slides": sorted(slides, key=lambda slide: not slide["error"]),
        "totals": _totals(ladder, slides, trial),
        "runs": [_run(config, run.name) for run in config.runs],
        "how": {**HOW, "disk": source, "hours": _how_hours(trial)},
    }


def plan_slide(config: Config, row: SlideRow, *, quick: bool) -> dict[str, Any]:
    """One slide's grid: `tiles`, `whole` (inside the slide) and, unless `quick`, estimated `tissue` per magnification.

    `blocks` is the share of it that each split gets under `split_by: block`; `warnings` are of its annotation. A slide that cannot
    be tiled, or whose annotation cannot be read, has `error`, and no counts.
    """
    plan: dict[str, Any] = {
        **{"slide_id": row.slide_id, "path": row.path, "split": row.split, "annotated": row.annotation is not None},
        **{"error": None, "warnings": [], "magnifications": {}, "footprints": 0, "blocks": None},
        **{"samples": {}, "cut": 0, "bytes": None},
    }
    try:
        facts = describe(row.path, config.tile, row.mpp)
        if facts["error"]:
            return {**plan, "error": facts["error"]}
        if row.annotation is not None:
            bounds, size = tuple(facts["bounds"]), tuple(facts["dimensions"])
            plan["warnings"] = check_annotation(row.annotation, config.label, bounds=bounds, size=size, parse=not quick)
        tissue: Sequence[int | None] = [None] * len(facts["magnifications"])
        if not quick:
            with open_aligned(row.path, config.tile, row.mpp) as slide:
                tissue = [int(ok.sum()) for ok in tissue_tiles(slide, config.tile)]
    except (MadError, OSError) as error:
        return {**plan, "error": str(error)}
    grid = facts["grid"]
    plan["footprints"] = int(np.prod(grid["touching"]))
    if row.split is None:
        rows, columns = grid["whole"] if all(grid["whole"]) else grid["touching"]
        plan["blocks"] = block_shares(rows, columns, config.cohort)
    plan["magnifications"] = {
        f"{level['magnification']:g}x": {"tiles": level["tiles"], "whole": level["tiles_whole"], "tissue": estimate}
        for level, estimate in zip(facts["magnifications"], tissue, strict=True)
        if level["available"]
    }
    return plan


def share_samples(config: Config, ladder: Ladder, slides: list[dict[str, Any]]) -> None:
    """Fill in `samples` of each slide: how many of each kind the caps leave it, its share of what they leave the cohort."""
    caps = Caps(
        {**config.sample.max_pairs, **config.sample.max_standalone},
        config.sample.max_unlabelled,
        config.sample.test_share,
    )
    wanted = [(slide, kind, count) for slide in slides for kind, count in _candidates(config, ladder, slide).items()]
    total: dict[tuple[str, str, bool], float] = {}
    for slide, kind, count in wanted:
        for split, share in _splits(slide).items():
            group = (kind, split, slide["annotated"])
            total[group] = total.get(group, 0) + count * share
    for slide, kind, count in wanted:
        kept = 0.0
        for split, share in _splits(slide).items():
            found = total[kind, split, slide["annotated"]]
            room = _room(config, caps, ladder, kind, split, slide["annotated"])
            kept += count * share * min(1.0, room / found) if found else 0
        slide["samples"][kind] = round(kept)


def _candidates(config: Config, ladder: Ladder, slide: dict[str, Any]) -> dict[str, int]:
    """Samples of each kind that a slide could give; glass counts as tiles of the background class where it is annotated."""
    levels, label = slide["magnifications"], config.label
    glass_too = slide["annotated"] and label.glass_is_background and label.background is not None
    found = {}
    for number in range(len(ladder)):
        level = levels.get(ladder.name(number))
        if level is None:
            continue
        tissue = level["whole"] if level["tissue"] is None else level["tissue"]
        found[ladder.name(number)] = level["whole"] if glass_too else tissue
        if number + 1 < len(ladder) and ladder.name(number + 1) in levels:
            found[ladder.transition(number)] = tissue
    return found


def _splits(slide: dict[str, Any]) -> dict[str, float]:
    """Share of a slide's tiles per split."""
    return {slide["split"]: 1.0} if slide["split"] else slide["blocks"]


def _room(config: Config, caps: Caps, ladder: Ladder, kind: str, split: str, annotated: bool) -> float:
    """Samples that the caps leave to one kind, split and sort of slide: the sum over its classes."""
    classes = [UNLABELLED]
    if annotated:
        pairs = kind in {ladder.transition(number) for number in range(len(ladder) - 1)}
        barred = config.label.background if pairs and not config.sample.background_pairs else None
        classes = [name for name in config.label.classes if name != barred]
    found = [caps.cap(kind, split, name) for name in classes]
    return sum(np.inf if cap is None else cap for cap in found)


def bytes_per_tile(
    config: Config, slides: list[dict[str, Any]], trial: Trial | None
) -> tuple[dict[str, float], str | None]:
    """Mean bytes of a tile in a tar per magnification, of existing shards or of the trial, and which of them it was."""
    paths = [Path(config.results) / "shard" / f"{slide['slide_id']}.parquet" for slide in slides]
    tables = [pd.read_parquet(path, columns=["magnification", "size", "status"]) for path in paths if path.exists()]
    table = pd.concat(tables) if tables else pd.DataFrame({"status": []})
    table = table[table["status"] == "ok"]
    if len(table):
        sizes = table.assign(size=member_bytes(table["size"].to_numpy())).groupby("magnification")["size"].mean()
        return {
            f"{m:g}x": float(size) for m, size in sizes.items()
        }, f"{len(table)} tiles of the shards that are there, as they were encoded"
    if trial is None:
        return {}, None
    return trial.bytes, f"{trial.tiles} tiles of {trial.slides} slide(s), cut and encoded now"


def member_bytes(size: np.ndarray) -> np.ndarray:
    """What images of `size` bytes take up in a tar: a header, and padding to whole blocks."""
    return BLOCK + size + -size % BLOCK


def shard_bytes(samples: dict[str, int], sizes: dict[str, float], ladder: Ladder) -> int:
    """Bytes of a slide's tars: samples of each kind times their members."""
    total = 0.0
    for number in range(len(ladder)):
        here = sizes.get(ladder.name(number), 0.0)
        total += samples.get(ladder.name(number), 0) * (here + JSON_MEMBER_BYTES)
        if number + 1 < len(ladder):
            children = ladder.steps[number] ** 2 * sizes.get(ladder.name(number + 1), 0.0)
            total += samples.get(ladder.transition(number), 0) * (here + children + JSON_MEMBER_BYTES)
    return round(total)


def cut_tiles(samples: dict[str, int], ladder: Ladder) -> int:
    """Tiles that a slide's samples hold."""
    pairs = {ladder.transition(number): 1 + step**2 for number, step in enumerate(ladder.steps)}
    return sum(count * pairs.get(kind, 1) for kind, count in samples.items())


def _tissue(slide: dict[str, Any]) -> bool:
    return any(level["tissue"] for level in slide["magnifications"].values())


def _totals(ladder: Ladder, slides: list[dict[str, Any]], trial: Trial | None) -> dict[str, Any]:
    good = [slide for slide in slides if not slide["error"]]
    levels = [ladder.name(number) for number in range(len(ladder))]

    def summed(level: str, what: str) -> int | None:
        counts = [s["magnifications"][level][what] for s in good if level in s["magnifications"]]
        return None if None in counts else sum(counts)

    magnifications = {level: {what: summed(level, what) for what in ("tiles", "whole", "tissue")} for level in levels}
    kinds = dict.fromkeys(kind for slide in good for kind in slide["samples"])
    samples = {kind: sum(slide["samples"].get(kind, 0) for slide in good) for kind in kinds}
    sizes = [slide["bytes"] for slide in good]
    cut = sum(slide["cut"] for slide in good)
    tile_hours = shard_hours = None
    if trial:
        tiles = sum(count["tiles"] or 0 for count in magnifications.values())
        footprints = sum(slide["footprints"] for slide in good)
        read = sum(_read_footprints(slide, levels[0]) for slide in good)
        tile_hours = (footprints * trial.overview_s + tiles * trial.table_s) / 3600
        shard_hours = (read * trial.read_s + cut * trial.encode_s) / 3600
    return {
        **{"slides": len(slides), "failing": len(slides) - len(good), "magnifications": magnifications},
        **{"samples": samples, "cut": cut, "bytes": None if None in sizes else sum(sizes)},
        **{"tile_hours": tile_hours, "shard_hours": shard_hours},
    }


def _read_footprints(slide: dict[str, Any], coarsest: str) -> int:
    """Coarsest tiles that a slide's shards are read from: those with tissue, at most one per sample."""
    level = slide["magnifications"].get(coarsest, {"tissue": None})
    whole = slide["footprints"] if level["tissue"] is None else max(level["tissue"], 1)
    return min(whole, sum(slide["samples"].values()))


def _run(config: Config, name: str) -> dict[str, Any]:
    """A training's steps, and its hours at the rate of a finished training of that name; None without one."""
    summary = Path(config.results) / "train" / name / "summary.json"
    steps, hours, how = config.run(name).steps, None, "unknown: no training of this run has ended here yet"
    if summary.exists():
        found = read_json(summary)
        if found.get("seconds") and found.get("steps"):
            hours = steps * found["seconds"] / found["steps"] / 3600
            where = f"{found.get('world_size', 1)} process(es) on {found.get('device', 'an unknown device')}"
            how = f"rate of the training of {found['steps']} steps that ended here, {where}"
    return {"name": name, "steps": steps, "hours": hours, "how": how}


def _how_hours(trial: Trial | None) -> str | None:
    if trial is None:
        return None
    return (
        f"of one process: {trial.slides} footprint(s) cut now took {trial.read_s:.3g} s to read and {1e3 * trial.encode_s:.3g} "
        "ms per tile to encode; annotations and pictures are not counted; divide by the jobs that run at once"
    )
