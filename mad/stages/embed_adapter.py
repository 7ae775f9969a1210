"""Stage `embed` for `spec: adapter:NAME`: the base encoder's embeddings through a head, files in and files out.

No slide is opened and no image decoded. Reads cohort/slides.parquet, `embed/{base}/` with its dense/, and `adapt/{name}/`; writes
what stage `embed` writes, so that everything after it sees one encoder more.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mad.config import Config
from mad.config.adapters import AdapterConfig
from mad.files import MadError, read_json, read_parquet, sha256_file, write_json
from mad.models.adapter import WEIGHTS, Adapter, load_adapter
from mad.progress import log, track
from mad.stages.embedded import ABSENT, is_fresh, write_embeddings
from mad.tiles.embeddings import read_audit, read_embeddings, source_key
from mad.tiles.pyramid import parse_tile_id


def run(config: Config, name: str, entry: AdapterConfig) -> None:
    """Embed the whole cohort with encoder `name`, which is adapter `entry`.

    Where the base encoder is absent, audit.json says `"status": "absent"` and why.

    Raises:
        MadError: base or adapter are not finished, or were not made for each other.
    """
    results = Path(config.results)
    folder, base, head = results / "embed" / name, results / "embed" / entry.encoder, results / "adapt" / entry.name
    audit, told = read_audit(base), config.encoder(name).model_dump()
    (folder / "audit.json").unlink(missing_ok=True)  # it vouches for all slides at once
    if audit.get("status") == ABSENT:
        log(f"WARNING: {entry.encoder} is absent, and so is {name}")
        write_json(
            folder / "audit.json", {"status": ABSENT, "reason": audit["reason"], "encoder": name, "config": told}
        )
        return
    summary = _read_summary(head, entry, base)
    adapter = load_adapter(head)
    ladder = [float(value) for value in config.tile.magnifications]
    if adapter.shape.magnifications != ladder:
        raise MadError(
            f"{head}: made for the ladder {adapter.shape.magnifications}, not {ladder}; run `mad adapt {entry.name}`"
        )
    own = {
        "spec": config.encoder(name).spec, "dim": adapter.shape.dim, "dtype": "float32", "adapter": asdict(adapter.shape),
        "weights_sha256": summary["weights_sha256"], "parameters": sum(p.numel() for p in adapter.parameters()),
        "base": audit,
    }  # fmt: skip
    tiles = 0
    slides = read_parquet(results / "cohort" / "slides.parquet", ["slide_id"])["slide_id"]
    for slide in track(slides, f"embed {name}", unit="slides"):
        tiles += _adapt_slide(adapter, own, ladder, slide, base, folder)
        if (base / "dense" / f"{slide}.json").exists():
            tiles += _adapt_slide(adapter, own, ladder, slide, base / "dense", folder / "dense")
    write_json(folder / "audit.json", {**own, "encoder": name, "config": told})
    log(f"embed {name}: {tiles} embeddings of {entry.encoder} adapted; the rest was up to date")


def _read_summary(head: Path, entry: AdapterConfig, base: Path) -> dict[str, Any]:
    """What adapt/{name}/summary.json tells of a head that is whole, and made for this base."""
    mend = f"run `mad adapt {entry.name}`"
    if not (head / "summary.json").exists() or not (head / WEIGHTS).exists():
        raise MadError(f"{head}: no finished adapter; {mend} first")
    summary: dict[str, Any] = read_json(head / "summary.json")
    if summary.get("weights_sha256") != sha256_file(head / WEIGHTS):
        raise MadError(f"{head}: {WEIGHTS} is not the head that summary.json tells of; {mend} again")
    if summary["audit_sha256"] != sha256_file(base / "audit.json"):
        raise MadError(f"{head}: {base} was embedded by another encoder since; {mend} again")
    return summary


def _adapt_slide(
    adapter: Adapter, audit: dict[str, Any], ladder: list[float], slide: str, source: Path, target: Path
) -> int:
    """Write one slide's adapted embeddings; returns how many were made now."""
    rows, features = read_embeddings(source, slide)
    key = source_key(audit, read_json(source / f"{slide}.json")["key"])
    if is_fresh(target, slide, key):
        return 0
    levels = [len(parse_tile_id(tile_id)[1]) - 2 for tile_id in rows["tile_id"]]
    magnifications = np.array(ladder)[np.array(levels, np.int64)]
    with torch.inference_mode():
        vectors = adapter.apply_to(features, magnifications)
    if not np.isfinite(vectors).all():
        raise MadError(f"{target / slide}.npy: adapted embeddings are not finite; the head or {source} is at fault")
    write_embeddings(target, slide, key, rows["tile_id"], vectors)
    return len(rows)
