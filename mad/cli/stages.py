"""One command per stage, as the workflow's rules call them, and `synth` for the synthetic cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mad.cli.base import DEFAULT, ConfigFile, app, find_rows
from mad.config import load_config
from mad.files import write_json
from mad.progress import log

Slide = Annotated[str, typer.Argument(help="A slide_id of the cohort sheet.")]


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
    stage.run(settings, find_rows(settings, [slide])[0])


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
    stage.run(settings, find_rows(settings, [slide])[0])


@app.command("shard-cohort")
def shard_cohort(config: ConfigFile = DEFAULT) -> None:
    """Count the shards of the whole cohort and digest their content: what trainings start from."""
    from mad.stages import shard as stage

    stage.run_cohort(load_config(config))


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="An entry of `runs:`.")],
    config: ConfigFile = DEFAULT,
    nodes: Annotated[
        int, typer.Option(min=1, help="Machines on which this command is started, each with the same options.")
    ] = 1,
    rendezvous: Annotated[
        str | None, typer.Option(help="With --nodes: HOST:PORT on one of the machines, where they meet.")
    ] = None,
) -> None:
    """Train one run, in `runtime.processes` processes per machine, or as one of torchrun's; resumes from its last checkpoint."""
    from mad.stages import train as stage
    from mad.training import launch
    from mad.training.process import granted_threads

    settings = load_config(config)
    layout = launch.Layout(settings.run(run).runtime.processes, nodes, rendezvous)
    if layout.processes * layout.nodes > 1 and not launch.is_launched():
        command = ["-m", "mad", "train", run, "--config", str(config)]
        raise typer.Exit(launch.launch(layout, command, granted_threads()))
    stage.run(settings, run)


@app.command()
def adapt(
    adapter: Annotated[str, typer.Argument(help="An entry of `adapters:`.")],
    config: ConfigFile = DEFAULT,
) -> None:
    """Train one cross-scale adapter on the embeddings of a frozen encoder: minutes on a CPU, no images."""
    from mad.stages import adapt as stage

    stage.run(load_config(config), adapter)


@app.command()
def embed(
    encoder: Annotated[str, typer.Argument(help="An entry of `encoders:`.")],
    config: ConfigFile = DEFAULT,
) -> None:
    """Embed every tile of the shards, and every tile of the mapped slides, with one encoder."""
    from mad.stages import embed as stage

    stage.run(load_config(config), encoder)


@app.command()
def mix(
    mixer: Annotated[str, typer.Argument(help="An entry of `mixers:`.")],
    config: ConfigFile = DEFAULT,
) -> None:
    """Train one region mixer on embeddings (resumes from its last checkpoint); write the contextual tokens of every slide."""
    from mad.stages import mix as stage

    stage.run(load_config(config), mixer)


@app.command()
def evaluate(
    encoder: Annotated[str, typer.Argument(help="An entry of `encoders:`.")],
    config: ConfigFile = DEFAULT,
    tiles: Annotated[
        Path | None,
        typer.Option(help="A CSV of image files (path, mpp, label, patient_id) to evaluate on instead of the cohort."),
    ] = None,
    out: Annotated[Path, typer.Option(help="With --tiles: the folder to write to.")] = Path("results/tiles"),
) -> None:
    """Run the protocols of Tables 3-5 on one encoder's embeddings."""
    settings = load_config(config)
    if tiles is None:
        from mad.stages import evaluate as stage

        stage.run(settings, encoder)
        return
    from mad.stages import evaluate_tiles

    log(f"tables in {evaluate_tiles.run(settings, encoder, tiles, out)}")


@app.command()
def biomarkers(
    target: Annotated[str, typer.Argument(help="An entry of `biomarkers.targets`.")],
    aggregator: Annotated[str, typer.Argument(help="An entry of `biomarkers.aggregators`.")],
    config: ConfigFile = DEFAULT,
) -> None:
    """Predict a slide-level target by one aggregator, in patient-grouped cross-validation."""
    from mad.stages import biomarkers as stage

    stage.run(load_config(config), target, aggregator)


@app.command("biomarker-report")
def biomarker_report(config: ConfigFile = DEFAULT) -> None:
    """Compare the aggregators of `biomarkers:`: tables, figures, attention over slides."""
    from mad.stages import biomarker_report as stage

    stage.run(load_config(config))


@app.command()
def qc(config: ConfigFile = DEFAULT) -> None:
    """Write the cohort's quality control, report/qc.html: what failed and why, counts, focus, pen marks, every slide."""
    from mad.stages import qc as stage

    stage.run(load_config(config))


@app.command()
def report(config: ConfigFile = DEFAULT) -> None:
    """Draw the tables and figures from the evaluations."""
    from mad.stages import report as stage

    stage.run(load_config(config))


@app.command()
def viewer(
    slide: Annotated[str | None, typer.Argument(help="Make this slide's picture pyramid only.")] = None,
    config: ConfigFile = DEFAULT,
) -> None:
    """Make the viewer, report/viewer/: with SLIDE its zoomable picture, without the pages and layers of all."""
    from mad.stages import viewer as stage

    settings = load_config(config)
    if slide is None:
        stage.run(settings)
    else:
        stage.run_slide(settings, find_rows(settings, [slide])[0])


@app.command()
def evidence(config: ConfigFile = DEFAULT) -> None:
    """Compare the groups of `evidence:` over seeds and test patients: a table and a picture."""
    from mad.stages import evidence as stage

    stage.run(load_config(config))
