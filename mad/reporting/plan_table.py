"""A plan (`mad.reporting.plan`) as tables for a console: what will fail, slides, totals, trainings, and how each was told."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table
from rich.text import Text

SLIDES = 20


def render(plan: dict[str, Any]) -> list[Table | Text]:
    """Parts to print one after the other."""
    failing = [slide for slide in plan["slides"] if slide["error"]]
    parts: list[Table | Text] = [
        Text(f"{slide['slide_id']} will FAIL: {slide['error']}", style="red") for slide in failing
    ]
    warned = [(slide["slide_id"], warning) for slide in plan["slides"] for warning in slide["warnings"]]
    parts += [Text(f"{name}: {warning}", style="yellow") for name, warning in warned[:SLIDES]]
    if len(warned) > SLIDES:
        parts.append(Text(f"… {len(warned) - SLIDES} more warnings: --json has all", style="yellow"))
    return [*parts, _slides(plan), _totals(plan), *([_runs(plan)] if plan["runs"] else []), _how(plan)]


def _slides(plan: dict[str, Any]) -> Table:
    levels, totals = list(plan["totals"]["magnifications"]), plan["totals"]
    table = _headed("Slide", "Split", *(f"{level} tiles (tissue)" for level in levels), "Cut tiles", "Disk")
    good = [slide for slide in plan["slides"] if not slide["error"]]
    for slide in good[:SLIDES]:
        counts = [_count(slide["magnifications"].get(level)) for level in levels]
        table.add_row(slide["slide_id"], slide["split"] or "blocks", *counts, str(slide["cut"]), _size(slide["bytes"]))
    if len(good) > SLIDES:
        table.add_row(f"… {len(good) - SLIDES} more", *[""] * (len(levels) + 3))
    counts = [_count(totals["magnifications"][level]) for level in levels]
    table.add_section()
    table.add_row(f"{len(good)} slides", "", *counts, str(totals["cut"]), _size(totals["bytes"]), style="bold")
    return table


def _totals(plan: dict[str, Any]) -> Table:
    totals = plan["totals"]
    table = Table.grid(padding=(0, 2))
    samples = ", ".join(f"{count} of {kind}" for kind, count in totals["samples"].items())
    table.add_row(Text("samples", style="dim"), Text(f"at most {samples}" if samples else "none"))
    table.add_row(Text("disk", style="dim"), Text(f"{_size(totals['bytes'])} of shards"))
    for stage in ("tile", "shard"):
        table.add_row(Text(f"stage {stage}", style="dim"), Text(_hours(totals[f"{stage}_hours"])))
    return table


def _runs(plan: dict[str, Any]) -> Table:
    table = _headed("Training", "Steps", "Time", "Told by")
    for run in plan["runs"]:
        table.add_row(run["name"], str(run["steps"]), _hours(run["hours"]), run["how"])
    return table


def _how(plan: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, text in plan["how"].items():
        if text:
            table.add_row(Text(name, style="dim"), Text(text, style="dim"))
    return table


def _headed(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, no_wrap=name not in ("Told by",))
    return table


def _count(level: dict[str, Any] | None) -> str:
    if level is None:
        return "-"
    return f"{level['tiles']} ({'?' if level['tissue'] is None else '~' + str(level['tissue'])})"


def _size(value: float | None) -> str:
    if value is None:
        return "unknown"
    power = min(max(math.floor(math.log10(max(value, 1)) / 3), 1), 4)
    return f"~{value / 1000**power:.3g} {('', 'kB', 'MB', 'GB', 'TB')[power]}"


def _hours(value: float | None) -> str:
    if value is None:
        return "unknown"
    scale, unit = (1, "h") if value >= 1 else (60, "min") if value >= 1 / 60 else (3600, "s")
    amount = scale * value
    return f"~{amount:,.0f} {unit}" if amount >= 10 else f"~{amount:.2g} {unit}"
