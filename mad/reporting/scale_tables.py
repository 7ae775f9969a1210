"""Beyond the paper's tables: every magnification to every other, what an embedding tells of its own, and sites left out."""

from __future__ import annotations

from typing import Any

from mad.reporting.from_json import (
    Reports,
    common_notes,
    done,
    first_report,
    interval_notes,
    lacking_notes,
    lookup,
    magnification,
    protocol_rules,
    rows_of,
    told,
)
from mad.reporting.table import Block, Column, Table

BOOTSTRAP = ("bootstrap", "intervals")
SITE_SCORES = {"macro_f1": "Macro F1", "balanced_accuracy": "Bal. acc."}


def scale_table(encoders: list[str], reports: Reports) -> Table:
    """Train-magnification x test-magnification matrix of mean IoU; linear decodability of magnification; RankMe."""
    ladder = sorted(lookup(first_report(reports, "transfer"), ("matrix",)) or {}, key=magnification)
    blocks = [
        Block(
            title=f"Mean IoU, trained on {trained}",
            columns=[
                Column(
                    key=f"{trained} to {tested}", header=f"Tested on {tested} ↑", best="max",
                    source=("transfer", "matrix", trained, tested),
                    interval=("matrix_bootstrap", tested, "intervals", trained),
                )
                for tested in ladder
            ],
        )
        for trained in ladder
    ]  # fmt: skip
    own = first_report(reports, "magnification")
    if own is not None:
        blocks += [
            Block(title="Magnification read from the embedding (lower: more scale-invariant)", columns=_decoding(own))
        ]
        ranks = [
            Column(
                key=f"rankme {name}", header=f"{name} ↑", digits=1, best="max", source=("magnification", "rankme", name)
            )
            for name in sorted(own["rankme"], key=magnification)
        ]
        blocks.append(Block(title="RankMe of the test tiles", columns=ranks))
    notes = common_notes(reports, "transfer", "magnification") + lacking_notes(reports, "transfer", "magnification")
    notes += protocol_rules(reports, "transfer", "matrix", "sound")
    for name in ladder:
        notes += interval_notes(reports, "transfer", ("matrix_bootstrap", name), f"mean IoU at {name}")
    notes += protocol_rules(reports, "magnification", "decodability", "rankme")
    notes += interval_notes(reports, "magnification", of="decodability")
    rows = rows_of(encoders, reports, blocks or [Block(title="", columns=[_matrix_of_nothing()])])
    title = "Every magnification to every other, and what an embedding tells of its own"
    return Table(name="scales", title=title, blocks=blocks, rows=rows, notes=notes)


def _decoding(report: dict[str, Any]) -> list[Column]:
    place = ("magnification", "decodability")
    columns = [
        Column(
            key="decodability", header="Balanced accuracy ↓", digits=3, best="min", source=(*place, "balanced_accuracy"),
            interval=(*BOOTSTRAP, "balanced_accuracy"),
        ),
        Column(key="decodability chance", header="chance", digits=3, source=(*place, "chance")),
    ]  # fmt: skip
    for name in report["magnifications"]:
        columns.append(
            Column(
                key=f"decodability {name}", header=f"Recall {name}", digits=3, source=(*place, "recall", name),
                interval=(*BOOTSTRAP, f"recall {name}"),
            )
        )  # fmt: skip
    columns.append(Column(key="n", header="n tiles", digits=0, source=("magnification", "n", "tiles")))
    columns.append(Column(key="patients", header="Patients", digits=0, source=("magnification", "patients", "test")))
    return columns


def _matrix_of_nothing() -> Column:
    """Asks for the JSON of the matrix, so that an encoder without it is absent with the reason."""
    return Column(key="matrix", header="", source=("transfer", "matrix"))


def site_table(encoders: list[str], reports: Reports) -> Table:
    """A block per site and per scanner that was left out, and their means."""
    found = done(reports, "sites")
    blocks: list[Block] = []
    notes = common_notes(reports, "sites")
    notes += protocol_rules(reports, "sites", "left_out", "seen", "probe", "patients", "mean", "interval", "tiles")
    for column in dict.fromkeys(column for report in found.values() for column in report["columns"]):
        parts = {encoder: report["columns"][column] for encoder, report in found.items()}
        tested = {encoder: part["groups"] for encoder, part in parts.items() if part["status"] == "ok"}
        notes += told(
            {
                encoder: [] if encoder in tested else [f"{column}: {part['status']}, {part['reason']}."]
                for encoder, part in parts.items()
            }
        )
        if not tested:
            continue
        blocks.append(Block(title=f"Mean over every {column}, left out in turn", columns=_site_means(column)))
        notes += interval_notes(reports, "sites", ("columns", column, "bootstrap"), f"the means over every {column}")
        for name in sorted({name for groups in tested.values() for name in groups}):
            lacks = {
                encoder: groups[name]["reason"] if name in groups else "no labelled tiles"
                for encoder, groups in tested.items()
            }
            notes += told(
                {
                    encoder: [f"{column} {name}: not tested, {reason}."] if reason else []
                    for encoder, reason in lacks.items()
                }
            )
            if all(lacks.values()):
                continue
            blocks.append(Block(title=f"{column.capitalize()} {name} left out", columns=_site(column, name)))
            path = ("columns", column, "groups", name, "left_out", "bootstrap")
            notes += interval_notes(reports, "sites", path, f"{column} {name}")
            own = {encoder: groups[name] for encoder, groups in tested.items() if not lacks[encoder]}
            notes.append(f"L2 strength of {column} {name}, left out / seen: {_strengths(own)}.")
    rows = rows_of(
        encoders, reports, blocks or [Block(title="", columns=[Column(key="", header="", source=("sites",))])]
    )
    return Table(name="sites", title="A site or scanner never seen in training", blocks=blocks, rows=rows, notes=notes)


def _site_means(column: str) -> list[Column]:
    kinds = {"left_out": "left out ↑", "seen": "seen ↑", "drop": "drop ↓"}
    return [
        Column(
            key=f"{column} {kind} {score}", header=f"{header}, {kinds[kind]}", best="min" if kind == "drop" else "max",
            source=("sites", "columns", column, kind, score),
            interval=("columns", column, *BOOTSTRAP, f"{kind} {score}"),
        )
        for score, header in SITE_SCORES.items()
        for kind in kinds
    ]  # fmt: skip


def _site(column: str, name: str) -> list[Column]:
    place = ("columns", column, "groups", name)
    columns = [
        Column(
            key=f"{column} {name} {kind} {score}", header=f"{header}, {kind.replace('_', ' ')} ↑", best="max",
            source=("sites", *place, kind, score), interval=(*place, kind, *BOOTSTRAP, score),
        )
        for score, header in SITE_SCORES.items()
        for kind in ("left_out", "seen")
    ]  # fmt: skip
    for key, header in (("tiles", "n tiles"), ("patients", "Patients")):
        columns.append(Column(key=f"{column} {name} {key}", header=header, digits=0, source=("sites", *place, key)))
    return columns


def _strengths(groups: dict[str, dict[str, Any]]) -> str:
    """Of each encoder those of one site's two probes, and how the one that did not see it came by its own."""
    used = [
        f"{name} {group['left_out']['strength']:g} / {group['seen']['strength']:g}" for name, group in groups.items()
    ]
    ways = dict.fromkeys(group["left_out"]["chosen_by"] for group in groups.values())
    return f"{', '.join(used)} ({'; '.join(ways)})"
