"""Stage `mix`: one entry of `mixers:`, from the dense embeddings of an encoder to the contextual tokens of every slide (MMA).

Reads `tile/*.parquet` and `embed/{encoder}/dense/`; writes `mix/{name}/`: recipe.json, checkpoints/, metrics.jsonl, mixer/,
curves.png, for each slide of the cohort {slide}.npy and {slide}.parquet (docs/data-contracts.md), and, last, summary.json.
The mixer learns on slides of the train split alone; slides of every split get tokens.

As in stage `train`, the same run resumes, another recipe or other data moves a finished mixer to `archive/` and is refused over an
unfinished one, and on SIGTERM or Ctrl-C the stage saves a checkpoint and leaves with code 75.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mad.config import Config
from mad.config.regions import MixerConfig
from mad.files import MadError, atomic_path, digest, write_json, write_parquet
from mad.models.mixer import Mixer, MixerShape, load_mixer, save_mixer
from mad.progress import log, track
from mad.slides.sheet import cohort_rows
from mad.tiles.embeddings import encoder_digest, read_audit
from mad.training.curves import draw_mixer_curves
from mad.training.folder import finished_run, prepare_folder, sole
from mad.training.mixing import FEWEST, check_health, split, train_mixer
from mad.training.process import EXIT_RETRY, Interrupted, granted_threads
from mad.training.records import METRICS, read_metrics
from mad.training.region_data import SlideRegions, mean_and_std, read_batch, read_regions

VERSION = 1  # raised when the code changes what an unchanged configuration trains
WEIGHTS = "mixer"  # the folder of the weights
LOSSES = ("loss", "mem", "contrastive")
FINAL_SHARE = 0.1  # of the steps, over which the final loss is averaged
TOKEN_TYPES = {
    "region": "string",
    "token": "string",
    "tile_id": "string",
    "magnification": "float64",
    "x_um": "float64",
    "y_um": "float64",
}
Split = list[tuple[SlideRegions, int]]


def run(config: Config, name: str) -> None:
    """Train mixer `name`, or resume it, and write the tokens of every slide.

    Where its encoder is absent, summary.json says `"status": "absent"` and why.

    Raises:
        MadError: there is no such mixer, its encoder has not embedded the cohort, or there is nothing to learn from.
        SystemExit: with code 75 after SIGTERM or Ctrl-C during the steps, once a checkpoint is saved.
    """
    entry, folder = config.mixer(name), Path(config.results) / "mix" / name
    audit = read_audit(Path(config.results) / "embed" / entry.encoder)
    if audit.get("status") == "absent":
        log(f"WARNING: mix {name}: the encoder {entry.encoder} is absent, and so is this mixer")
        write_json(folder / "summary.json", {"status": "absent", "reason": audit["reason"], "name": name})
        return
    torch.set_num_threads(entry.runtime.threads or granted_threads())
    rows = cohort_rows(config)
    slides = {row.slide_id: read_regions(config, entry, row.slide_id).bare() for row in rows}
    splits: dict[str, Split] = {"train": [], "val": [], "test": []}
    for row in rows:
        splits[str(row.split)] += [(slides[row.slide_id], number) for number in range(len(slides[row.slide_id]))]
    learned = [[row.split, row.slide_id, slides[row.slide_id].key] for row in rows if row.split in ("train", "val")]
    recipe = freeze_mixer(config, entry)
    identity = {"recipe_digest": digest(recipe), "data_digest": digest(learned)}
    try:
        with sole(folder):
            mixer, provenance = _trained(entry, folder, recipe, identity, splits)
    except Interrupted as stop:
        log(str(stop))
        raise SystemExit(EXIT_RETRY) from None
    tokens = 0
    for row in track(rows, f"mix {name}", unit="slides"):
        tokens += write_tokens(mixer, read_regions(config, entry, row.slide_id), folder)
    _summarise(folder, entry, provenance | {"encoder_sha256": encoder_digest(audit)}, splits, tokens)


def freeze_mixer(config: Config, entry: MixerConfig) -> dict[str, Any]:
    """The recipe: everything that decides the weights except the embeddings, as JSON values with sorted keys."""
    recipe = {
        "version": VERSION,
        "mixer": entry.model_dump(mode="json", exclude={"runtime", "seed", "magnifications"}),
        "magnifications": [float(value) for value in entry.magnifications or config.tile.magnifications],
        "tile_px": config.tile.tile_px,
        "seed": config.seed if entry.seed is None else entry.seed,
    }
    frozen: dict[str, Any] = json.loads(json.dumps(recipe, sort_keys=True))
    return frozen


def build_mixer(entry: MixerConfig, recipe: dict[str, Any], dim: int) -> Mixer:
    """The mixer of a recipe with random weights, for embeddings of length `dim`."""
    torch.manual_seed(recipe["seed"])
    magnifications = recipe["magnifications"]
    unit_um = 10 / magnifications[-1] * recipe["tile_px"]
    sizes = entry.model_dump(include={"width", "depth", "heads", "attention", "pooling"})
    return Mixer(MixerShape(dim=dim, magnifications=magnifications, unit_um=unit_um, **sizes))


def _trained(
    entry: MixerConfig, folder: Path, recipe: dict[str, Any], identity: dict[str, Any], splits: dict[str, Split]
) -> tuple[Mixer, dict[str, Any]]:
    """The mixer, trained now or before, in evaluation mode on its device, and its provenance."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if provenance := finished_run(folder, identity, WEIGHTS):
        log(f"{entry.name}: trained before, only tokens and summary are written again")
        return load_mixer(folder / WEIGHTS).to(device), provenance
    train, held_out = ([place for place in splits[name] if _size(place) >= FEWEST] for name in ("train", "val"))
    if len(train) < 2:
        raise MadError(
            f"mixers.{entry.name}: {len(train)} regions of the train split hold two tiles or more; it takes 2 to learn from. "
            "Look at report/qc.html, and at the `split` of the slides"
        )
    prepare_folder(folder, identity, recipe, WEIGHTS)
    slides = list({slide.slide_id: slide for slide, _ in splits["train"]}.values())
    mixer = build_mixer(entry, recipe, slides[0].vectors.shape[1])
    mean, std = mean_and_std(slides, len(recipe["magnifications"]))
    mixer.mean.copy_(mean)
    mixer.std.copy_(std)
    mixer.to(device)
    parameters = sum(p.numel() for p in mixer.parameters()) / 1e6
    sizes = [_size(place) for place in train]
    log(
        f"{entry.name}: {parameters:.1f} M parameters, {len(train)} regions of {min(sizes)} to {max(sizes)} tiles to learn from, "
        f"{len(held_out)} held out, batch {min(entry.batch, len(train))}, {device}, {torch.get_num_threads()} threads"
    )
    seconds = train_mixer(mixer, entry, recipe["seed"], train, held_out, folder, identity)
    provenance = {
        **identity, "recipe": recipe, "steps": entry.steps, "seconds": round(seconds, 1), "device": str(device),
        "threads": torch.get_num_threads(), **check_health(mixer, entry, train, held_out, recipe["seed"]),
    }  # fmt: skip
    sha256 = save_mixer(mixer, folder / WEIGHTS, provenance)
    return mixer.eval(), {**provenance, "weights_sha256": sha256}


def _size(place: tuple[SlideRegions, int]) -> int:
    tiles = place[0].tiles(place[1])
    return tiles.stop - tiles.start


def write_tokens(mixer: Mixer, slide: SlideRegions, folder: Path) -> int:
    """Write a slide's contextual tokens, `{slide}.npy` [n, width] and `{slide}.parquet`; returns how many there are."""
    tokens = contextual_tokens(mixer, slide)
    if not np.isfinite(tokens).all():
        raise MadError(f"mix: tokens of {slide.slide_id} are not finite; the mixer in {folder / WEIGHTS} is at fault")
    with atomic_path(folder / f"{slide.slide_id}.npy") as temporary:
        np.save(temporary, tokens)
    write_parquet(folder / f"{slide.slide_id}.parquet", token_table(slide))
    return len(tokens)


@torch.no_grad()
def contextual_tokens(mixer: Mixer, slide: SlideRegions) -> np.ndarray:
    """The tokens [n, width] of a slide, row for row as `token_table` lists them."""
    vectors: list[np.ndarray] = [np.zeros((0, mixer.shape.width), np.float32)]
    for part in split([(slide, number) for number in range(len(slide))]):
        batch = read_batch(part).to(mixer.mean.device)
        regions, tokens = mixer(batch)
        for region, own, present in zip(regions, tokens, batch.present, strict=True):
            vectors += [region[None].float().cpu().numpy(), own[present].float().cpu().numpy()]
    return np.concatenate(vectors)


def token_table(slide: SlideRegions) -> pd.DataFrame:
    """One row per token, region by region, the region's own first."""
    tiles = slide.table.assign(token="tile")
    columns = {"region_x_um": "x_um", "region_y_um": "y_um"}
    regions = tiles.iloc[slide.bounds[:-1]][["region", *columns]].rename(columns=columns).assign(token="region")
    order = np.argsort(np.concatenate([slide.bounds[:-1] - 0.5, np.arange(len(tiles))]), kind="stable")
    return (
        pd.concat([regions, tiles]).iloc[order].reset_index(drop=True).reindex(columns=TOKEN_TYPES).astype(TOKEN_TYPES)
    )


def _summarise(
    folder: Path, entry: MixerConfig, provenance: dict[str, Any], splits: dict[str, Split], tokens: int
) -> None:
    """curves.png and summary.json."""
    records = read_metrics(folder / METRICS)
    draw_mixer_curves(records, f"{entry.name} ({entry.encoder})", folder / "curves.png")
    last = records[-max(1, round(FINAL_SHARE * entry.steps)) :]
    write_json(
        folder / "summary.json",
        {
            **{key: value for key, value in provenance.items() if key != "recipe"},
            "status": "ok", "name": entry.name, "encoder": entry.encoder, "pooling": entry.pooling, "attention": entry.attention,
            "magnifications": provenance["recipe"]["magnifications"], "tokens": tokens,
            "splits": {name: len(part) for name, part in splits.items()},
            "loss": {key: float(np.mean([record[key] for record in last])) for key in LOSSES if last and key in last[0]},
        },
    )  # fmt: skip
