"""The evidence table and its picture from `evidence.json`. No number is computed here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mad.evaluation.by_patient import SPACES
from mad.files import Pathlike, atomic_path
from mad.reporting.table import Block, Cell, Column, Row, Table
from mad.reporting.tables import NOT_RANKED

BASELINE, METHOD, UNTRAINED = "#d55e00", "#0072b2", "#7f7f7f"  # apart for every kind of colour vision (Okabe & Ito)
STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 8, "axes.linewidth": 0.6, "savefig.facecolor": "white"}
SPACE_TITLES = {
    "cosine": "Cosines (Table 4)",
    "centred": "Cosines after one shared mean is subtracted",
    "centred_each": "Cosines after each magnification's mean is subtracted",
}
RANKS = ("rankme coarse", "rankme fine")


def blocks(transition: tuple[float, float]) -> list[Block]:
    """The columns of the evidence table."""
    coarse, fine = (f"{magnification:g}x" for magnification in transition)

    def column(key: str, header: str, best: Any = "max", digits: int = 3) -> Column:
        return Column(key=key, header=header, digits=digits, best=best)

    parts = [
        Block(
            title=SPACE_TITLES[space],
            columns=[
                column(f"{space} pair_average s_pos", "S_pos", None),  # of cosines only gaps are a merit
                column(f"{space} same_slide s_neg_same", "S_neg same slide", None),
                column(f"{space} other_patient s_neg_same", "S_neg other patient", None),
                column(f"{space} pair_average delta_hier", "Δ_hier ↑"),
                column(f"{space} same_slide delta_hier", "Δ_hier same slide ↑"),
                column(f"{space} pair_average delta_sem", "Δ_sem ↑"),
            ],
        )
        for space in SPACES
    ]
    ways = {"child_to_parent": "Child → parent", "parent_to_child": "Parent → child"}
    columns = [
        each
        for way, header in ways.items()
        for each in (
            column(f"retrieval {way} at_1", f"{header} (%) ↑", digits=1),
            column(f"retrieval {way} chance", f"{header}, chance (%)", None, digits=1),
        )
    ]
    columns += [
        column(f"rankme {side}", f"RankMe {name} ↑", digits=1) for side, name in (("coarse", coarse), ("fine", fine))
    ]
    columns.append(column("knn macro_f1", "k-NN macro F1 ↑"))
    parts.append(Block(title="Retrieval@1 within the slide, rank, k-NN", columns=columns))
    for probe, name in (("paper", "The paper's probe"), ("sound", "Sound probe")):
        for variant, apart in (("with_background", ""), ("without_background", ", without Background tiles")):
            columns = [column(f"{probe} {variant} coarse mean_iou", f"{coarse} mIoU")]
            for suffix, header in (("", ""), ("_matched", ", matched"), ("_coral", ", CORAL")):
                key = f"{probe}{suffix} {variant}"
                columns.append(column(f"{key} fine mean_iou", f"{fine} mIoU{header}"))
                columns.append(column(f"{key} consistency", f"Consistency (%){header}", None, digits=1))
            parts.append(Block(title=f"{name}{apart}", columns=columns))
    agreement = [
        column(f"{probe} agreement", f"{header} (%)", None, digits=1)
        for probe, header in (("paper", "Paper's probe"), ("sound", "Sound probe"), ("sound_matched", "Sound, matched"))
    ]
    return [*parts, Block(title="Prediction agreement of child and parent", columns=agreement)]


def evidence_table(found: dict[str, Any]) -> Table:
    """A row per method; after each block, where there is a baseline, the same columns as differences to it.

    Args:
        found: `evidence.json`.
    """
    baseline = found["baseline"]
    printed = []
    for block in _present(found):
        printed.append(block)
        differences = [
            Column(key=f"{column.key} difference", header=column.header.rstrip(" ↑↓"), digits=column.digits)
            for column in block.columns
            if not column.key.endswith("chance")
        ]
        if baseline is not None:
            printed.append(Block(title=f"{block.title}: difference to {baseline}", columns=differences))
    rows = []
    for group in found["groups"]:
        cells: dict[str, Cell] = {}
        for key, metric in found["metrics"].items():
            part, scale = metric["groups"][group], _scale(key)
            std = None if key.endswith("chance") else part["std"]
            cells[key] = _cell(part["mean"], std, part["interval"], scale)
            if difference := part.get("difference"):
                cells[f"{key} difference"] = _cell(difference["mean"], None, difference["interval"], scale)
        rows.append(Row(name=group, cells=cells))
    return Table(
        name="evidence", title="Evidence: methods over seeds", blocks=printed, rows=rows, row_header="Method",
        notes=_notes(found),
    )  # fmt: skip


def slides_table(found: dict[str, Any]) -> Table:
    """A row per test slide and method with what needs no label."""
    coarse, fine = (f"{magnification:g}x" for magnification in found["transition"])
    headers = {
        "s_pos": ("S_pos ↑", 3), "s_neg": ("S_neg ↓", 3), "delta_hier": ("Δ_hier ↑", 3),
        "retrieval child_to_parent at_1": ("Child → parent (%) ↑", 1), "retrieval child_to_parent chance": ("chance (%)", 1),
        "retrieval parent_to_child at_1": ("Parent → child (%) ↑", 1), "retrieval parent_to_child chance": ("chance (%)", 1),
        "rankme coarse": (f"RankMe {coarse} ↑", 1), "rankme fine": (f"RankMe {fine} ↑", 1),
    }  # fmt: skip
    rows = [
        Row(
            name=f"{slide}, {group}",
            cells={
                key: _cell(part["mean"], None if key.endswith("chance") else part["std"], None, _scale(key))
                for key, part in numbers.items()
            },
        )
        for slide, groups in found["slides"].items()
        for group, numbers in groups.items()
    ]
    columns = [Column(key=key, header=header, digits=digits) for key, (header, digits) in headers.items()]
    return Table(
        name="evidence_slides", title="Slide by slide, without labels", rows=rows, row_header="Slide, method",
        blocks=[Block(title="Negatives of the same slide, whatever their class", columns=columns)],
        notes=["Mean ± standard deviation over the seeds of a method. One slide is no evidence: a check that nothing broke."],
    )  # fmt: skip


def evidence_figure(found: dict[str, Any], *, untrained: Collection[str], path: Pathlike) -> None:
    """Dots and intervals: a line of panels per block, a panel per number, a method per height.

    Args:
        found: `evidence.json`.
        untrained: groups drawn in grey: random weights, colour.
        path: PNG.
    """
    lines = _present(found)
    groups = list(found["groups"])
    columns = max((len(list(_drawn(block))) for block in lines), default=1)
    height = 0.15 * len(groups) + 0.75
    with plt.rc_context(STYLE):
        size = 1.95 * columns + 1.4, height * max(len(lines), 1) + 0.5
        spaced = ConstrainedLayoutEngine(h_pad=0.13)  # inches: the blocks' titles
        figure, axes = plt.subplots(max(len(lines), 1), columns, figsize=size, squeeze=False, layout=spaced)
        for axis in axes.flat:
            axis.set_visible(False)
        for line, block in zip(axes, lines, strict=False):
            for place, (axis, column) in enumerate(zip(line, _drawn(block), strict=False)):
                axis.set_visible(True)
                _panel(axis, found, column, untrained)
                axis.set_yticks(range(len(groups)), groups if place == 0 else [])
                if place == 0:
                    title = axis.annotate(
                        block.title, (0, 1), (0, 16), "axes fraction", "offset points", fontweight="bold"
                    )
                    title.set_in_layout(False)  # or its width would push the next panel away
        figure.suptitle(
            "dot: mean over seeds, small: each seed, bar: 95 % interval over test patients x seeds"
            + (f", orange and dashed: {found['baseline']}" if found["baseline"] is not None else "")
            + ", grey: untrained, dotted: chance",
            fontsize=9,
        )
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=110)
        plt.close(figure)


def _panel(axis: Any, found: dict[str, Any], column: Column, untrained: Collection[str]) -> None:
    scale, metric = _scale(column.key), found["metrics"][column.key]["groups"]
    for height, (group, part) in enumerate(metric.items()):
        colour = BASELINE if group == found["baseline"] else UNTRAINED if group in untrained else METHOD
        if part["interval"]:
            axis.plot(
                [scale * edge for edge in part["interval"]], [height] * 2, color=colour, linewidth=1.6, alpha=0.55
            )
        seeds = [scale * value for value in part["values"] if value is not None]
        axis.plot(seeds, [height] * len(seeds), "o", color=colour, markersize=2.6, markeredgewidth=0, alpha=0.6)
        if part["mean"] is not None:
            axis.plot(scale * part["mean"], height, "o", color=colour, markersize=5, markeredgecolor="white")
            if group == found["baseline"]:
                axis.axvline(scale * part["mean"], color=BASELINE, linewidth=0.7, linestyle="--", zorder=0)
    chance = found["metrics"].get(column.key.replace("at_1", "chance")) if column.key.endswith("at_1") else None
    levels = [part["mean"] for part in chance["groups"].values() if part["mean"] is not None] if chance else []
    if levels:
        axis.axvline(scale * levels[0], color="black", linewidth=0.8, linestyle=":", zorder=0)
    axis.set_ylim(len(metric) - 0.4, -0.6)
    axis.set_title(column.header + (" (seeds only)" if column.key in RANKS else ""), fontsize=8, pad=3)
    axis.tick_params(length=2, labelsize=7)
    axis.locator_params(axis="x", nbins=4)
    axis.grid(axis="x", color="#e5e5e5", linewidth=0.5)
    axis.set_axisbelow(True)


def _drawn(block: Block) -> Iterator[Column]:
    return (column for column in block.columns if not column.key.endswith("chance"))


def _present(found: dict[str, Any]) -> list[Block]:
    """The blocks and columns of which any group has a number."""
    known = {
        key for key, metric in found["metrics"].items() if any(p["mean"] is not None for p in metric["groups"].values())
    }
    parts = (
        Block(title=block.title, columns=[column for column in block.columns if column.key in known])
        for block in blocks(tuple(found["transition"]))
    )
    return [block for block in parts if block.columns]


def _scale(key: str) -> float:
    """Shares are printed in per cent."""
    return 100.0 if key.startswith("retrieval") or key.endswith("agreement") else 1.0


def _cell(value: float | None, std: float | None, interval: list[float] | None, scale: float) -> Cell:
    return Cell(
        value=None if value is None else scale * value,
        std=None if value is None or std is None else scale * std,
        interval=(scale * interval[0], scale * interval[1]) if interval else None,
    )


def _notes(found: dict[str, Any]) -> list[str]:
    counts = {group: len(encoders) for group, encoders in found["groups"].items()}
    notes = list(found["notes"])
    notes.append(f"Mean ± standard deviation over seeds ({', '.join(f'{g}: {n}' for g, n in counts.items())}).")
    patients = {protocol: number for protocol, number in found["patients"].items() if number}
    if len(set(patients.values())) == 1:
        notes.append(f"Test patients: {next(iter(patients.values()))}.")
    elif patients:
        notes.append(f"Test patients: {', '.join(f'{number} ({protocol})' for protocol, number in patients.items())}.")
    reasons = {reason for reason in found["reason"].values() if reason}
    if found["resamples"] and any(reason is None for reason in found["reason"].values()):
        notes.append(
            f"[…]: 95 % interval over {found['resamples']:,} resamples of the test patients (the same for every method) and, "
            "independently, of each method's seeds. From n seeds the seeds' share of the variance comes out at (n - 1) / n of its "
            "size; with one seed the interval tells of patients alone. RankMe: seeds only, no interval."
        )
    notes += [f"No intervals: {reason}." for reason in sorted(reasons)]
    notes.append(
        "matched, CORAL: fine embeddings given the coarse mean and deviation, or mean and covariance, from unlabelled training "
        "tiles. S_neg and Δ_hier: negatives of the parent's class. Other numbers of the two probes: transfer.json."
    )
    if any(column.key.endswith(("consistency", "agreement")) for block in _present(found) for column in block.columns):
        notes.append(NOT_RANKED)
    return notes
