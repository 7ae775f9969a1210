"""Stage `report`: Tables 2-5, Figures 3 and 4, matrices of magnifications and of classes, tables on slides, trainings and time.

Reads evaluate/*/, and for what no protocol measures shard/ and tile/ (Table 2, slides), train/*/summary.json (health) and
benchmarks/ (time); opens the slides of Figure 4 for their thumbnails. Writes report/tables/*.{csv,md,tex,html},
report/figures/*.png, report/maps/ and report/provenance.{json,html}.
An encoder that was not evaluated is a row that says so.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad.config import Config
from mad.config.evaluation import NONINFERIORITY, PROTOCOLS
from mad.files import MadError, atomic_path, read_json, read_parquet, write_json
from mad.progress import log, track
from mad.reporting.from_json import Reports

if TYPE_CHECKING:
    import pandas as pd

    from mad.reporting.composition import Composition
    from mad.reporting.quality import Facts
    from mad.reporting.table import Table


def run(config: Config) -> None:
    """Write every table and figure, the maps' polygons, and the provenance of it all.

    Raises:
        MadError: there is no cohort table.
    """
    from mad.reporting.composition import table2
    from mad.reporting.confusion_figure import confusion_figures
    from mad.reporting.map_table import map_table
    from mad.reporting.noninferiority import noninferiority_table
    from mad.reporting.provenance import provenance, provenance_page
    from mad.reporting.qc import health_table, slide_table, time_table
    from mad.reporting.scale_figure import scale_figure
    from mad.reporting.scale_tables import scale_table, site_table
    from mad.reporting.tables import table3, table4, table5
    from mad.stages.report_maps import figure4_and_maps

    results = Path(config.results)
    cohort = results / "cohort" / "slides.parquet"
    if not cohort.exists():
        raise MadError(f"{cohort}: no such file; run `mad cohort` first")
    slides = read_parquet(cohort)
    names = [str(name) for name in slides["slide_id"]]
    composition, facts = _slides(results, slides)
    encoders = [entry.name for entry in config.encoders]
    reports = read_reports(results, encoders)
    classes = list(config.label.classes)
    tables = [
        table2(
            composition, classes=classes, background=config.label.background, ladder=config.tile.magnifications,
            split_by=str(slides["split_by"].iloc[0]) if "split_by" in slides and len(slides) else "patient",
        ),
        table3(encoders, reports, classes),
        table4(encoders, reports),
        table5(encoders, reports),
        scale_table(encoders, reports),
        site_table(encoders, reports),
        map_table(encoders, reports),
        slide_table(facts),
        health_table([run.name for run in config.runs], _summaries(config, names)),
        time_table(_benchmarks(results / "benchmarks")),
    ]  # fmt: skip
    if config.evaluate.reference:
        tables.append(noninferiority_table(encoders, reports))
    for table in tables:
        write_table(results / "report" / "tables", table)
    _curves(config)
    _fields(config)
    _figure3(config, reports)
    figure4_and_maps(config, slides, {entry["slide_id"]: entry["mpp"] for entry in facts}, reports)
    scale_figure(reports, results / "report" / "figures" / "scale_matrix.png")
    confusion_figures(reports, results / "report" / "figures")
    found = provenance(config)
    write_json(results / "report" / "provenance.json", found)
    with atomic_path(results / "report" / "provenance.html") as temporary:
        temporary.write_text(provenance_page(found), encoding="utf-8")
    log(f"report: {len(tables)} tables and 5 figures in {results / 'report'}")


def read_reports(results: Path, encoders: list[str]) -> Reports:
    """The JSON of every encoder and protocol that there is."""
    return {
        encoder: {
            protocol: read_json(path)
            for protocol in (*PROTOCOLS, NONINFERIORITY)
            if (path := results / "evaluate" / encoder / f"{protocol}.json").exists()
        }
        for encoder in encoders
    }


def write_table(folder: Path, table: Table) -> None:
    """A table as CSV (unrounded), Markdown, LaTeX and a page that sorts."""
    from mad.reporting.table_page import table_page

    with atomic_path(folder / f"{table.name}.csv") as temporary:
        table.frame().to_csv(temporary, index=False)
    for suffix, text in (("md", table.markdown()), ("tex", table.latex()), ("html", table_page(table))):
        with atomic_path(folder / f"{table.name}.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")


def _slides(results: Path, slides: pd.DataFrame) -> tuple[Composition, list[Facts]]:
    """What Table 2 counts, and the facts of every slide but its focus; one slide's tables are held at a time."""
    from mad.reporting.composition import Composition
    from mad.reporting.quality import SHARD_COLUMNS, slide_facts
    from mad.stages.qc import read_slide

    found, facts = Composition(), []
    rows = [{str(key): value for key, value in row.items()} for row in slides.to_dict("records")]
    for row in track(rows, "report", unit="slides"):
        told, tiles, shard = read_slide(results, str(row["slide_id"]), [*SHARD_COLUMNS, "kind", "role", "sample_id"])
        if tiles is not None and shard is not None:
            found.add(shard.merge(tiles[["tile_id", "label"]], on="tile_id", how="left"))
        facts.append(slide_facts(row, told, tiles, shard) | {"focus": {}})
    return found, facts


def _summaries(config: Config, slides: list[str]) -> dict[str, dict[str, Any]]:
    """run -> its summary, with `stale`: whether the shards now hold other training tiles than it was trained on."""
    from mad.training.index import load_index

    results = Path(config.results)
    paths = {entry.name: results / "train" / entry.name / "summary.json" for entry in config.runs}
    found = {name: read_json(path) for name, path in paths.items() if path.exists()}
    if not found:
        return {}
    # The digest is of all tiles, however many children a pair needs.
    present = load_index(results / "shard", "train", 1, slides).digest
    return {name: {**summary, "stale": present != summary.get("data_digest")} for name, summary in found.items()}


def _benchmarks(folder: Path) -> pd.DataFrame:
    """Every line of Snakemake's benchmark files, but of this stage's own, which can only be an earlier run's; the stage is the
    folder right under `benchmarks/` (or the file there)."""
    import pandas as pd

    parts = []
    for path in sorted({*folder.rglob("*.tsv")} - {folder / "report" / "report.tsv"}):
        stage = path.relative_to(folder).parts[0].removesuffix(".tsv")
        table = pd.read_csv(path, sep="\t", na_values=["-"])
        if "s" in table:
            wanted = [column for column in ("s", "cpu_time", "max_rss") if column in table]
            parts.append(table[wanted].apply(pd.to_numeric, errors="coerce").assign(stage=stage))
    if not parts:
        return pd.DataFrame(columns=["stage", "s"])
    jobs = pd.concat(parts, ignore_index=True)
    stages = (
        "cohort", "tile", "sample", "shard", "train", "embed", "mix", "evaluate", "biomarkers", "report", "viewer",
    )  # fmt: skip
    order = {stage: number for number, stage in enumerate(stages)}
    return jobs.sort_values("stage", key=lambda stages: stages.map(lambda stage: order.get(stage, -1)), kind="stable")


def _curves(config: Config) -> None:
    """The curves of every training, beside the other figures."""
    results = Path(config.results)
    for name in (run.name for run in config.runs):
        if (curves := results / "train" / name / "curves.png").exists():
            with atomic_path(results / "report" / "figures" / f"curves_{name}.png") as temporary:
                shutil.copyfile(curves, temporary)


def _fields(config: Config) -> None:
    """Fields as a distillation aligns them, where a run distils: pairs of the kind that the first such run weighs most."""
    import pandas as pd

    from mad.reporting.fields import choose_fields, draw_fields, lowest_parents
    from mad.tiles.store import TileStore

    if (weights := next((entry.mix for entry in config.runs if entry.distill), None)) is None:
        return
    store, folder = TileStore(config.results), Path(config.results) / "shard"
    columns = ["tile_id", "kind", "role", "status"]
    parts = (read_parquet(folder / f"{slide}.parquet", columns) for slide in store.slides)
    parents = pd.concat([lowest_parents(part) for part in parts], ignore_index=True)
    kind = max(parents["kind"].unique().tolist(), key=lambda name: weights.get(name, 0.0), default="")
    fields = [(name, *store.pair(name)) for name in choose_fields(parents, kind)]
    draw_fields(fields, kind, Path(config.results) / "report" / "figures" / "fields.png")


def _figure3(config: Config, reports: Reports) -> None:
    from mad.reporting.figures import figure3

    panels = []
    for encoder, parts in reports.items():
        path = Path(config.results) / "evaluate" / encoder / "pca.parquet"
        if parts.get("consistency", {}).get("status") == "ok" and path.exists():
            panels.append((encoder, read_parquet(path), parts["consistency"]["pca"]["explained"]))
    target = Path(config.results) / "report" / "figures" / "figure3_pca.png"
    figure3(panels, classes=config.label.classes, transition=config.evaluate.transition, path=target)
