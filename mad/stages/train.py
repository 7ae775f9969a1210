"""Stage `train`: one entry of `runs:` from the shards to an encoder.

Reads `shard/*.parquet` and their tars, and of the tile tables, where they are there, the classes of the health checks' tiles;
writes `train/{run}/`: recipe.json, checkpoints/, metrics.jsonl, tensorboard/ where it is asked for, encoder/, curves.png and,
last, summary.json. Runs on one process, or on many under `torchrun` with the same samples in the same order.

A run is known by its recipe, its data and the weights it starts from. The same run resumes; of another one the encoder,
checkpoints and metrics are moved to `archive/` before the new run starts: trained weights are never overwritten. On SIGTERM
the stage saves a checkpoint and leaves with code 75 ("try again", sysexits.h); torchrun turns it into a code of its own, the
launcher of `mad.training.launch` does not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from mad.config import Config
from mad.config.recipe import freeze_recipe
from mad.config.training import RunConfig
from mad.files import MadError, digest, read_json, sha256_file, write_json, write_json_if_changed
from mad.models.encoders import weights_sha256
from mad.models.export import export_encoder, model_card, read_provenance
from mad.models.heads import Network
from mad.models.initial import find_source, initial_licence
from mad.models.masked import patch_grid
from mad.models.precision import choose_dtype
from mad.models.vit import build_backbone, local_crop_px, mean_std
from mad.models.weights import Loaded, load_weights
from mad.progress import log
from mad.slides.sheet import cohort_rows
from mad.training import checkpoint, ranks, sharding
from mad.training.curves import draw_curves
from mad.training.data import TrainingSet
from mad.training.health import HealthSet, choose_health_set, find_warnings, forward
from mad.training.index import load_index
from mad.training.launch import EXIT_RETRY
from mad.training.loop import Interrupted, Run, build_networks, train
from mad.training.loss_names import loss_names
from mad.training.objective import Numerics
from mad.training.optimiser import build_optimiser, describe_rates, lr_scales
from mad.training.parallel import check_runtime, num_passes, spread_note, spread_over
from mad.training.records import METRICS, TENSORBOARD, read_metrics, require_tensorboard, trim_metrics
from mad.training.stream import StreamSet

OWNED = ("encoder", "checkpoints", METRICS, TENSORBOARD, "curves.png", "summary.json", "identity.json")
STANDARDISE_SAMPLES = 64  # pairs
FINAL_SHARE = 0.1  # of the steps, over which the final loss is averaged


def run(config: Config, name: str) -> None:
    """Train run `name`, resume it, or, where it is finished, write its summary again.

    Raises:
        MadError: there is no such run, nothing to train on, or training failed.
        SystemExit: with code 75 after SIGTERM, once a checkpoint is saved.
    """
    recipe = freeze_recipe(config, name)
    entry, folder = config.run(name), Path(config.results) / "train" / name
    require_tensorboard(entry)
    torch.set_num_threads(entry.runtime.threads or granted_threads())
    with ranks.process_group() as device:
        try:
            _train(config, entry, folder, recipe, device)
        except Interrupted as stop:
            log(str(stop))
            raise SystemExit(EXIT_RETRY) from None


def granted_threads() -> int:
    """Threads that this process may use: `OMP_NUM_THREADS`, else the CPUs it is bound to."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def _train(config: Config, entry: RunConfig, folder: Path, recipe: dict[str, Any], device: torch.device) -> None:
    shards = Path(config.results) / "shard"
    slides = [row.slide_id for row in cohort_rows(config)]
    splits = {split: load_index(shards, split, entry.children, slides) for split in ("train", "val")}
    index, seed, tile_px = splits["train"], recipe["seed"], recipe["tile_px"]
    source = find_source(entry, Path(config.results))
    start = sha256_file(source.path) if source else None
    if entry.init == "timm":
        start = weights_sha256(build_backbone(entry.backbone, tile_px, pretrained=True))
    identity = {"recipe_digest": digest(recipe), "data_digest": index.digest, "init_sha256": start}
    finished = finished_run(folder, identity)
    if finished:
        if ranks.rank() == 0:
            log(f"{entry.name}: finished before, only its summary is written again")
            _summarise(folder, entry, recipe, identity, finished)
        return

    def load(backbone: nn.Module) -> Loaded | None:
        if source is None:
            return None
        loaded = load_weights(backbone, source.path)
        if ranks.rank() == 0:
            log(f"{entry.name}: starts from {source.path} ({loaded})")
        return loaded

    student, teacher = build_networks(entry, tile_px, seed, load)
    check_runtime(entry, student.backbone, ranks.world_size())
    lr_scales(student, entry)  # as the line above: whatever cannot be trained fails before an earlier run is moved away
    sharded = sharding.is_wanted(entry)
    grid = patch_grid(student.backbone, tile_px) if entry.ibot.weight else None
    local_px = entry.views.local_px or local_crop_px(student.backbone, tile_px)
    samples_of = StreamSet if entry.loader == "stream" else TrainingSet
    data = samples_of(index, entry, tile_px, local_px, seed, grid)
    health = choose_health_set({"val": splits["val"], "train": index}, tile_px, entry.runtime.health_samples)
    health = replace(health, labels=tile_labels(Path(config.results) / "tile", health.tiles))
    first = choose_health_set({"train": index}, tile_px, STANDARDISE_SAMPLES) if entry.head.standardise else None
    ranks.barrier()  # every process has what it needs: only now is an earlier run moved away
    with ranks.together(device):
        if ranks.rank() == 0:
            prepare_folder(folder, identity, recipe)

    dtype = choose_dtype(entry.precision, device)
    if ranks.any_of([dtype == torch.float32], device)[0]:  # `auto` on machines of which not all are good at bf16
        dtype = torch.float32
    numerics = Numerics(*mean_std(student.backbone), device, dtype)
    precision = str(numerics.dtype).removeprefix("torch.")
    student.to(device)
    teacher.to(device)
    with ranks.together(device):
        saved = checkpoint.load_latest(folder / "checkpoints", identity, mapped=sharded)
    checkpoint.check_same_step(folder / "checkpoints", saved, device)
    if first and not saved:
        standardise_head(student, teacher, first, numerics)
    if sharded:
        sharding.shard(student, numerics.dtype, device)
        sharding.shard(teacher, numerics.dtype, device)
    optimiser, spread = build_optimiser(student, entry), spread_over(entry, ranks.world_size())
    state = Run(student, teacher, optimiser, identity, precision, spread)
    if saved:
        if saved["precision"] != precision:
            raise MadError(
                f"runs.{entry.name}.precision: trained in {saved['precision']} up to step {saved['step']}, this machine would "
                f"go on in {precision}; resume on a machine like the first, or set precision to bf16 or fp32 instead of auto, "
                f"which starts the run anew and moves what there is to {folder / 'archive'}"
            )
        state.restore(saved)
        del saved
    with ranks.together(device):
        if ranks.rank() == 0:
            _announce(data, state, numerics, len(trim_metrics(folder / METRICS, state.step)))
    train(state, data, health, numerics, folder)
    encoder = teacher.backbone
    weights = sharding.gather_state(encoder.state_dict()) if sharded else None
    with ranks.together(device):
        if ranks.rank() == 0:
            losses, samples, tiles = loss_names(entry, list(data.weights)), data.counts, index.magnification_counts()
            losses += [note] if (note := spread_note(entry, ranks.world_size())) else []
            licence = initial_licence(entry, source, encoder)
            if weights:
                encoder = build_backbone(entry.backbone, tile_px)
                encoder.load_state_dict(weights)
            card = model_card(
                entry, recipe, encoder, f"`{entry.name}`", losses, samples, tiles, f"{entry.steps} steps", licence
            )
            provenance = {
                **identity, "recipe": recipe, "steps": state.step, "seconds": round(state.seconds, 1), "losses": losses,
                "samples": samples, "tiles": tiles, "health_split": health.source,
                "health_kind": health.kind, "device": str(device), "precision": precision,
                "world_size": ranks.world_size(), "threads": torch.get_num_threads(),
            }  # fmt: skip
            export_encoder(
                encoder, folder / "encoder", image_px=tile_px, card=card, provenance=provenance, licence=licence
            )
            _summarise(folder, entry, recipe, identity, read_provenance(folder / "encoder") or {})


def tile_labels(folder: Path, tiles: Sequence[tuple[str, str]]) -> list[str | None]:
    """The class of each tile (slide, tile id) by the tile tables in `folder`; None without a class, or without a table."""
    known: dict[str, str] = {}
    for slide in {slide for slide, _ in tiles}:
        path = folder / f"{slide}.parquet"
        if path.exists():
            wanted = [tile for own, tile in tiles if own == slide]
            table = pd.read_parquet(path, columns=["tile_id", "label"], filters=[("tile_id", "in", wanted)]).dropna()
            known |= dict(zip(table["tile_id"], table["label"], strict=True))
    return [known.get(tile) for _, tile in tiles]


def finished_run(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The provenance of the encoder in `folder` where this very run has made it, otherwise None."""
    provenance = read_provenance(folder / "encoder")
    known = folder / "identity.json"
    if not provenance or not known.exists() or not _same_run(read_json(known), identity):
        return None
    return provenance if all(provenance.get(key) == value for key, value in identity.items()) else None


def _same_run(former: dict[str, Any] | None, identity: dict[str, Any]) -> bool:
    """Whether the content of identity.json, which holds the recipe too, is of the run with this identity."""
    return former is not None and {key: former.get(key) for key in identity} == identity


def standardise_head(student: Network, teacher: Network, data: HealthSet, numerics: Numerics) -> None:
    """Data-dependent initialisation of the head on unaugmented tiles, the same for every method; the teacher follows."""
    embeddings, _ = forward(teacher, data, numerics)
    student.head.standardise(embeddings.to(numerics.device))
    teacher.load_state_dict(student.state_dict())


def _announce(data: TrainingSet, state: Run, numerics: Numerics, known: int) -> None:
    run = data.run
    shares = {kind: round(weight / sum(data.weights.values()), 3) for kind, weight in data.weights.items()}
    parameters = sum(p.numel() for p in state.student.parameters()) / 1e6
    world = ranks.world_size()
    passes = num_passes(run, world)
    log(
        f"{run.name}: method {run.method}, {parameters:.1f} M parameters, {describe_rates(state.optimiser, run)}; "
        f"batch {run.batch} = {world} x {numerics.device} x {passes} passes x {run.batch // world // passes} samples, "
        f"{state.precision}, "
        f"{torch.get_num_threads()} threads, samples {data.counts}, mix {shares}"
    )
    if note := spread_note(run, world):
        log(f"{run.name}: WARNING: {note}")
    if state.step:
        log(f"{run.name}: resumes at step {state.step} ({known} steps recorded)")


def prepare_folder(folder: Path, identity: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Make `folder` that of this run: what another recipe or other data left is moved to `archive/`, never overwritten."""
    checkpoint.remove_leftovers(folder / "checkpoints")
    known, present = folder / "identity.json", {**identity, "recipe": recipe}
    former = read_json(known) if known.exists() else None
    if not _same_run(former, identity) and any((folder / name).exists() for name in OWNED):
        tag = f"{former['recipe_digest']}-{former['data_digest']}" if former else "unknown"
        target, number = folder / "archive" / tag, 1
        while target.exists():
            number += 1
            target = folder / "archive" / f"{tag}-{number}"
        target.mkdir(parents=True)
        for name in OWNED:
            if (folder / name).exists():
                (folder / name).rename(target / name)
        told = present if former and "recipe" in former else identity
        changed = checkpoint.differences(former, told) if former else ["identity.json is missing"]
        log(
            f"{folder.name}: an earlier run differs in {'; '.join(changed)}; it was moved to {target}, training starts anew"
        )
    write_json_if_changed(known, present)
    write_json_if_changed(folder / "recipe.json", recipe)
    (folder / "checkpoints").mkdir(exist_ok=True)


def _summarise(
    folder: Path, entry: RunConfig, recipe: dict[str, Any], identity: dict[str, Any], provenance: dict[str, Any]
) -> None:
    """curves.png and summary.json from what the run has written."""
    records = read_metrics(folder / METRICS)
    if not records:
        raise MadError(
            f"{folder / 'metrics.jsonl'}: no records beside a finished encoder; remove {folder / 'encoder'} to retrain"
        )
    draw_curves(records, entry.head.prototypes, f"{entry.name} ({entry.method})", folder / "curves.png")
    last = records[-max(1, round(FINAL_SHARE * entry.steps)) :]
    loss = math.fsum(record["dino"] for record in last) / len(last)
    kinds = sorted({record["kinds"] for record in last})
    by_kind = {kind: [record["dino"] for record in last if record["kinds"] == kind] for kind in kinds}
    health: dict[str, float | None] = next((record["health"] for record in reversed(records) if "health" in record), {})
    named = find_warnings(loss, entry.head.prototypes, health)
    warnings = [f"{warning}: {text}" for warning, text in named.items()]
    for warning in warnings:
        log(f"{entry.name}: WARNING: {warning}")
    rates = sorted(record["images_per_s"] for record in records)
    waited = math.fsum(record["data_wait_s"] for record in records) / max(provenance.get("seconds", 0.0), 1e-9)
    write_json(
        folder / "summary.json",
        {
            **{key: value for key, value in provenance.items() if key != "recipe"},
            **identity,
            "name": entry.name, "method": entry.method, "final_loss": loss, "ln_k": math.log(entry.head.prototypes),
            "first_loss": records[0]["dino"], "images_per_s_median": rates[len(rates) // 2], "data_wait_share": round(waited, 3),
            "health": health, "final_loss_by_views": {kind: math.fsum(found) / len(found) for kind, found in by_kind.items()},
            "collapsed": any("collapse" in warning for warning in named), "warnings": warnings, "tile_px": recipe["tile_px"],
        },
    )  # fmt: skip
