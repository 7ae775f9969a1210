"""Comparing the aggregators of `biomarkers:` on the same patients and folds: tables, figures, attention over slides.

Reads biomarkers/{target}/{aggregator}.json and .parquet, attention/, and for the maps tile/ and the slides; writes
report/biomarkers.json, report/tables/biomarkers*.{csv,md,tex} and report/figures/{biomarkers,biomarkers_tiles,attention_*}.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from mad.config import Config
from mad.config.biomarkers import AggregatorConfig
from mad.evaluation.biomarkers import MAIN, difference
from mad.files import MadError, read_json, read_parquet, write_json
from mad.progress import log, track
from mad.reporting.attention_map import AttentionMap, attention_figure
from mad.reporting.biomarker_figures import biomarker_figure, tile_figure
from mad.reporting.biomarker_table import biomarker_table, tile_table
from mad.stages.report import write_table
from mad.stages.report_maps import read_thumbnail

TESTED = ["slide_id", "repeat", "fold", "truth"]


def run(config: Config) -> None:
    """Write the comparison, its tables and its pictures.

    Raises:
        MadError: there are no targets, or one was not evaluated by every aggregator.
    """
    settings, results = config.biomarkers, Path(config.results)
    if not settings.targets:
        raise MadError(
            "biomarkers.targets is empty: name a column of the cohort sheet, as in `{name: her2, column: her2}`"
        )
    found = {
        "baseline": settings.compared_with, "folds": settings.folds, "repeats": settings.repeats, "seed": config.seed,
        "resamples": config.evaluate.bootstrap_resamples,
        "targets": {t.name: compare(config, t.name) for t in track(settings.targets, "biomarkers: compare", unit="targets")},
    }  # fmt: skip
    write_json(results / "report" / "biomarkers.json", found)
    tables = [biomarker_table(found), tile_table(found)]
    for table in tables:
        write_table(results / "report" / "tables", table)
    figures = results / "report" / "figures"
    biomarker_figure(found, figures / "biomarkers.png")
    tile_figure(found, figures / "biomarkers_tiles.png")
    if settings.map_slides:
        for entry in settings.aggregators:
            if entry.head == "attention":
                attention_figure(*attention_maps(config, entry), path=figures / f"attention_{entry.name}.png")
    log(
        f"biomarkers: {len(settings.targets)} targets, {len(settings.aggregators)} aggregators, in {results / 'report'}"
    )


def compare(config: Config, target: str) -> dict[str, Any]:
    """One target by every aggregator: their numbers, and at each share of tiles the differences to the baseline with all tiles
    (`difference`), to themselves with all tiles (`drop`), and to what they are set against with the same share (`against`)."""
    settings, folder = config.biomarkers, Path(config.results) / "biomarkers" / target
    reports: dict[str, dict[str, Any]] = {}
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for entry in settings.aggregators:
        path = folder / f"{entry.name}.json"
        if not path.exists():
            raise MadError(f"{path}: no such file; run `mad biomarkers {target} {entry.name}` first")
        reports[entry.name] = read_json(path)
        if reports[entry.name]["status"] == "ok":
            predictions = read_parquet(folder / f"{entry.name}.parquet")
            tables[entry.name] = {f"{share:g}": part for share, part in predictions.groupby("share", sort=False)}
    _check_folds(target, {name: parts["1"] for name, parts in tables.items()})
    options = {
        "resamples": config.evaluate.bootstrap_resamples,
        "min_patients": config.evaluate.min_patients,
        "seed": config.seed,
    }
    first: dict[str, Any] = next((reports[name] for name in tables), {})
    classes, baseline = first.get("classes"), settings.compared_with
    lines: dict[str, Any] = {}
    for name, report in reports.items():
        if name not in tables:
            lines[name] = {"absent": report["reason"]}
            continue
        by_share, against = report["by_share"], settings.aggregator(name).against
        for share, part in by_share.items():
            if baseline in tables and (name, share) != (baseline, "1"):
                part["difference"] = difference(tables[name][share], tables[baseline]["1"], classes, **options)
            if share != "1":
                part["drop"] = difference(tables[name][share], tables[name]["1"], classes, **options)
            if against in tables and share in tables[against]:
                part["against"] = difference(tables[name][share], tables[against][share], classes, **options)
        lines[name] = {key: report[key] for key in ("slides", "patients", "without_tokens", "by_share")}
        lines[name] |= {"against": against, "copies": report.get("copies", [])}
    task = settings.target(target).task
    return {
        "task": task, "column": settings.target(target).column, "metric": MAIN[task], "classes": classes,
        "class_slides": first.get("class_slides"), "without_value": first.get("without_value"), "aggregators": lines,
        "rules": {key: rule for name in tables for key, rule in reports[name]["rules"].items()},
    }  # fmt: skip


def _check_folds(target: str, tables: dict[str, pd.DataFrame]) -> None:
    """Fail where two aggregators have tested a slide in different folds: their JSON is of different configurations."""
    joined: dict[tuple[str, int], tuple[str, tuple[int, float]]] = {}
    for name, table in tables.items():
        for slide, repeat, fold, truth in table[TESTED].itertuples(index=False, name=None):
            other, seen = joined.setdefault((slide, repeat), (name, (fold, truth)))
            if seen != (fold, truth):
                raise MadError(
                    f"biomarkers/{target}: {other} and {name} tested slide {slide} in different folds; run "
                    f"`mad biomarkers {target}` for both again"
                )


def attention_maps(config: Config, entry: AggregatorConfig) -> tuple[str, list[AttentionMap]]:
    """The title and one map per slide of the mapped target: the first slides of the last class (or of the highest values)."""
    results, settings = Path(config.results), config.biomarkers
    target = settings.map_target or settings.targets[0].name
    folder = results / "biomarkers" / target
    report = read_json(folder / f"{entry.name}.json")
    title = f"{entry.name}, {target}"
    if report["status"] != "ok":
        return f"{title}: absent", []
    attention = read_parquet(folder / "attention" / f"{entry.name}.parquet")
    predictions = read_parquet(folder / f"{entry.name}.parquet").query("share == 1")
    score = f"score_{0 if report['classes'] is None else len(report['classes']) - 1}"
    slides = predictions.groupby("slide_id").agg(truth=("truth", "first"), score=(score, "mean"))
    shown = slides.sort_values("truth", ascending=False, kind="stable").head(settings.map_slides)
    cohort = read_parquet(results / "cohort" / "slides.parquet").set_index("slide_id")
    maps = []
    for slide, line in shown.iterrows():
        tiles = read_parquet(results / "tile" / f"{slide}.parquet", ["tile_id", "x", "y", "side"])
        own = attention[attention["slide_id"] == slide].merge(tiles, left_on="name", right_on="tile_id")
        if entry.mixer:
            own.loc[own["kind"] == "region", "side"] *= config.mixer(entry.mixer).region_tiles
        thumbnail, extent = read_thumbnail(str(cohort.loc[slide, "path"]), config.tile.icc)
        truth = f"{line['truth']:.3g}" if report["classes"] is None else report["classes"][int(line["truth"])]
        facts = read_json(results / "tile" / f"{slide}.json")
        told = f"{slide}\n{report['target']['column']}: {truth}\npredicted: {line['score']:.2f}"
        maps.append(AttentionMap(str(slide), told, own, thumbnail, extent, facts.get("mpp")))
    return title, maps
