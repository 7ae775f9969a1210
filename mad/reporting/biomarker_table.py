"""The tables of the slide-level evaluation from `report/biomarkers.json`. No number is computed here."""

from __future__ import annotations

from typing import Any

from mad.reporting.table import Block, Cell, Column, Row, Table

SHOWN = 5
"""Most pairs of slides that a note names."""
NAMES = {"auroc": "AUROC", "auroc_pooled": "AUROC pooled", "r2": "R²", "spearman": "Spearman"}


def biomarker_table(found: dict[str, Any]) -> Table:
    """A row per aggregator, a block per target.

    Args:
        found: `biomarkers.json`.
    """
    baseline, blocks = found["baseline"], []
    cells: dict[str, dict[str, Cell]] = {}
    for target, part in found["targets"].items():
        metrics = _metrics(part)
        columns = [
            Column(key=f"{target} slides", header="Slides", digits=0),
            Column(key=f"{target} patients", header="Patients", digits=0),
            Column(key=f"{target} tokens", header="Tokens per slide", digits=0),
            Column(key=f"{target} tiles", header="Tiles encoded", digits=0),
        ]
        for place, metric in enumerate(metrics):
            columns.append(Column(key=f"{target} {metric}", header=f"{NAMES[metric]} ↑", digits=3, best="max"))
            if place == 0:
                columns.append(Column(key=f"{target} folds", header=f"{NAMES[metric]}, folds", digits=3))
            if baseline is not None:
                columns.append(
                    Column(key=f"{target} {metric} gap", header=f"{NAMES[metric]} less {baseline}", digits=3)
                )
        if _sets_against(part):
            columns.append(Column(key=f"{target} against", header="Against"))
            columns += [
                Column(key=f"{target} {metric} against", header=f"{NAMES[metric]} less that row", digits=3)
                for metric in metrics
            ]
        blocks.append(Block(title=_title(target, part), columns=columns))
        for name, line in part["aggregators"].items():
            row = cells.setdefault(name, {})
            if "absent" in line:
                continue
            whole = line["by_share"]["1"]
            row |= {f"{target} slides": Cell(value=line["slides"]), f"{target} patients": Cell(value=line["patients"])}
            row |= {f"{target} {name}": Cell(value=whole[name]) for name in ("tokens", "tiles")}
            folds = whole["metrics"][metrics[0]]["folds"]
            row[f"{target} folds"] = Cell(value=folds["mean"], std=folds["std"])
            for metric in metrics:
                row[f"{target} {metric}"] = _cell(whole["metrics"][metric])
                for key, gap in (("gap", whole.get("difference")), ("against", whole.get("against"))):
                    if gap:
                        row[f"{target} {metric} {key}"] = _cell(gap["metrics"][metric])
            if "against" in whole:
                row[f"{target} against"] = Cell(value=line["against"])
    absent = {
        name: line["absent"]
        for part in found["targets"].values()
        for name, line in part["aggregators"].items()
        if "absent" in line
    }
    rows = [Row(name=name, cells=row, absent=absent.get(name)) for name, row in cells.items()]
    return Table(
        name="biomarkers", title="Slide-level targets", blocks=blocks, rows=rows, row_header="Aggregator", notes=_notes(found)
    )  # fmt: skip


def tile_table(found: dict[str, Any]) -> Table:
    """A row per aggregator and share of tiles, a block per target."""
    baseline, blocks = found["baseline"], []
    cells: dict[str, dict[str, Cell]] = {}
    for target, part in found["targets"].items():
        metric = part["metric"]
        headers = [
            Column(key=f"{target} tiles", header="Tiles encoded", digits=0),
            Column(key=f"{target} {metric}", header=f"{NAMES[metric]} ↑", digits=3),
            Column(key=f"{target} drop", header="less itself, all tiles", digits=3),
        ]
        if baseline is not None:
            headers.append(Column(key=f"{target} gap", header=f"less {baseline}, all tiles", digits=3))
        if _sets_against(part):
            headers.append(Column(key=f"{target} against", header="less the row it is against, same share", digits=3))
        blocks.append(Block(title=_title(target, part), columns=headers))
        for name, line in part["aggregators"].items():
            by_share = line.get("by_share", {})
            for share in sorted(by_share, key=float, reverse=True):
                numbers = by_share[share]
                row = cells.setdefault(f"{name}, {100 * float(share):g} %", {})
                row[f"{target} tiles"] = Cell(value=numbers["tiles"])
                row[f"{target} {metric}"] = _cell(numbers["metrics"][metric])
                for key, name_in_json in (("drop", "drop"), ("gap", "difference"), ("against", "against")):
                    if gap := numbers.get(name_in_json):
                        row[f"{target} {key}"] = _cell(gap["metrics"][metric])
    rules = _rules(found)
    notes = [f"{name}: {rules[name]}." for name in ("shares", "interval") if name in rules]
    notes += [
        f"{name}, {target}: the same tiles at every share, which is of the finest ones."
        for target, part in found["targets"].items()
        for name, line in part["aggregators"].items()
        if len(shares := line.get("by_share", {})) > 1 and len({numbers["tiles"] for numbers in shares.values()}) == 1
    ]
    return Table(
        name="biomarkers_tiles", title="Tile count against accuracy", blocks=blocks, row_header="Aggregator, share of finest tiles",
        rows=[Row(name=name, cells=row) for name, row in cells.items()], notes=notes,
    )  # fmt: skip


def _metrics(part: dict[str, Any]) -> list[str]:
    return ["auroc", "auroc_pooled"] if part["task"] == "classification" else ["r2", "spearman"]


def _sets_against(part: dict[str, Any]) -> bool:
    """Whether a row is compared with another one than the baseline."""
    return any("against" in line.get("by_share", {}).get("1", {}) for line in part["aggregators"].values())


def _title(target: str, part: dict[str, Any]) -> str:
    counts = part["class_slides"]
    told = ", ".join(f"{name}: {count}" for name, count in counts.items()) if counts else "a number"
    return f"{target} (column {part['column']}; {told})"


def _cell(numbers: dict[str, Any]) -> Cell:
    interval = numbers["interval"]
    return Cell(value=numbers["value"], interval=tuple(interval) if interval else None)


def _rules(found: dict[str, Any]) -> dict[str, str]:
    """The rules that the first evaluated target tells; they are the same for all."""
    told: list[dict[str, str]] = [part["rules"] for part in found["targets"].values() if part["rules"]]
    return told[0] if told else {}


def _notes(found: dict[str, Any]) -> list[str]:
    notes = [f"{found['repeats']} x {found['folds']} folds, seed {found['seed']}; the same folds for every row."]
    parts = list(found["targets"].values())
    reasons = sorted(
        {
            numbers["reason"]
            for part in parts
            for line in part["aggregators"].values()
            for numbers in line.get("by_share", {}).values()
            if numbers["reason"]
        }
    )
    if reasons:
        notes += [f"No intervals: {reason}." for reason in reasons]
    else:
        notes.append(
            f"[…]: 95 % interval over {found['resamples']:,} resamples of the patients, the same for every row."
        )
    notes.append("AUROC, folds: mean ± standard deviation over the single folds' own.")
    rules = _rules(found)
    notes += [f"{name}: {rule}." for name, rule in rules.items() if name not in ("shares", "interval")]
    for target, part in found["targets"].items():
        if words := part["without_value"]:
            told = ", ".join(f"{word or 'empty'}: {count}" for word, count in words.items())
            notes.append(f"{target}: {sum(words.values())} slides have no value ({told}) and are left out.")
        pairs = {tuple(copy["slides"]) for line in part["aggregators"].values() for copy in line.get("copies", [])}
        if pairs:
            told = "; ".join(" and ".join(pair) for pair in sorted(pairs)[:SHOWN]) + (
                "; …" if len(pairs) > SHOWN else ""
            )
            notes.append(
                f"{target}: WARNING: {len(pairs)} pair(s) of slides of two patients have equal tokens, one trained on while the "
                f"other is tested ({told}): a slide that is there twice is no test."
            )
    left_out = {
        name: line["without_tokens"]
        for part in parts
        for name, line in part["aggregators"].items()
        if line.get("without_tokens")
    }
    return notes + [
        f"{name}: {len(slides)} slides have no such token and are left out." for name, slides in left_out.items()
    ]
