"""Students at a coarse magnification against one reference at a fine one, from `evaluate/{encoder}/noninferiority.json`."""

from __future__ import annotations

from typing import Any

from mad.reporting.from_json import Reports, common_notes, done, find_report, told
from mad.reporting.table import Block, Cell, Column, Row, Table


def noninferiority_table(encoders: list[str], reports: Reports) -> Table:
    """One row per encoder: both accuracies, the differences with their intervals, and the verdict."""
    rows, found = [], done(reports, "noninferiority")
    for encoder in encoders:
        report, reason = find_report(reports, encoder, "noninferiority")
        cells: dict[str, Cell] = {}
        if report:
            intervals = report["bootstrap"]["intervals"] or {}
            for key in ("student", "reference", "difference", "less_against"):
                if key not in report:
                    continue
                value = report[key]["accuracy"] if key in ("student", "reference") else report[key]
                low_high = intervals.get(key)
                cells[key] = Cell(
                    value=100 * value, interval=(100 * low_high[0], 100 * low_high[1]) if low_high else None
                )
            cells["verdict"] = Cell(value=report["verdict"])
        rows.append(Row(name=encoder, cells=cells, absent=None if cells else reason))
    coarse, fine, margin, notes = "coarse", "fine", "margin", []
    if first := next(iter(found.values()), None):
        (coarse, fine), margin = first["transition"].split("-"), f"{100 * first['margin']:g} points"
        notes = common_notes(reports, "noninferiority") + told(
            {encoder: _facts(each) for encoder, each in found.items()}
        )
        rules = {name: rule for report in found.values() for name, rule in report["rules"].items()}
        notes += [f"{name}: {rule}." for name, rule in rules.items()]
    columns = [
        Column(key="student", header=f"Accuracy at {coarse} (%)", digits=1, best="max"),
        Column(key="reference", header=f"Reference at {fine} (%)", digits=1),
        Column(key="difference", header="Difference (points)", digits=1, best="max"),
        Column(key="verdict", header=f"Non-inferior, margin {margin}"),
    ]
    if others := [report["against_encoder"] for report in found.values() if "less_against" in report]:
        columns.insert(3, Column(key="less_against", header=f"less {others[0]} at {coarse} (points)", digits=1))
    return Table(
        name="noninferiority", title=f"Non-inferiority: an encoder at {coarse} against the reference at {fine}",
        blocks=[Block(title="Class of the field", columns=columns)], rows=rows, notes=notes,
    )  # fmt: skip


def _facts(report: dict[str, Any]) -> list[str]:
    fields = sum(report["counts"]["test"].values())
    notes = [
        f"Reference: {report['reference_encoder']}. {fields} test fields of {report['patients']['test']} patients."
    ]
    boot = report["bootstrap"]
    return notes + ([f"No intervals: {boot['reason']}."] if boot["intervals"] is None else [])
