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


def done(reports: Reports, protocol: str) -> dict[str, dict[str, Any]]:
    """Encoder -> JSON, of the encoders that have the protocol."""
    found = {encoder: parts[protocol] for encoder, parts in reports.items() if protocol in parts}
    return {encoder: report for encoder, report in found.items() if report["status"] == "ok"}


def first_report(reports: Reports, protocol: str) -> dict[str, Any] | None:
    """The JSON of the first encoder that has the protocol."""
    return next(iter(done(reports, protocol).values()), None)


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


def told(notes: dict[str, list[str]]) -> list[str]:
    """Every note of the encoders once; where not all of them tell it, with whose it is."""
    found: dict[str, list[str]] = {}
    for encoder, lines in notes.items():
        for line in dict.fromkeys(lines):
            found.setdefault(line, []).append(encoder)
    parts = []
    for line, encoders in found.items():
        others = [encoder for encoder in notes if encoder not in encoders]
        whose = ", ".join(encoders) if len(encoders) <= len(others) else f"all but {', '.join(others)}"
        parts.append(f"{whose}: {line}" if others else line)
    return parts


def common_notes(reports: Reports, *protocols: str) -> list[str]:
    """What was not held out, encoders that saw other tiles than others, and tiles without embedding."""
    notes: dict[str, list[str]] = {}
    warnings = []
    for protocol in protocols:
        digests: dict[str, list[str]] = {}
        for encoder, parts in reports.items():
            report = parts.get(protocol, {})
            if "split_by" not in report:  # of an absent encoder
                continue
            lines = notes.setdefault(encoder, [])
            if report["split_by"] == "block":
                lines.append(BLOCK_NOTE)
            if number := lookup(report, ("dropped", "without embedding")):
                lines.append(f"{number:,} tiles without embedding are left out.")
            if digest := lookup(report, ("sources", "data_digest")):  # of tiles of a table there is none
                digests.setdefault(digest, []).append(encoder)
        if len(digests) > 1:
            apart = "; ".join(", ".join(names) for names in digests.values())
            warnings.append(f"NOT evaluated on the same tiles, run `mad evaluate` for all of them again: {apart}.")
    return told(notes) + list(dict.fromkeys(warnings))


def lacking_notes(reports: Reports, *protocols: str) -> list[str]:
    """Why encoders that have some of the protocols lack others."""
    notes = {}
    for encoder, parts in reports.items():
        reasons = {
            protocol: find_report(reports, encoder, protocol)[1]
            if protocol in parts
            else f"{protocol}.json does not exist"
            for protocol in protocols
        }
        if not all(reasons.values()):
            notes[encoder] = [f"No {protocol}: {reason}." for protocol, reason in reasons.items() if reason]
    return told(notes)


def protocol_notes(reports: Reports, protocol: str) -> list[str]:
    """What was not held out, the protocol's runs, classes without tiles, duplicates, and its own rules."""
    found = done(reports, protocol)
    notes = common_notes(reports, protocol) + told({encoder: _facts(report) for encoder, report in found.items()})
    return notes + told({encoder: _rules(report, report["rules"]) for encoder, report in found.items()})


def _facts(report: dict[str, Any]) -> list[str]:
    notes = []
    if "runs" in report:
        steps, seeds = report["probe"], report["seeds"]
        notes.append(f"Mean ± standard deviation over {report['runs']} runs (seeds {seeds[0]} … {seeds[-1]}).")
        notes.append(
            f"The paper's probe: Adam {steps['lr']:g}, batch {steps['batch']}, {steps['steps']:,} steps (unpublished; ours)."
        )
    if chosen := lookup(report, ("sound", "chosen_by")):
        how, *stopped = chosen.split("; ")
        notes.append(f"Strength of the sound probe: {how}.")
        notes += [f"Sound probes {text}." for text in stopped]
    for where in ("train", "test"):
        if report.get(f"absent_in_{where}"):
            notes.append(f"Classes without {where} tiles: {', '.join(report[f'absent_in_{where}'])}.")
    if number := lookup(report, ("duplicates", "excluded_from_test")):
        notes.append(f"{number} test tiles show the same pixels as another slide or split and are left out.")
    return notes


def _rules(report: dict[str, Any], names: Iterable[str]) -> list[str]:
    rules = {name: report["rules"][name] for name in names if name in report["rules"]}
    return [f"{name}: {rule}{'' if rule.endswith('?') else '.'}" for name, rule in rules.items()]


def protocol_rules(reports: Reports, protocol: str, *names: str) -> list[str]:
    """Notes of the rules with these names."""
    return told({encoder: _rules(report, names) for encoder, report in done(reports, protocol).items()})


def interval_notes(reports: Reports, protocol: str, path: Sequence[str] = ("bootstrap",), of: str = "") -> list[str]:
    """What [...] means, or why it is not there.

    Args:
        reports: of all encoders.
        protocol: whose JSON tells it.
        path: keys of the bootstrap in it.
        of: which numbers are meant, where a table has several kinds.
    """
    kind = f" of {of}" if of else ""
    notes = {}
    for encoder, report in done(reports, protocol).items():
        if (found := lookup(report, path)) is not None:
            meaning = f"95 % interval over {found['resamples']:,} resamples of the {found['patients']} test patients."
            lacking = f"No intervals{kind}: {found['reason']}."
            notes[encoder] = [lacking if found["intervals"] is None else f"[…]{kind}: {meaning}"]
    return told(notes)
