"""Tables 3-5 of the MAD paper from the JSON of `evaluate/`. No number is computed here: what a table prints stands there."""

from __future__ import annotations

from typing import Any

from mad.reporting import published
from mad.reporting.table import Block, Cell, Column, Row, Table

Reports = dict[str, dict[str, Any]]
"""Encoder -> protocol -> JSON; an encoder or a protocol may lack."""

BLOCK_NOTE = "Not patient-held-out: training and test tiles come from parts of the same slides (`split_by: block`)."


def table3(encoders: list[str], reports: Reports, classes: list[str]) -> Table:
    """F1 per class by linear probe and k-NN, AMI and DBI; beside them macro F1 and the sound probe."""
    rows = []
    magnifications: dict[str, None] = {}
    for encoder in encoders:
        classification, reason = find_report(reports, encoder, "classification")
        clustering, other = find_report(reports, encoder, "clustering")
        cells: dict[str, Cell] = {}
        if classification:
            for kind in ("linear", "knn", "sound"):
                part = classification[kind]
                cells |= {f"{kind} {name}": _cell(part["f1"].get(name)) for name in classes}
                cells |= {f"{kind} macro": _cell(part["macro_f1"]), f"{kind} accuracy": _cell(part["accuracy"])}
            cells["knn whole"] = _cell(classification["knn"]["whole_bank"]["macro_f1"])
        if clustering:
            cells |= {"ami": _cell(clustering["global"]["ami"]), "dbi": _cell(clustering["global"]["dbi"])}
            cells["unit ami"] = _cell(clustering["unit"]["ami"])
            cells["dbi classes"] = Cell(value=clustering["dbi_classes"])
            apart = clustering["by_magnification"]
            cells |= {f"ami {magnification}": _cell(part["ami"]) for magnification, part in apart.items()}
            magnifications |= dict.fromkeys(apart)
        rows.append(Row(name=encoder, cells=cells, absent=None if cells else reason or other))

    def f1(kind: str) -> list[Column]:
        named = [Column(key=f"{kind} {name}", header=name, best="max") for name in classes]
        return [*named, Column(key=f"{kind} macro", header="Macro F1", best="max")]

    blocks = [
        Block(title="Linear F1 (↑)", columns=f1("linear")),
        Block(
            title="k-NN F1 (↑)", columns=[*f1("knn"), Column(key="knn whole", header="Macro, whole bank", best="max")]
        ),
        Block(
            title="Global clustering",
            columns=[
                Column(key="ami", header="AMI (↑)", best="max"),
                Column(key="dbi", header="DBI (↓)", best="min"),
                Column(key="unit ami", header="AMI, L2-normalised (↑)", best="max"),
                Column(key="dbi classes", header="DBI of true classes (↓)", best="min"),
                *(
                    Column(key=f"ami {m}", header=f"AMI, {m} alone (↑)", best="max")
                    for m in sorted(magnifications, key=_magnification)
                ),
            ],
        ),
        Block(title="Sound probe F1 (↑): standardised, full batch", columns=f1("sound")),
    ]
    return Table(
        name="table3", title="Table 3. Classification and clustering, all magnifications pooled", blocks=blocks, rows=rows,
        notes=_notes(reports, "classification") + protocol_rules(reports, "clustering", "kmeans", "ami", "dbi"),
        published=_published(published.TABLE3), published_note=published.NOTE,
    )  # fmt: skip


def table4(encoders: list[str], reports: Reports) -> Table:
    """S_pos, S_neg and their gaps, over all pairs; then apart by slide, averaged by class, and centred; retrieval."""
    variants = {
        "cosine pair_average": "All pairs (the paper's columns)",
        "cosine same_slide": "Negatives of the same slide",
        "cosine other_patient": "Negatives of other patients",
        "cosine class_average": "All pairs, averaged by class",
        "centred pair_average": "All pairs, one shared mean subtracted",
        "centred_each pair_average": "All pairs, each magnification's mean subtracted",
    }
    headers = {
        "s_pos": ("S_pos ↑", "max"), "s_neg_same": ("S_neg same ↓", "min"), "delta_hier": ("Δ_hier ↑", "max"),
        "s_neg_diff": ("S_neg diff ↓", "min"), "delta_sem": ("Δ_sem ↑", "max"),
    }  # fmt: skip
    rows = []
    for encoder in encoders:
        report, reason = find_report(reports, encoder, "consistency")
        cells: dict[str, Cell] = {}
        if report:
            intervals = report["bootstrap"]["intervals"] or {}
            for variant in variants:
                space, average = variant.split(" ")
                for key in headers:
                    first = variant == "cosine pair_average"
                    interval = intervals.get(key) if first and key.startswith("delta") else None
                    name = key if first else f"{variant} {key}"
                    cells[name] = Cell(
                        value=report[space][average][key], interval=tuple(interval) if interval else None
                    )
            for way, part in report["retrieval"].items():
                cells[way], cells[f"{way} chance"] = (
                    Cell(value=_percent(part["at_1"])),
                    Cell(value=_percent(part["chance"])),
                )
        rows.append(Row(name=encoder, cells=cells, absent=None if cells else reason))
    blocks = []
    for variant, title in variants.items():
        prefix = "" if variant == "cosine pair_average" else f"{variant} "
        columns = [Column(key=prefix + k, header=h, digits=3, best=b) for k, (h, b) in headers.items()]  # type: ignore[arg-type]
        blocks.append(Block(title=title, columns=columns))
    retrieval = []
    for way, header in (("child_to_parent", "Child → parent"), ("parent_to_child", "Parent → child")):
        retrieval.append(Column(key=way, header=f"{header} (%) ↑", digits=1, best="max"))
        retrieval.append(Column(key=f"{way} chance", header="chance (%)", digits=1))
    blocks.append(Block(title="Retrieval@1 within the slide", columns=retrieval))
    transition = next(
        (r["consistency"]["transition"] for r in reports.values() if _ok(r.get("consistency"))), "10x-40x"
    )
    title = f"Table 4. Cross-magnification consistency, {transition.replace('-', ' → ')}"
    return Table(
        name="table4", title=title, blocks=blocks, rows=rows,
        notes=_notes(reports, "consistency") + _bootstrap_notes(reports, "consistency"),
        published=_published(published.TABLE4), published_note=published.NOTE,
    )  # fmt: skip


def table5(encoders: list[str], reports: Reports) -> Table:
    """Coarse and zero-shot fine scores of the coarse-trained probe, and consistency; with and without Background."""
    variants = {
        "paper with_background": "The paper's probe (the paper's columns)",
        "paper without_background": "The paper's probe, without Background tiles",
        "sound with_background": "Sound probe: standardised, full batch",
        "sound without_background": "Sound probe, without Background tiles",
        "paper_matched with_background": "The paper's probe, fine embeddings given the coarse mean and deviation (no labels)",
        "paper_coral with_background": "The paper's probe, fine embeddings given the coarse mean and covariance (CORAL, no labels)",
        "sound_matched with_background": "Sound probe, fine embeddings given the coarse mean and deviation (no labels)",
        "sound_coral with_background": "Sound probe, fine embeddings given the coarse mean and covariance (CORAL, no labels)",
    }
    scores = {"iou": "mean_iou", "dice": "mean_dice", "accuracy": "accuracy"}
    rows = []
    for encoder in encoders:
        report, reason = find_report(reports, encoder, "transfer")
        cells: dict[str, Cell] = {}
        for variant in variants if report else ():
            assert report is not None
            probe, background = variant.split(" ")
            part = report.get(probe, {}).get(background)
            if part is None:
                continue
            prefix = _prefix(variant)
            for side in ("coarse", "fine"):
                cells |= {f"{prefix}{side} {short}": _cell(part[side][key]) for short, key in scores.items()}
            interval = (part["bootstrap"]["intervals"] or {}).get("consistency")
            mean = part["consistency"]
            cells[f"{prefix}consistency"] = Cell(
                value=mean["mean"], std=mean["std"], interval=tuple(interval) if interval else None
            )
            cells[f"{prefix}agreement"] = Cell(value=_percent(report[probe]["agreement"]["mean"]))
        rows.append(Row(name=encoder, cells=cells, absent=None if cells else reason))
    coarse, fine = next((r["transfer"]["transition"] for r in reports.values() if _ok(r.get("transfer"))), (10, 40))
    blocks = []
    for variant, title in variants.items():
        prefix = _prefix(variant)
        columns = [
            Column(key=f"{prefix}{side} {short}", header=f"{magnification:g}x {header}", best="max")
            for side, magnification in (("coarse", coarse), ("fine", fine))
            for short, header in (("iou", "mIoU"), ("dice", "mDice"), ("accuracy", "Acc."))
        ]
        columns.append(Column(key=f"{prefix}consistency", header="Consistency (%)", digits=1, best="max"))
        if variant.endswith(" with_background"):  # of all children, whatever their class
            columns.append(Column(key=f"{prefix}agreement", header="Agreement (%)", digits=1, best="max"))
        blocks.append(Block(title=title, columns=columns))
    title = f"Table 5. Cross-magnification generalisation: trained on {coarse:g}x, tested on {coarse:g}x and {fine:g}x"
    return Table(
        name="table5", title=title,
        blocks=blocks, rows=rows, notes=_notes(reports, "transfer") + _bootstrap_notes(reports, "transfer"),
        published=_published(published.TABLE5), published_note=published.NOTE,
    )  # fmt: skip


def scale_table(encoders: list[str], reports: Reports) -> Table:
    """Train-magnification x test-magnification matrix of mean IoU, a block per training magnification."""
    rows: list[Row] = []
    ladder: list[str] = []
    for encoder in encoders:
        report, reason = find_report(reports, encoder, "transfer")
        matrix = report["matrix"] if report else {}
        ladder = ladder or sorted(matrix, key=_magnification)
        cells = {f"{a} to {b}": Cell(value=value) for a, row in matrix.items() for b, value in row.items()}
        rows.append(Row(name=encoder, cells=cells, absent=None if cells else reason))
    blocks = [
        Block(
            title=f"Trained on {trained}",
            columns=[
                Column(key=f"{trained} to {tested}", header=f"Tested on {tested}", best="max") for tested in ladder
            ],
        )
        for trained in ladder
    ]
    notes = protocol_rules(reports, "transfer", "matrix", "sound")
    done = [parts["transfer"] for parts in reports.values() if _ok(parts.get("transfer"))]
    if done and done[0]["split_by"] == "block":
        notes = [BLOCK_NOTE, *notes]
    return Table(
        name="scales", title="Every magnification to every other: mean IoU", blocks=blocks, rows=rows, notes=notes
    )


def _magnification(name: str) -> float:
    """ "10x" -> 10."""
    return float(name.removesuffix("x"))


def _prefix(variant: str) -> str:
    return "" if variant == "paper with_background" else f"{variant} "


def _ok(report: dict[str, Any] | None) -> bool:
    return report is not None and report["status"] == "ok"


def find_report(reports: Reports, encoder: str, protocol: str) -> tuple[dict[str, Any] | None, str | None]:
    """A protocol's JSON, or why there is none."""
    report = reports.get(encoder, {}).get(protocol)
    if report is None:
        return None, f"evaluate/{encoder}/{protocol}.json does not exist"
    return (report, None) if _ok(report) else (None, f"{report['status']}: {report['reason']}")


def _cell(summary: dict[str, Any] | None) -> Cell:
    return Cell(value=None) if summary is None else Cell(value=summary["mean"], std=summary["std"])


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _published(rows: dict[str, dict[str, float]]) -> list[Row]:
    return [
        Row(name=name, cells={key: Cell(value=value) for key, value in cells.items()}) for name, cells in rows.items()
    ]


def _notes(reports: Reports, protocol: str) -> list[str]:
    """The protocol's own rules, its runs, classes without tiles, and what was not held out."""
    done = [parts[protocol] for parts in reports.values() if _ok(parts.get(protocol))]
    if not done:
        return []
    first = done[0]
    notes = [BLOCK_NOTE] if first["split_by"] == "block" else []
    if "runs" in first:
        steps = first["probe"]
        notes.append(
            f"Mean ± standard deviation over {first['runs']} runs (seeds {first['seeds'][0]} … {first['seeds'][-1]})."
        )
        notes.append(
            f"The paper's probe: Adam {steps['lr']:g}, batch {steps['batch']}, {steps['steps']:,} steps (unpublished; ours)."
        )
    for where in ("train", "test"):
        if first.get(f"absent_in_{where}"):
            notes.append(f"Classes without {where} tiles: {', '.join(first[f'absent_in_{where}'])}.")
    return notes + [f"{name}: {rule}{'' if rule.endswith('?') else '.'}" for name, rule in first["rules"].items()]


def protocol_rules(reports: Reports, protocol: str, *names: str) -> list[str]:
    """Notes of the rules with these names, as the first encoder that has the protocol tells them."""
    done = [parts[protocol] for parts in reports.values() if _ok(parts.get(protocol))]
    return [f"{name}: {done[0]['rules'][name]}." for name in names] if done else []


def _bootstrap_notes(reports: Reports, protocol: str) -> list[str]:
    for parts in reports.values():
        if _ok(parts.get(protocol)):
            report = parts[protocol]
            boot = report.get("bootstrap") or report["paper"]["with_background"]["bootstrap"]
            if boot["intervals"] is None:
                return [f"No intervals: {boot['reason']}."]
            return [f"[…]: 95 % interval over {boot['resamples']:,} resamples of the {boot['patients']} test patients."]
    return []
