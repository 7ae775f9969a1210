"""Tables 3-5 of the MAD paper from the JSON of `evaluate/`: its columns first, the sounder variants in blocks of their own."""

from __future__ import annotations

from typing import Any

from mad.reporting import published
from mad.reporting.from_json import (
    Reports,
    done,
    first_report,
    interval_notes,
    lacking_notes,
    lookup,
    magnification,
    of_part,
    protocol_notes,
    protocol_rules,
    rows_of,
    told,
)
from mad.reporting.table import Block, Cell, Column, Row, Table

SCORES = {
    "macro_f1": ("macro", "Macro F1"),
    "accuracy": ("accuracy", "Acc."),
    "balanced_accuracy": ("balanced", "Bal. acc."),
}
CLASSIFIERS = {"linear": "Linear F1 (↑)", "knn": "k-NN F1 (↑)", "sound": "Sound probe F1 (↑): standardised, full batch"}
DELTAS: dict[str, tuple[str, Any]] = {
    "s_pos": ("S_pos ↑", "max"), "s_neg_same": ("S_neg same ↓", "min"), "delta_hier": ("Δ_hier ↑", "max"),
    "s_neg_diff": ("S_neg diff ↓", "min"), "delta_sem": ("Δ_sem ↑", "max"),
}  # fmt: skip
PAIRS = {
    "cosine pair_average": "All pairs",
    "cosine same_slide": "Negatives of the same slide",
    "cosine other_patient": "Negatives of other patients",
    "cosine class_average": "All pairs, averaged by class",
    "centred pair_average": "All pairs, one shared mean subtracted",
    "centred_each pair_average": "All pairs, each magnification's mean subtracted",
}
PAPER = "cosine pair_average"
PROBES = {
    "paper with_background": "The paper's probe (the paper's columns)",
    "paper without_background": "The paper's probe, without Background tiles",
    "sound with_background": "Sound probe: standardised, full batch",
    "sound without_background": "Sound probe, without Background tiles",
    "paper_matched with_background": "The paper's probe, fine embeddings given the coarse mean and deviation (no labels)",
    "paper_coral with_background": "The paper's probe, fine embeddings given the coarse mean and covariance (CORAL, no labels)",
    "sound_matched with_background": "Sound probe, fine embeddings given the coarse mean and deviation (no labels)",
    "sound_coral with_background": "Sound probe, fine embeddings given the coarse mean and covariance (CORAL, no labels)",
}
NOT_RANKED = (
    "Consistency and agreement have no best: both are high where a probe says the same class of everything, and consistency is "
    "over 100 % where the coarse score is the worse one."
)
BOOTSTRAP = ("bootstrap", "intervals")


def table3(encoders: list[str], reports: Reports, classes: list[str]) -> Table:
    """F1 per class by linear probe and k-NN, AMI and DBI; beside them macro F1, accuracies and the sound probe."""
    linear, knn, sound = (_classifier(kind, classes) for kind in CLASSIFIERS)
    linear += [
        _count("n", "n tiles", ("classification", "n", "tiles")),
        _count("patients", "Patients", ("classification", "patients", "test")),
    ]
    whole = ("classification", "knn", "whole_bank", "macro_f1")
    interval = (*BOOTSTRAP, "knn whole_bank macro_f1")
    knn.append(Column(key="knn whole", header="Macro, whole bank", best="max", source=whole, interval=interval))
    blocks = [
        Block(title=CLASSIFIERS["linear"], columns=linear),
        Block(title=CLASSIFIERS["knn"], columns=knn),
        Block(title="Global clustering", columns=_clusters(reports)),
        Block(title=CLASSIFIERS["sound"], columns=sound),
    ]
    notes = lacking_notes(reports, "classification", "clustering") + protocol_notes(reports, "classification")
    notes += protocol_rules(reports, "clustering", "kmeans", "ami", "dbi")
    notes += [
        note.replace("interval:", "interval of clustering:")
        for note in protocol_rules(reports, "clustering", "interval")
    ]
    return Table(
        name="table3", title="Table 3. Classification and clustering, all magnifications pooled", blocks=blocks,
        rows=rows_of(encoders, reports, blocks), notes=notes + interval_notes(reports, "classification"),
        published=_published(published.TABLE3), published_note=published.NOTE,
    )  # fmt: skip


def _classifier(kind: str, classes: list[str]) -> list[Column]:
    columns = [
        Column(
            key=f"{kind} {name}", header=name, best="max", source=("classification", kind, "f1", name),
            interval=(*BOOTSTRAP, f"{kind} f1 {name}"),
        )
        for name in classes
    ]  # fmt: skip
    return columns + [
        Column(
            key=f"{kind} {short}", header=header, best="max", source=("classification", kind, key),
            interval=(*BOOTSTRAP, f"{kind} {key}"),
        )
        for key, (short, header) in SCORES.items()
    ]  # fmt: skip


def _clusters(reports: Reports) -> list[Column]:
    """AMI and DBI of all magnifications together, and of each alone."""
    found = (lookup(parts.get("clustering"), ("by_magnification",)) for parts in reports.values())
    alone = sorted({name for part in found for name in part or ()}, key=magnification)

    def pair(ami: str, dbi: str, suffix: str, *path: str) -> list[Column]:
        source = ("clustering", *path)
        interval = (*path, *BOOTSTRAP, "ami")
        return [
            Column(key=ami, header=f"AMI{suffix} (↑)", best="max", source=(*source, "ami"), interval=interval),
            Column(key=dbi, header=f"DBI{suffix} (↓)", best="min", source=(*source, "dbi")),
        ]

    columns = pair("ami", "dbi", "", "global")
    columns += pair("unit ami", "unit dbi", ", L2-normalised", "unit")
    true = Column(key="dbi classes", header="DBI of true classes (↓)", best="min", source=("clustering", "dbi_classes"))
    columns.append(true)
    for name in alone:
        columns += pair(f"ami {name}", f"dbi {name}", f", {name} alone", "by_magnification", name)
    return columns


def table4(encoders: list[str], reports: Reports) -> Table:
    """S_pos, S_neg and their gaps, over all pairs; then apart by slide, averaged by class, and centred; retrieval; transitivity."""
    first = first_report(reports, "consistency") or {}
    transition = first.get("transition", "10x-40x").replace("-", " → ")
    found = {
        encoder: lookup(report, ("transitivity",)) or {} for encoder, report in done(reports, "consistency").items()
    }
    counts = [
        _count("n", "n pairs", ("consistency", "cosine", "pair_average", "num_pos")),
        _count("patients", "Patients", ("consistency", "counts", "patients")),
    ]
    blocks = [Block(title=f"{PAIRS[PAPER]} (the paper's columns)", columns=_deltas(PAPER, "") + counts)]
    blocks += [
        Block(title=title, columns=_deltas(variant, f"{variant} "))
        for variant, title in PAIRS.items()
        if variant != PAPER
    ]
    blocks.append(Block(title="Retrieval within the slide", columns=_retrieval("")))
    if grand := next((part for part in found.values() if part.get("status") == "ok"), None):
        name = f"Transitivity, {grand['transition'].replace('-', ' → ')}"
        prefix = "transitivity "
        for variant, title in PAIRS.items():
            if variant != "cosine class_average":
                blocks.append(Block(title=f"{name}: {title}", columns=_deltas(variant, f"{prefix}{variant} ", prefix)))
        blocks.append(Block(title=f"{name}: retrieval within the slide", columns=_retrieval(prefix)))
    notes = protocol_notes(reports, "consistency") + interval_notes(reports, "consistency")
    notes += told(
        {
            encoder: [f"No transitivity: {part['reason']}."] if part.get("reason") else []
            for encoder, part in found.items()
        }
    )
    return Table(
        name="table4", title=f"Table 4. Cross-magnification consistency, {transition}", blocks=blocks,
        rows=rows_of(encoders, reports, blocks), notes=notes + interval_notes(
            reports, "consistency", ("transitivity", "bootstrap"), "transitivity"
        ),
        published=_published(published.TABLE4), published_note=published.NOTE,
    )  # fmt: skip


def _deltas(variant: str, prefix: str, inside: str = "") -> list[Column]:
    """The five columns of a variant; `inside` the part of the JSON that holds it, as "transitivity "."""
    place = tuple(inside.split())
    return [
        Column(
            key=f"{prefix}{key}", header=header, digits=3, best=best,
            source=("consistency", *place, *variant.split(" "), key),
            interval=(*place, *BOOTSTRAP, key if variant == PAPER else f"{variant} {key}"),
        )
        for key, (header, best) in DELTAS.items()
    ]  # fmt: skip


def _retrieval(inside: str) -> list[Column]:
    columns = []
    for way, name in (("child_to_parent", "Child → parent"), ("parent_to_child", "Parent → child")):
        for key, header, best in (
            ("at_1", f"{name} @1 (%) ↑", "max"), ("chance", "chance (%)", None),
            ("at_5", f"{name} @5 (%) ↑", "max"), ("chance_at_5", "chance (%)", None),
        ):  # fmt: skip
            columns.append(
                Column(
                    key=f"{inside}{way}{'' if key == 'at_1' else f' {key}'}", header=header, digits=1, scale=100,
                    best=best,  # type: ignore[arg-type]
                    source=("consistency", *inside.split(), "retrieval", way, key),
                    interval=(*inside.split(), *BOOTSTRAP, f"retrieval {way} {key}") if best else (),
                )
            )  # fmt: skip
    return columns


def table5(encoders: list[str], reports: Reports) -> Table:
    """Coarse and zero-shot fine scores of the coarse-trained probe, and consistency; with and without Background; by class."""
    reports = of_part(reports, "transfer", "table5")
    first = first_report(reports, "transfer") or {}
    coarse, fine = (f"{step:g}x" for step in first.get("transition", (10, 40)))
    counts = [
        _count("n coarse", f"n {coarse}", ("transfer", "n", "coarse")),
        _count("n fine", f"n {fine}", ("transfer", "n", "fine")),
        _count("patients", "Patients", ("transfer", "patients", "test")),
    ]
    blocks = [
        Block(title=title, columns=_transfer(variant, coarse, fine) + (counts if number == 0 else []))
        for number, (variant, title) in enumerate(PROBES.items())
    ]
    for key, name in (("iou", "IoU"), ("dice", "Dice")):
        columns = [
            Column(
                key=f"{side} {key} {label}", header=f"{scale} {label}", best="max", digits=3,
                source=("transfer", "paper", "with_background", side, key, label),
                interval=("paper", "with_background", *BOOTSTRAP, f"{side}_{key} {label}"),
            )
            for side, scale in (("coarse", coarse), ("fine", fine))
            for label in first.get("classes", [])
        ]  # fmt: skip
        blocks.append(Block(title=f"The paper's probe, {name} by class", columns=columns))
    path = ("paper", "with_background", "bootstrap")
    return Table(
        name="table5",
        title=f"Table 5. Cross-magnification generalisation: trained on {coarse}, tested on {coarse} and {fine}",
        blocks=blocks, rows=rows_of(encoders, reports, blocks),
        notes=[*protocol_notes(reports, "transfer"), NOT_RANKED, *interval_notes(reports, "transfer", path)],
        published=_published(published.TABLE5), published_note=published.NOTE,
    )  # fmt: skip


def _transfer(variant: str, coarse: str, fine: str) -> list[Column]:
    probe, background = variant.split(" ")
    prefix = "" if variant == "paper with_background" else f"{variant} "
    scores = {"iou": ("mean_iou", "mIoU"), "dice": ("mean_dice", "mDice"), "accuracy": ("accuracy", "Acc.")}
    columns = [
        Column(
            key=f"{prefix}{side} {short}", header=f"{scale} {header}", best="max",
            source=("transfer", probe, background, side, key),
            interval=(probe, background, *BOOTSTRAP, f"{side}_{key}"),
        )
        for side, scale in (("coarse", coarse), ("fine", fine))
        for short, (key, header) in scores.items()
    ]  # fmt: skip
    columns.append(
        Column(
            key=f"{prefix}consistency", header="Consistency (%)", digits=1,
            source=("transfer", probe, background, "consistency"),
            interval=(probe, background, *BOOTSTRAP, "consistency"),
        )
    )  # fmt: skip
    if background == "with_background":  # of all children, whatever their class
        columns.append(
            Column(
                key=f"{prefix}agreement", header="Agreement (%)", digits=1, scale=100,
                source=("transfer", probe, "agreement"), interval=(probe, "agreement", *BOOTSTRAP, "agreement"),
            )
        )  # fmt: skip
    return columns


def _count(key: str, header: str, source: tuple[str, ...]) -> Column:
    return Column(key=key, header=header, digits=0, source=source)


def _published(rows: dict[str, dict[str, float]]) -> list[Row]:
    return [
        Row(name=name, cells={key: Cell(value=value) for key, value in cells.items()}) for name, cells in rows.items()
    ]
