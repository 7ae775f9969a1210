"""Stage `train`: one entry of `runs:` from the shards to an encoder.

Reads `shard/*.parquet` and their tars, and of the tile tables, where they are there, the classes of the health checks' tiles;
writes `train/{run}/`: recipe.json, checkpoints/, metrics.jsonl, tensorboard/ where it is asked for, encoder/, curves.png and,
last, summary.json. Runs on one process, or on many under `torchrun` with the same samples in the same order.

A run is known by its recipe, its data and the weights it starts from. The same run resumes; of another finished one the encoder,
checkpoints and metrics are moved to `archive/` before the new run starts: trained weights are never overwritten. Over another
one that was stopped midway no run starts: the error names what differs. On SIGTERM or Ctrl-C while it takes steps the stage saves
a checkpoint and leaves with code 75 ("try again", sysexits.h); torchrun turns it into a code of its own, the launcher of
`mad.training.launch` does not. Before the first step and after the last it leaves at once, upon SIGTERM with 143: what is saved
stays, and the same command goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from mad.config import Config
from mad.config.recipe import freeze_recipe
from mad.config.training import RunConfig
from mad.files import MadError, digest, sha256_file, write_json
from mad.models.distill import DistillNetwork, check_cells
from mad.models.encoders import weights_sha256
from mad.models.export import export_encoder, model_card, read_provenance
from mad.models.heads import Trainee, build_network
from mad.models.initial import check_normalisation, common_licence, find_source, initial_licence
from mad.models.precision import choose_dtype
from mad.models.vit import build_backbone, local_side, mean_std
from mad.models.weights import Loaded, load_weights
from mad.progress import log
from mad.slides.sheet import cohort_rows
from mad.training import checkpoint, ranks, sharding
from mad.training.cells import check_grid, needed_grid
from mad.training.curves import draw_curves
from mad.training.data import TrainingSet
from mad.training.distill import CrossMagnification
from mad.training.distill_health import choose_field_set
from mad.training.folder import finished_run, prepare_folder, sole
from mad.training.health import HealthSet, choose_health_set, forward
from mad.training.index import Index, load_indexes
from mad.training.loop import Run, build_networks, train
from mad.training.loss_names import loss_names
from mad.training.method import Method, SelfDistillation
from mad.training.objective import Numerics
from mad.training.optimiser import build_optimiser, describe_rates, lr_scales
from mad.training.pairing import step_of
from mad.training.parallel import check_runtime, num_passes, spread_note, spread_over
from mad.training.process import EXIT_RETRY, Interrupted, granted_threads
from mad.training.records import METRICS, read_metrics, require_tensorboard, trim_metrics
from mad.training.stream import StreamSet
from mad.training.teacher import Teacher, find_teacher
from mad.training.watch import watch_of

STANDARDISE_SAMPLES = 64  # pairs
FINAL_SHARE = 0.1  # of the steps, over which the final loss is averaged


def run(config: Config, name: str) -> None:
    """Train run `name`, resume it, or, where it is finished, write its summary again.

    Raises:
        MadError: there is no such run, nothing to train on, or training failed.
        SystemExit: with code 75 after SIGTERM or Ctrl-C during the steps, once a checkpoint is saved.
    """
    recipe = freeze_recipe(config, name)
    entry, folder = config.run(name), Path(config.results) / "train" / name
    require_tensorboard(entry)
    torch.set_num_threads(entry.runtime.threads or granted_threads())
    with ranks.process_group() as device, ExitStack() as held:
        try:
            _train(config, entry, folder, recipe, device, held)
        except Interrupted as stop:
            log(str(stop))
            raise SystemExit(EXIT_RETRY) from None


def _train(
    config: Config, entry: RunConfig, folder: Path, recipe: dict[str, Any], device: torch.device, held: ExitStack
) -> None:
    shards = Path(config.results) / "shard"
    slides = [row.slide_id for row in cohort_rows(config)]
    splits = load_indexes(shards, ["train", "val"], entry.children, slides)
    index, seed, tile_px = splits["train"], recipe["seed"], recipe["tile_px"]
    source = find_source(entry, Path(config.results))
    start = sha256_file(source.path) if source else None
    if entry.init == "timm":
        start = weights_sha256(build_backbone(entry.backbone, tile_px, pretrained=True))
    frozen = find_teacher(config, entry.distill) if entry.distill else None
    identity = {"recipe_digest": digest(recipe), "data_digest": index.digest, "init_sha256": start}
    identity |= {"teacher_sha256": frozen.sha256} if frozen else {}
    finished = finished_run(folder, identity)
    if finished:
        if ranks.rank() == 0:
            log(f"{entry.name}: finished before, only its summary is written again")
            _summarise(folder, entry, recipe, identity, finished)
        return

    def load(backbone: nn.Module) -> Loaded | None:
        if source is None:
            return None
        check_normalisation(entry, source, backbone)
        loaded = load_weights(backbone, source.path)
        if ranks.rank() == 0:
            mean, std = (list(part) for part in mean_std(backbone))
            log(
                f"{entry.name}: starts from {source.path} ({loaded}); images are normalised by mean {mean} and std {std}"
            )
        return loaded

    def build(backbone: nn.Module, run: RunConfig) -> Trainee:
        return (
            DistillNetwork(backbone, run.distill, frozen.dim)
            if frozen and run.distill
            else build_network(backbone, run)
        )

    student, teacher = build_networks(entry, tile_px, seed, load, build)
    check_runtime(entry, student.backbone, ranks.world_size())
    lr_scales(student, entry)  # as the line above: whatever cannot be trained fails before an earlier run is moved away
    sharded = sharding.is_wanted(entry)
    grid = needed_grid(entry, student.backbone, tile_px)
    local_px = local_side(student.backbone, entry, tile_px)
    if entry.loader == "stream":
        data: TrainingSet = StreamSet(index, entry, tile_px, local_px, seed, grid)
    else:
        data = TrainingSet(index, entry, tile_px, local_px, seed, grid, frozen.features(index) if frozen else None)
    if grid and entry.targets == "cell":
        check_grid(grid, list(data.weights), f"runs.{entry.name}.targets ({entry.backbone.model} at {tile_px} px)")
    if entry.distill and entry.distill.local_weight:
        check_cells(student.backbone, [step_of(kind) for kind in data.weights], tile_px, entry.name)
    numerics = Numerics(*mean_std(student.backbone), device, _agreed_dtype(entry, device))
    method = choose_method(config, entry, numerics, {"val": splits["val"], "train": index}, frozen)
    first = choose_health_set({"train": index}, tile_px, STANDARDISE_SAMPLES) if entry.head.standardise else None
    ranks.barrier()  # every process has what it needs: only now is an earlier run moved away
    with ranks.together(device):
        if ranks.rank() == 0:
            held.enter_context(sole(folder))
            prepare_folder(folder, identity, recipe, slides=index.slide_digests(), held_out=method.health.digest)

    precision = str(numerics.dtype).removeprefix("torch.")
    student.to(device)
    teacher.to(device)
    with ranks.together(device):
        saved = checkpoint.load_latest(folder / "checkpoints", identity)
    checkpoint.check_same_step(folder / "checkpoints", saved, device)
    checkpoint.set_aside(folder / "checkpoints", saved)
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
                f"go on in {precision}; resume on a machine like the first, or train another run that names its precision, bf16 or "
                "fp32 instead of auto"
            )
        state.restore(saved)
        del saved
    with ranks.together(device):
        if ranks.rank() == 0:
            _announce(data, state, numerics, len(trim_metrics(folder / METRICS, state.step)))
    train(state, data, method, folder)
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
            length, told = f"{entry.steps} steps", str(frozen) if frozen else None
            licence = common_licence(licence, frozen.licence) if frozen else licence
            card = model_card(entry, recipe, encoder, f"`{entry.name}`", losses, samples, tiles, length, licence, told)
            provenance = {
                **identity, "recipe": recipe, "steps": state.step, "seconds": round(state.seconds, 1), "losses": losses,
                "samples": samples, "tiles": tiles, "health_split": method.health.source,
                "health_kind": method.health.kind, "device": str(device), "precision": precision,
                "world_size": ranks.world_size(), "threads": torch.get_num_threads(),
            }  # fmt: skip
            export_encoder(
                encoder, folder / "encoder", image_px=tile_px, card=card, provenance=provenance, licence=licence
            )
            _summarise(folder, entry, recipe, identity, read_provenance(folder / "encoder") or {})


def choose_method(
    config: Config, entry: RunConfig, numerics: Numerics, indexes: dict[str, Index], frozen: Teacher | None
) -> Method:
    """The method of a run with its held-out set, from the first split of `indexes` that has pairs."""
    tile_px, results = config.tile.tile_px, Path(config.results)
    if entry.distill is None or frozen is None:
        health = choose_health_set(indexes, tile_px, entry.runtime.health_samples)
        return SelfDistillation(entry, numerics, replace(health, labels=tile_labels(results / "tile", health.tiles)))
    fields = choose_field_set(indexes, entry, entry.distill, tile_px, frozen)
    return CrossMagnification(entry, entry.distill, numerics, fields, frozen)


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


def standardise_head(student: Any, teacher: Any, data: HealthSet, numerics: Numerics) -> None:
    """Data-dependent initialisation of the head on unaugmented tiles, the same for every method; the teacher follows."""
    embeddings, _ = forward(teacher, data, numerics)
    student.head.standardise(embeddings.to(numerics.device))
    teacher.load_state_dict(student.state_dict())


def _agreed_dtype(entry: RunConfig, device: torch.device) -> torch.dtype:
    """The type of forward passes on all processes: `auto` may find them on machines of which not all are good at bf16."""
    dtype = choose_dtype(entry.precision, device)
    return torch.float32 if ranks.any_of([dtype == torch.float32], device)[0] else dtype


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


def _summarise(
    folder: Path, entry: RunConfig, recipe: dict[str, Any], identity: dict[str, Any], provenance: dict[str, Any]
) -> None:
    """curves.png and summary.json from what the run has written."""
    records = read_metrics(folder / METRICS)
    if not records:
        raise MadError(
            f"{folder / METRICS}: no records beside a finished encoder, of which the summary is made; put the file back, or remove "
            f"{folder / 'encoder'} and {folder / 'checkpoints'}, and the same command trains anew"
        )
    watch = watch_of(entry)
    draw_curves(records, watch, f"{entry.name} ({entry.method})", folder / "curves.png")
    last = records[-max(1, round(FINAL_SHARE * entry.steps)) :]
    loss = math.fsum(record[watch.loss] for record in last) / len(last)
    kinds = sorted({record["kinds"] for record in last})
    by_kind = {kind: [record[watch.loss] for record in last if record["kinds"] == kind] for kind in kinds}
    health: dict[str, float | None] = next((record["health"] for record in reversed(records) if "health" in record), {})
    named = watch.warn(loss, health)
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
            "name": entry.name, "method": entry.method, "final_loss": loss, **watch.facts,
            "first_loss": records[0][watch.loss], "images_per_s_median": rates[len(rates) // 2],
            "data_wait_share": round(waited, 3), "health": health,
            "final_loss_by_views": {kind: math.fsum(found) / len(found) for kind, found in by_kind.items()},
            "collapsed": any("collapse" in warning for warning in named), "warnings": warnings, "tile_px": recipe["tile_px"],
        },
    )  # fmt: skip
