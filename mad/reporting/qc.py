"""Tables on the health of the making: slides, trainings, time."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mad.reporting.table import Block, Cell, Column, Row, Table


def slide_table(
    slides: pd.DataFrame,
    tiles: dict[str, pd.DataFrame],
    shards: dict[str, pd.DataFrame],
    facts: dict[str, dict[str, Any]],
) -> Table:
    """What became of every slide, those that gave nothing first: scale, tiles by status, tiles in shards, and remarks.

    Args:
        slides: the cohort table.
        tiles: slide -> tile table (label, status).
        shards: slide -> shard table.
        facts: slide -> content of tile/{slide}.json (mpp, mpp_source, cause), of which any field may lack.
    """
    rows = []
    for slide in slides.to_dict("records"):
        name = str(slide["slide_id"])
        tile, shard = tiles.get(name), shards.get(name)
        cells = {"patient": Cell(value=str(slide["patient_id"])), "split": Cell(value=_text(slide.get("split")))}
        fact = facts.get(name, {})
        cells |= {"mpp": Cell(value=fact.get("mpp")), "source": Cell(value=_text(fact.get("mpp_source")))}
        if tile is not None:
            counts = tile["status"].value_counts()
            cells |= {status: Cell(value=int(counts.get(status, 0))) for status in ("ok", "blank", "edge")}
            cells["labelled"] = Cell(value=100 * float(tile["label"].notna().mean()) if len(tile) else None)
        if shard is not None:
            cells["in shards"] = Cell(value=int(shard.loc[shard["status"] == "ok", "tile_id"].nunique()))
            cells["unreadable"] = Cell(value=int((shard["status"] != "ok").sum()))
        cause = fact.get("cause")
        if cause is None and shard is not None and shard.empty:
            cause = "no tile was selected: too little tissue for a tile, or too narrow for split_by: block"
        cells["remarks"] = Cell(value=_text(cause))
        rows.append(Row(name=name, cells=cells))
    rows.sort(key=lambda row: (bool(row.cells.get("in shards", Cell(value=0)).value), row.name))
    columns = [Column(key="patient", header="Patient"), Column(key="split", header="Split")]
    columns += [Column(key="mpp", header="um/px", digits=4), Column(key="source", header="Scale from")]
    columns += [Column(key=status, header=f"Tiles {status}", digits=0) for status in ("ok", "blank", "edge")]
    columns += [
        Column(key="labelled", header="Labelled (%)", digits=0),
        Column(key="in shards", header="Tiles in shards", digits=0),
        Column(key="unreadable", header="Unreadable", digits=0),
        Column(key="remarks", header="Remarks"),
    ]
    empty = [row.name for row in rows if not row.cells.get("in shards", Cell(value=0)).value]
    notes = [f"{len(empty)} slide(s) gave no tile: {', '.join(empty)}."] if empty else []
    return Table(
        name="slides",
        title="Slides",
        blocks=[Block(title="Slides", columns=columns)],
        rows=rows,
        row_header="Slide",
        notes=notes,
    )


def health_table(names: list[str], summaries: dict[str, dict[str, Any]]) -> Table:
    """Collapse and health of every run from its summary; a run without one is absent.

    Args:
        names: runs in the order of the configuration.
        summaries: run -> content of train/{run}/summary.json, of which any field may lack, and `stale`.
    """
    measured = list(dict.fromkeys(key for name in names for key in (summaries.get(name, {}).get("health") or {})))
    rows, notes = [], []
    for name in names:
        summary = summaries.get(name)
        if summary is None:
            rows.append(Row(name=name, absent=f"train/{name}/summary.json does not exist"))
            continue
        health = summary.get("health") or {}
        loss, ceiling = summary.get("final_loss", summary.get("loss")), summary.get("ln_k")
        collapsed = summary.get("collapsed")
        cells = {
            "method": Cell(value=summary.get("method")),
            "collapsed": Cell(value=None if collapsed is None else ("yes" if collapsed else "no")),
            "loss": Cell(value=loss),
            "ln_k": Cell(value=ceiling),
            "share": Cell(value=loss / ceiling if loss is not None and ceiling else None),
            **{f"health {key}": Cell(value=_number(health.get(key))) for key in measured},
        }
        rows.append(Row(name=name, cells=cells))
        notes += [f"{name}: {warning}" for warning in summary.get("warnings") or []]
        if summary.get("stale"):
            notes.append(
                f"{name} is stale: it was trained on other tiles than the shards hold now; to train it on these: "
                "`snakemake --cores all -R train_run -- train`"
            )
    columns = [
        Column(key="method", header="Method"),
        Column(key="collapsed", header="Collapsed"),
        Column(key="loss", header="Loss", digits=3),
        Column(key="ln_k", header="ln K", digits=3),
        Column(key="share", header="Loss / ln K (1: uniform collapse)", digits=3),
        *(Column(key=f"health {key}", header=key, digits=3) for key in measured),
    ]
    return Table(
        name="training",
        title="Health of the trainings",
        blocks=[Block(title="Runs", columns=columns)],
        rows=rows,
        row_header="Run",
        notes=notes,
    )


def time_table(jobs: pd.DataFrame) -> Table:
    """Time and memory per stage from Snakemake's benchmark files.

    Args:
        jobs: one line per job: stage, s (wall clock), cpu_time (s), max_rss (MB); the last two may lack.
    """
    rows = []
    for stage, mine in jobs.groupby("stage", sort=False) if len(jobs) else ():
        rows.append(Row(name=str(stage), cells=_budget(mine)))
    if len(jobs):
        rows.append(Row(name="Sum", cells=_budget(jobs)))
    columns = [
        Column(key="jobs", header="Jobs", digits=0),
        Column(key="total", header="Sum (s)", digits=1),
        Column(key="longest", header="Longest job (s)", digits=1),
        Column(key="cpu", header="CPU time (s)", digits=1),
        Column(key="memory", header="Peak memory of a job (MB)", digits=0),
    ]
    notes = (
        ["Sum of the jobs' wall-clock times; jobs that ran side by side count twice."]
        if rows
        else ["No benchmark files."]
    )
    return Table(
        name="time",
        title="Time budget",
        blocks=[Block(title="Stages", columns=columns)],
        rows=rows,
        row_header="Stage",
        notes=notes,
    )


def _budget(jobs: pd.DataFrame) -> dict[str, Cell]:
    cpu = jobs["cpu_time"].sum(min_count=1) if "cpu_time" in jobs else None
    memory = jobs["max_rss"].max() if "max_rss" in jobs else None
    return {
        "jobs": Cell(value=len(jobs)),
        "total": Cell(value=float(jobs["s"].sum())),
        "longest": Cell(value=float(jobs["s"].max())),
        "cpu": Cell(value=_number(cpu)),
        "memory": Cell(value=_number(memory)),
    }


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _text(value: Any) -> str:
    return "–" if value is None or pd.isna(value) else str(value)
