"""The command `mad`: one command per stage, and a few for looking.

Imports of the stages happen inside the commands: `mad --help` and the workflow's many short jobs load no torch that they
do not need. Only here are errors turned into text; everything below raises them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mad.config import Config, json_schema, load_config
from mad.files import MadError, atomic_path, to_json, write_json
from mad.progress import log

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.split("\n")[0]
)
config_app = typer.Typer(no_args_is_help=True, help="The configuration: check it, print its schema.")
tiles_app = typer.Typer(no_args_is_help=True, help="Look at single tiles.")
app.add_typer(config_app, name="config")
app.add_typer(tiles_app, name="tiles")

ConfigFile = Annotated[Path, typer.Option("--config", "-c", envvar="MAD_CONFIG", help="Configuration file.")]
Slide = Annotated[str, typer.Argument(help="A slide_id of the cohort sheet.")]
DEFAULT = Path("config.yaml")


def _row(config: Config, slide_id: str):  # type: ignore[no-untyped-def]
    from mad.slides.sheet import cohort_rows

    rows = {row.slide_id: row for row in cohort_rows(config)}
    if slide_id not in rows:
        raise MadError(f"the cohort has no slide {slide_id!r}; it has {', '.join(list(rows)[:20])}")
    return rows[slide_id]


@app.command()
def synth(
    config: ConfigFile = DEFAULT,
    slide: Annotated[str | None, typer.Argument(help="Make this slide only.")] = None,
    check: Annotated[
        bool, typer.Option(help="Check the finished cohort: do colours give class or place away?")
    ] = False,
) -> None:
    """Make the synthetic cohort (slides, annotations, sheet), or check it."""
    from mad.slides.sheet import write_sheet
    from mad.slides.synthetic.cohort import sheet_rows

    settings = load_config(config)
    folder = Path(settings.results) / "synthetic"
    if check:
        from mad.slides.synthetic.checks import check_cohort

        if settings.synthetic.patients < 4:
            write_json(
                folder / "check.json", {"passed": None, "reason": "a cohort of fewer than 4 patients is not checked"}
            )
            return
        found = check_cohort(settings.synthetic, folder)
        write_json(folder / "check.json", found)
        for name, passed in found["passed_each"].items():
            log(f"synthetic cohort: {name}: {'ok' if passed else 'FAILED: results on this cohort prove little'}")
        return
    from mad.slides.synthetic.slide import write_slide

    rows = sheet_rows(settings.synthetic)
    for row in rows:
        if slide in (None, row["slide_id"]):
            write_slide(settings.synthetic, row["slide_id"], folder)
    if slide is None:
        write_sheet(folder / "slides.tsv", rows)


@app.command()
def cohort(config: ConfigFile = DEFAULT) -> None:
    """Check the cohort sheet and write cohort/slides.parquet."""
    from mad.stages import cohort as stage

    stage.run(load_config(config))


@app.command()
def tile(slide: Slide, config: ConfigFile = DEFAULT) -> None:
    """Lay the grid of aligned tiles over one slide: tissue, labels, tile table."""
    from mad.stages import tile as stage

    settings = load_config(config)
    stage.run(settings, _row(settings, slide))


@app.command()
def sample(config: ConfigFile = DEFAULT) -> None:
    """Select pairs and standalone tiles of the cohort under the class caps."""
    from mad.stages import sample as stage

    stage.run(load_config(config))


@app.command()
def shard(slide: Slide, config: ConfigFile = DEFAULT) -> None:
    """Cut the selected tiles of one slide into tar shards with byte offsets."""
    from mad.stages import shard as stage

    settings = load_config(config)
    stage.run(settings, _row(settings, slide))


@app.command("shard-cohort")
def shard_cohort(config: ConfigFile = DEFAULT) -> None:
    """Count the shards of the whole cohort and digest their content: what trainings start from."""
    from mad.stages import shard as stage

    stage.run_cohort(load_config(config))


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="An entry of `runs:`.")],
    config: ConfigFile = DEFAULT,
) -> None:
    """Train one run (alone, or under torchrun); resumes from its last checkpoint."""
    from mad.stages import train as stage

    stage.run(load_config(config), run)


@app.command()
def embed(
    encoder: Annotated[str, typer.Argument(help="An entry of `encoders:`.")],
    config: ConfigFile = DEFAULT,
) -> None:
    """Embed every tile of the shards, and every tile of the mapped slides, with one encoder."""
    from mad.stages import embed as stage

    stage.run(load_config(config), encoder)


@app.command()
def evaluate(
    encoder: Annotated[str, typer.Argument(help="An entry of `encoders:`.")],
    config: ConfigFile = DEFAULT,
) -> None:
    """Run the protocols of Tables 3-5 on one encoder's embeddings."""
    from mad.stages import evaluate as stage

    stage.run(load_config(config), encoder)


@app.command()
def report(config: ConfigFile = DEFAULT) -> None:
    """Draw the tables and figures from the evaluations."""
    from mad.stages import report as stage

    stage.run(load_config(config))


@app.command()
def inspect(
    slides: Annotated[list[Path], typer.Argument(metavar="SLIDE...", help="Slide files.")],
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


@config_app.command("check")
def config_check(config: ConfigFile = DEFAULT) -> None:
    """Say whether a configuration is right, and print it with every default."""
    typer.echo(to_json(load_config(config).model_dump(mode="json")), nl=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema that the workflow validates against (workflow/schemas/config.schema.json)."""
    typer.echo(to_json(json_schema()), nl=False)


@tiles_app.command("show")
def tiles_show(
    tile_id: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file.")] = Path("tile.png"),
    config: ConfigFile = DEFAULT,
) -> None:
    """Write one tile's pixels, straight from its slide, as PNG."""
    import cv2

    from mad.tiles.aligned import open_aligned
    from mad.tiles.pyramid import parse_tile_id

    settings = load_config(config)
    try:
        slide_id, index = parse_tile_id(tile_id)
    except ValueError as error:
        raise MadError(str(error)) from None
    row = _row(settings, slide_id)
    with open_aligned(row.path, settings.tile, row.mpp) as slide:
        if not slide.grid.holds(index):
            raise MadError(f"{tile_id}: {slide_id} has no such tile; `status` and ids stand in tile/{slide_id}.parquet")
        x, y, side, _ = slide.grid.rectangle(*slide.grid.ladder.position(index))
        with atomic_path(output.with_suffix(".png")) as temporary:
            cv2.imwrite(str(temporary), cv2.cvtColor(slide.tile(index), cv2.COLOR_RGB2BGR))
    typer.echo(f"{output}: {tile_id}, {side} level-0 px at ({x}, {y}) of {row.path}")


def main() -> None:
    """Entry point: a fault of the input is one readable message and exit code 2."""
    try:
        app()
    except MadError as error:
        print(f"mad: {error}", file=sys.stderr)
        sys.exit(2)
