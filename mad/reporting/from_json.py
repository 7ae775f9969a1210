"""Rows and notes of a table from the JSON of `evaluate/`: every column names the place that its numbers stand at.

No number is computed here, so that each one printed is found again under its column's `source`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mad.reporting.table import Block, Cell, Column, Row

Reports = dict[str, dict[str, Any]]
"""Encoder -> protocol -> JSON; an encoder or a protocol may lack."""

BLOCK_NOTE = "Not patient-held-out: training and test tiles come from parts of the same slides (`split_by: block`)."


def rows_of(encoders: list[str], reports: Reports, blocks: Iterable[Block]) -> list[Row]:
    """A row per encoder; one without any of the protocols that the columns name is absent, with the reason."""
    columns = [column for block in blocks for column in block.columns]
    protocols = list(dict.fromkeys(column.source[0] for column in columns))
    rows = []
    for encoder in encoders:
        found = {protocol: find_report(reports, encoder, protocol) for protocol in protocols}
        cells = {
            column.key: cell_of(report, column)
            for column in columns
            if (report := found[column.source[0]][0]) is not None
        }
        reason = next((text for _, text in found.values() if text), None)
        rows.append(Row(name=encoder, cells=cells, absent=None if cells else reason))
    return rows


def cell_of(report: dict[str, Any], column: Column) -> Cell:
    """The number at a column's place, with its spread over runs and its interval where they exist."""
    number = lookup(report, column.source[1:])
    std = None
    if isinstance(number, dict):
        number, std = number["mean"], number["std"]
    interval = lookup(report, column.interval) if column.interval and number is not None else None
    return Cell(
        value=None if number is None else column.scale * number,
        std=None if std is None else column.scale * std,
        interval=(column.scale * interval[0], column.scale * interval[1]) if interval else None,
    )


def lookup(report: Any, path: Sequence[str]) -> Any:
    """What stands under some keys, None where the way there ends."""
    for key in path:
        if not isinstance(report, dict) or report.get(key) is None:
            return None
        report = report[key]
    return report


def find_report(reports: Reports, encoder: str, protocol: str) -> tuple[dict[str, Any] | None, str | None]:
    """A protocol's JSON, or why there is none."""
    report = reports.get(encoder, {}).get(protocol)
    if report is None:
        return None, f"evaluate/{encoder}/{protocol}.json does not exist"
    return (report, None) if report["status"] == "ok" else (None, _why(report))


def _why(report: dict[str, Any]) -> str:
    return str(report["reason"]) if report["status"] == "absent" else f"{report['status']}: {report['reason']}"


def first_report(reports: Reports, protocol: str) -> dict[str, Any] | None:
    """The JSON of the first encoder that has the protocol."""
    done = (parts[protocol] for parts in reports.values() if protocol in parts)
    return next((report for report in done if report["status"] == "ok"), None)


def of_part(reports: Reports, protocol: str, part: str) -> Reports:
    """The reports for a table of one `part` of a protocol: where the part has a status of its own that is not "ok", it and its
    reason stand for the protocol."""
    found = {encoder: lookup(parts.get(protocol), (part,)) or {} for encoder, parts in reports.items()}
    return {
        encoder: parts if found[encoder].get("status", "ok") == "ok" else parts | {protocol: found[encoder]}
        for encoder, parts in reports.items()
    }


def magnification(name: str) -> float:
    """ "10x" -> 10."""
    return float(name.removesuffix("x"))


def protocol_notes(reports: Reports, protocol: str) -> list[str]:
    """The protocol's own rules, its runs, classes without tiles, duplicates, and what was not held out."""
    first = first_report(reports, protocol)
    if first is None:
        return []
    notes = [BLOCK_NOTE] if first["split_by"] == "block" else []
    if "runs" in first:
        steps = first["probe"]
        notes.append(
            f"Mean ± standard deviation over {first['runs']} runs (seeds {first['seeds'][0]} … {first['seeds'][-1]})."
        )
        notes.append(
            f"The paper's probe: Adam {steps['lr']:g}, batch {steps['batch']}, {steps['steps']:,} steps (unpublished; ours)."
        )
    if sound := lookup(first, ("sound", "chosen_by")):
        notes.append(f"Strength of the sound probe: {sound}.")
    for where in ("train", "test"):
        if first.get(f"absent_in_{where}"):
            notes.append(f"Classes without {where} tiles: {', '.join(first[f'absent_in_{where}'])}.")
    if number := lookup(first, ("duplicates", "excluded_from_test")):
        notes.append(f"{number} test tiles show the same pixels as another slide or split and are left out.")
    return notes + [f"{name}: {rule}{'' if rule.endswith('?') else '.'}" for name, rule in first["rules"].items()]


def protocol_rules(reports: Reports, protocol: str, *names: str) -> list[str]:
    """Notes of the rules with these names, as the first encoder that has the protocol tells them."""
    first = first_report(reports, protocol)
    return [f"{name}: {first['rules'][name]}." for name in names if name in first["rules"]] if first else []


def interval_notes(reports: Reports, protocol: str, path: Sequence[str] = ("bootstrap",), of: str = "") -> list[str]:
    """What [...] means, or why it is not there.

    Args:
        reports: of all encoders.
        protocol: whose JSON tells it.
        path: keys of the bootstrap in it.
        of: which numbers are meant, where a table has several kinds.
    """
    found = lookup(first_report(reports, protocol), path)
    if found is None:
        return []
    kind = f" of {of}" if of else ""
    if found["intervals"] is None:
        return [f"No intervals{kind}: {found['reason']}."]
    return [f"[…]{kind}: 95 % interval over {found['resamples']:,} resamples of the {found['patients']} test patients."]
