"""Tables on the health of the making: slides, trainings, time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from mad.reporting.quality import Facts, num_stored
from mad.reporting.table import Block, Cell, Column, Row, Table


def slide_table(slides: Sequence[Facts]) -> Table:
    """What became of every slide, those that gave nothing first: scale, tiles by status, tiles in shards, and remarks.

    Args:
        slides: facts of each, as `mad.reporting.quality.slide_facts` gives them.
    """
    rows = []
    for facts in sorted(slides, key=lambda facts: (bool(num_stored(facts)), facts["slide_id"])):
        cells: dict[str, Any] = {"patient": facts["patient_id"], "split": _text(facts["split"])}
        cells |= {"mpp": facts["mpp"], "mpp source": _text(facts["mpp_source"]), "remarks": _text(facts["cause"])}
        if facts["tiles"] is not None:
            for status in ("ok", "blank", "edge"):
                cells[status] = sum(counts[status] for counts in facts["tiles"].values())
        for key, share in (("labelled", facts["labelled_share"]), ("pen", facts["pen_share"])):
            cells[key] = None if share is None else 100 * share
        cells |= {"in shards": num_stored(facts), "unreadable": facts["unreadable"]}
        rows.append(Row(name=facts["slide_id"], cells={key: Cell(value=value) for key, value in cells.items()}))
    columns = [Column(key="patient", header="Patient"), Column(key="split", header="Split")]
    columns += [Column(key="mpp", header="um/px", digits=4), Column(key="mpp source", header="Scale from")]
    columns += [Column(key=status, header=f"Tiles {status}", digits=0) for status in ("ok", "blank", "edge")]
    columns += [
        Column(key="labelled", header="Labelled (%)", digits=0),
        Column(key="pen", header="Ink on tissue (%)", digits=1),
        Column(key="in shards", header="Tiles in shards", digits=0),
        Column(key="unreadable", header="Unreadable", digits=0),
        Column(key="remarks", header="Remarks"),
    ]
    empty = [facts["slide_id"] for facts in slides if not num_stored(facts)]
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
    digits = {"pairs": 0, "fields": 0}
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
        *(Column(key=f"health {key}", header=key.replace("_", " "), digits=digits.get(key, 3)) for key in measured),
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
        [
            "Sum of the jobs' wall-clock times; jobs that ran side by side count twice.",
            "Jobs that had ended when this was written; the one that writes it is never among them.",
        ]
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
