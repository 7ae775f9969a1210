"""Commands beside the stages: look at slides, machine, configuration and tiles; check the shards; write for other tools."""

from __future__ import annotations

import contextlib
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mad.cli.base import DEFAULT, ConfigFile, app, config_app, find_rows, shards_app, tiles_app
from mad.config import Config, json_schema, load_config
from mad.files import MadError, atomic_path, to_json
from mad.progress import log, track

SHOWN = 20  # names, or faults of one shard, in a message

Slides = Annotated[list[str] | None, typer.Argument(metavar="SLIDE", help="slide_ids; all of the cohort by default.")]


@app.command()
def inspect(
    slides: Annotated[
        list[Path], typer.Argument(metavar="SLIDE...", help="Slide files.", readable=False)
    ],  # what cannot be read is told beside the rest
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", envvar="MAD_CONFIG", help="Its `tile:`; else of config.yaml, else the defaults."
        ),
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(min=0.02, max=20, help="um/px of level 0, as the cohort sheet would give it.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a slide's levels, scale and storage, and the tiles that a configuration would cut from it."""
    from rich.console import Console

    from mad.reporting.inspect import describe_each, render

    path = config or (DEFAULT if DEFAULT.exists() else None)
    found = describe_each(slides, (load_config(path) if path else Config()).tile, mpp)
    if json:
        typer.echo(to_json(found), nl=False)
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        for facts in found:
            console.print(*render(facts), "", sep="\n")
    if any(facts["error"] for facts in found):
        raise typer.Exit(2)


@app.command()
def encoders(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the published encoders that `spec: published:NAME` knows: size, pooling, licence, and the page to accept it on."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from mad.models.registry import IMAGENET, PUBLISHED

    if json:
        typer.echo(to_json({name: asdict(published) for name, published in PUBLISHED.items()}), nl=False)
        return
    columns = ("name", "encoder", "px", "mean, std", "dim", "pooling", "licence", "weights")
    table = Table(*columns, box=None, pad_edge=False)
    for name, published in PUBLISHED.items():
        page = f"https://huggingface.co/{published.hub}{' (gated)' if published.gated else ''}"
        scaling = "ImageNet" if published.mean_std == IMAGENET else "own"
        size = (str(published.image_px), scaling, str(published.dim))
        table.add_row(name, published.title, *size, published.pooling, published.licence, page)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@app.command()
def doctor(config: ConfigFile = DEFAULT) -> None:
    """Check environment, configuration and cohort: PASS, WARN or FAIL, and what would mend it."""
    from mad.reporting.doctor import examine

    checks = examine(config)
    colours = {"PASS": "green", "WARN": "yellow", "FAIL": "red"}
    for check in checks:
        typer.echo(
            f"{typer.style(check.status, fg=colours[check.status])}  {check.name:<12} "
            + check.finding.replace("\n", "\n" + " " * 19)
        )
        if check.mend:
            typer.echo(f"{'':<19}mend: {check.mend}")
    if any(check.status == "FAIL" for check in checks):
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigFile = DEFAULT,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read the slides' headers alone: no tissue, no polygons, no disk, no hours.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with every slide.")] = False,
) -> None:
    """Tell before anything runs: slides that will fail, tiles, disk, hours, and how each figure was estimated."""
    from rich.console import Console

    from mad.reporting.plan import plan as make_plan
    from mad.reporting.plan_table import render

    found = make_plan(load_config(config), quick=quick)
    if json:
        typer.echo(to_json(found), nl=False)
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(*render(found), sep="\n")


@app.command()
def view(
    folder: Annotated[Path, typer.Argument(help="A viewer's folder.")] = Path("results/report/viewer"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
) -> None:
    """Serve the viewer (slides with labels and predictions as layers) to the browser of this machine, until Ctrl-C."""
    from mad.reporting.serve import open_server

    with open_server(folder, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


@config_app.command("check")
def config_check(config: ConfigFile = DEFAULT) -> None:
    """Say whether a configuration is right, and print it with every default."""
    typer.echo(to_json(load_config(config).model_dump(mode="json")), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema that the workflow validates against (workflow/schemas/config.schema.json)."""
    typer.echo(to_json(json_schema()), nl=False)


@config_app.command("reference")
def config_reference() -> None:
    """Print every key with its type, default and meaning, as Markdown (docs/config.md)."""
    from mad.config.reference import reference

    typer.echo(reference(), nl=False)


@tiles_app.command("show")
def tiles_show(
    tile_id: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file.")] = Path("tile.png"),
    config: ConfigFile = DEFAULT,
) -> None:
    """Write one tile's pixels, straight from its slide, as PNG."""
    from PIL import Image

    from mad.tiles.aligned import Footprint, open_aligned
    from mad.tiles.pyramid import parse_tile_id

    output = output.with_suffix(".png")
    settings = load_config(config)
    try:
        slide_id, index = parse_tile_id(tile_id)
    except ValueError as error:
        raise MadError(str(error)) from None
    (row,) = find_rows(settings, [slide_id])
    with open_aligned(row.path, settings.tile, row.mpp) as slide:
        if not slide.grid.holds(index) or not slide.plan.levels[len(index) - 2].available:
            raise MadError(f"{tile_id}: {slide_id} has no such tile; `status` and ids stand in tile/{slide_id}.parquet")
        x, y, side, _ = slide.grid.rectangle(*slide.grid.ladder.position(index))
        pixels = Footprint(slide, *index[:2]).tile(index)
        if pixels is None:
            raise MadError(f"{tile_id}: its pixels cannot be decoded; is {row.path} whole? Copy it anew")
        with atomic_path(output) as temporary:
            Image.fromarray(pixels).save(temporary)
    typer.echo(f"{output}: {tile_id}, {side} level-0 px at ({x}, {y}) of {row.path}")


@shards_app.command("verify")
def shards_verify(slides: Slides = None, config: ConfigFile = DEFAULT) -> None:
    """Read every shard and compare it, to the byte, with its index; exit code 1 where anything differs."""
    from mad.tiles.verify import verify_slide

    settings = load_config(config)
    folder = Path(settings.results) / "shard"
    rows = find_rows(settings, slides)
    checked = ((row.slide_id, shard, found) for row in rows for shard, found in verify_slide(folder, row.slide_id))
    count, bad = 0, set()
    for slide_id, shard, faults in track(checked, "shards verify", unit="files"):
        count += shard.endswith(".tar")
        for fault in faults[:SHOWN]:
            typer.echo(f"{fault.shard}: {f'{fault.tile_id}: ' if fault.tile_id else ''}{fault.cause}")
        if len(faults) > SHOWN:
            typer.echo(f"{shard}: {len(faults) - SHOWN} more faults")
        if faults:
            bad.add(slide_id)
    if not bad:
        log(f"shards verify: {count} tars of {len(rows)} slides are as they were written")
        return
    targets = " ".join(f"{settings.results}/shard/{slide_id}.parquet" for slide_id in sorted(bad))
    configured = "" if config == DEFAULT else f"--configfile {config} "
    typer.echo(f"mend: snakemake --cores 2 {configured}--force {targets}")
    raise typer.Exit(1)


class Format(StrEnum):
    """Tools whose files are written."""

    clam = "clam"
    trident = "trident"


class Status(StrEnum):
    """`status` of a tile."""

    ok = "ok"
    blank = "blank"
    edge = "edge"


@app.command()
def export(
    slides: Slides = None,
    format: Annotated[Format, typer.Option(help="Whose files to write.")] = Format.trident,
    magnification: Annotated[
        list[float] | None,
        typer.Option("--magnification", "-m", help="May be repeated; by default all that the slides were tiled at."),
    ] = None,
    status: Annotated[list[Status] | None, typer.Option(help="May be repeated; `ok` by default.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Tiles of this class alone; may be repeated.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Write this encoder's embeddings of the tiles in the shards; TRIDENT alone.")
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="With --encoder: every tile of the slides of the segmentation maps.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; RESULTS/export/FORMAT by default.")
    ] = None,
    config: ConfigFile = DEFAULT,
) -> None:
    """Write the coordinates of tiles as CLAM or TRIDENT read them, or embeddings as TRIDENT writes them: an HDF5 file per
    slide and magnification."""
    from mad.tiles.export import Selection, tiled_magnifications
    from mad.tiles.export import export as write_coordinates
    from mad.tiles.export_features import export_features, not_embedded

    settings = load_config(config)
    if encoder and format is not Format.trident:
        raise MadError("--encoder writes TRIDENT's files alone; leave --format out")
    if encoder:
        settings.encoder(encoder)
    elif dense:
        raise MadError("--dense is of embeddings: name an --encoder")
    results = Path(settings.results)
    folder = output or results / "export" / format.value
    if unknown := sorted(set(label or []) - set(settings.label.classes)):
        raise MadError(f"--label {unknown[0]!r} is no class of this configuration; there are {settings.label.classes}")
    names = [row.slide_id for row in find_rows(settings, slides)]
    values = magnification or tiled_magnifications(results, names)
    if not values:
        raise MadError("none of these slides gave a tile; `mad qc` makes a page that tells why")
    for value in values:
        selection = Selection(value, [each.value for each in status or [Status.ok]], label)
        if encoder:
            written = export_features(results, names, encoder, selection, settings.tile.tile_px, folder, dense=dense)
        else:
            written = write_coordinates(results, names, format.value, selection, settings.tile.tile_px, folder)
        missing = not_embedded(results, names, encoder, dense=dense) if encoder else []
        if dense:
            why = f"not embedded whole by {encoder}: those of `evaluate.segmentation_slides` are, by `snakemake --cores 2 embed`"
        else:
            why = f"not embedded by {encoder}: run `snakemake --cores 2 embed`"
        if len(missing) == len(names):
            raise MadError(f"{', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}: {why}")
        left_out = f"; {len(missing)} slides are {why}" if missing else ""
        if without := len(names) - len(written) - len(missing):
            left_out += f"; {without} slides have no such tile{' that is embedded' if encoder else ''}"
        what = f"embeddings by {encoder} of " if encoder else ""
        log(f"export {value:g}x: {what}{sum(written.values())} tiles of {len(written)} slides to {folder}{left_out}")
