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
from mad.progress import log
from mad.reporting.from_json import Reports

if TYPE_CHECKING:
    import pandas as pd

    from mad.reporting.table import Table
    from mad.slides.readers import IccChoice

THUMBNAIL_PX = 1400


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
    from mad.reporting.quality import SHARD_COLUMNS, TILE_COLUMNS, slide_facts
    from mad.reporting.scale_figure import scale_figure
    from mad.reporting.scale_tables import scale_table, site_table
    from mad.reporting.tables import table3, table4, table5

    results = Path(config.results)
    cohort = results / "cohort" / "slides.parquet"
    if not cohort.exists():
        raise MadError(f"{cohort}: no such file; run `mad cohort` first")
    slides = read_parquet(cohort)
    names = [str(name) for name in slides["slide_id"]]
    tiles = _per_slide(results / "tile", names, TILE_COLUMNS)
    shards = _per_slide(results / "shard", names, [*SHARD_COLUMNS, "kind", "role", "sample_id"])
    facts = _facts(results / "tile", names)
    encoders = [entry.name for entry in config.encoders]
    reports = read_reports(results, encoders)
    classes = list(config.label.classes)
    tables = [
        table2(
            _labelled(shards, tiles), classes=classes, background=config.label.background, ladder=config.tile.magnifications,
            split_by=str(slides["split_by"].iloc[0]) if "split_by" in slides and len(slides) else "patient",
        ),
        table3(encoders, reports, classes),
        table4(encoders, reports),
        table5(encoders, reports),
        scale_table(encoders, reports),
        site_table(encoders, reports),
        map_table(encoders, reports),
        slide_table([
            slide_facts(row, facts.get(name), tiles.get(name), shards.get(name))
            for name, row in zip(names, slides.to_dict("records"), strict=True)
        ]),
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
    _figure4(config, slides, facts, reports)
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


def _per_slide(folder: Path, slides: list[str], columns: list[str]) -> dict[str, pd.DataFrame]:
    paths = {slide: folder / f"{slide}.parquet" for slide in slides}
    return {slide: read_parquet(path, columns) for slide, path in paths.items() if path.exists()}


def _facts(folder: Path, slides: list[str]) -> dict[str, dict[str, Any]]:
    """slide -> what its tile job told of it, for the slides that were tiled."""
    paths = {slide: folder / f"{slide}.json" for slide in slides}
    return {slide: read_json(path) for slide, path in paths.items() if path.exists()}


def _labelled(shards: dict[str, pd.DataFrame], tiles: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Rows of all shard tables with each tile's label."""
    import pandas as pd

    parts = [
        shard.merge(tiles[slide][["tile_id", "label"]], on="tile_id", how="left") for slide, shard in shards.items()
    ]
    columns = ["tile_id", "kind", "role", "sample_id", "split", "status", "label"]
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _summaries(config: Config, slides: list[str]) -> dict[str, dict[str, Any]]:
    """run -> its summary, with `stale`: whether the shards now hold other training tiles than it was trained on."""
    from mad.training.index import load_index

    found = {}
    for entry in config.runs:
        path = Path(config.results) / "train" / entry.name / "summary.json"
        if path.exists():
            summary = read_json(path)
            present = load_index(Path(config.results) / "shard", "train", entry.children, slides).digest
            found[entry.name] = {**summary, "stale": present != summary.get("data_digest")}
    return found


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
    from mad.reporting.fields import choose_fields, draw_fields
    from mad.tiles.store import TileStore

    if (weights := next((entry.mix for entry in config.runs if entry.distill), None)) is None:
        return
    store = TileStore(config.results)
    kinds = store.table.loc[store.table["role"] == "parent", "kind"].unique().tolist()
    kind = max(kinds, key=lambda name: weights.get(name, 0.0), default="")
    fields = [(name, *store.pair(name)) for name in choose_fields(store, kind)]
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


def _figure4(config: Config, slides: pd.DataFrame, facts: dict[str, dict[str, Any]], reports: Reports) -> None:
    """One row per slide and magnification: thumbnail, truth, maps."""
    from mad.reporting.map_figure import figure4
    from mad.reporting.overlay import class_colours

    folder = Path(config.results) / "evaluate"
    painted = {
        encoder: read_parquet(folder / encoder / "segmentation.parquet")
        for encoder, parts in reports.items()
        if parts.get("segmentation", {}).get("status") == "ok" and (folder / encoder / "segmentation.parquet").exists()
    }
    colours = class_colours(config.label)
    path_of = dict(zip(slides["slide_id"], slides["path"], strict=True))
    if gone := sorted({slide for table in painted.values() for slide in table["slide_id"]} - set(path_of)):
        log(
            f"report: maps of {', '.join(gone)} are left out: the cohort has no such slide; `mad evaluate ENCODER` maps others"
        )
        painted = {encoder: table[table["slide_id"].isin(list(path_of))] for encoder, table in painted.items()}
    _write_maps(Path(config.results) / "report" / "maps", painted, colours, path_of)
    shown = list(dict.fromkeys(slide for table in painted.values() for slide in table["slide_id"]))
    rows = []
    for slide in shown:
        thumbnail, extent = read_thumbnail(str(path_of[slide]), config.tile.icc)
        for magnification in config.evaluate.segmentation_magnifications:
            maps = {}
            for encoder, table in painted.items():
                mine = table[(table["slide_id"] == slide) & (table["magnification"] == magnification)]
                if len(mine):
                    maps[encoder] = mine
            if not maps:
                continue
            truth = next(iter(maps.values()))
            scores = {
                encoder: line["mean_iou"]
                for encoder in maps
                for line in reports[encoder]["segmentation"]["maps"]
                if line["slide_id"] == slide and line["magnification"] == magnification
            }
            rows.append({
                "slide_id": slide, "magnification": magnification, "mpp": facts.get(slide, {}).get("mpp"),
                "thumbnail": thumbnail, "extent": extent, "truth": truth, "maps": maps, "scores": scores,
            })  # fmt: skip
    target = Path(config.results) / "report" / "figures" / "figure4_segmentation.png"
    figure4(rows, list(reports), colours=colours, path=target)


def _write_maps(
    folder: Path, painted: dict[str, pd.DataFrame], colours: dict[str, str], path_of: dict[str, str]
) -> None:
    """The predictions as `{encoder}/{slide}_{magnification}x.geojson` for QuPath, in place of those of earlier runs."""
    from mad.reporting.map_polygons import write_map

    origin = {slide: _qupath_origin(path_of[slide]) for table in painted.values() for slide in set(table["slide_id"])}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for encoder, table in painted.items():
        for (slide, magnification), tiles in table.groupby(["slide_id", "magnification"]):
            write_map(folder / encoder / f"{slide}_{magnification:g}x.geojson", tiles, colours, origin[slide])


def _qupath_origin(path: str) -> tuple[int, int]:
    """Where QuPath's coordinates of a slide begin: at the corner of its bounds, where they are smaller than the slide."""
    from mad.slides.readers import open_slide

    try:
        with open_slide(path) as slide:
            x, y, *size = slide.bounds
            return (0, 0) if tuple(size) == tuple(slide.level_dimensions[0]) else (x, y)
    except (MadError, OSError) as error:
        log(f"report: {path}: the maps count from its corner, its bounds cannot be read: {error}")
        return 0, 0


def read_thumbnail(path: str, icc: IccChoice) -> tuple[Any, list[float] | None]:
    """A slide shrunk to at most THUMBNAIL_PX, and its extent [left, right, bottom, top] in level-0 px; None if unreadable."""
    from mad.slides.readers import open_slide

    try:
        with open_slide(path, icc) as slide:
            left, top, width, height = slide.bounds
            downsample = max(width, height) / THUMBNAIL_PX
            if downsample < 1:
                downsample = 1.0
            rows, columns = max(1, round(height / downsample)), max(1, round(width / downsample))
            image, _ = slide.salvaged_overview(downsample, rows, columns, left=left, top=top)
        return image, [left, left + width, top + height, top]
    except (MadError, OSError) as error:
        log(f"report: no thumbnail: {error}")
        return None, None
