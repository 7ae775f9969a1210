"""Scores of Figure 4's maps: by tile, by pixel, and of the shapes that the map draws."""

from __future__ import annotations

from mad.reporting.table import Block, Cell, Column, Row, Table
from mad.reporting.tables import Reports, find_report, protocol_rules


def map_table(encoders: list[str], reports: Reports) -> Table:
    """A block per slide and magnification: mean IoU of tiles and of pixels, boundary F-score, fragments."""
    rows: list[Row] = []
    found: dict[str, int | None] = {}
    for encoder in encoders:
        report, reason = find_report(reports, encoder, "segmentation")
        cells: dict[str, Cell] = {}
        for line in report["maps"] if report else []:
            place = f"{line['slide_id']} {line['magnification']:g}x"
            broken = line["fragments"] or {"true": None, "predicted": None}
            found[place] = broken["true"]
            values = {
                "iou": line["mean_iou"], "pixel iou": line["pixel"]["mean_iou"], "pixel dice": line["pixel"]["mean_dice"],
                "boundary": line["boundary_f"], "fragments": broken["predicted"],
            }  # fmt: skip
            cells |= {f"{place} {key}": Cell(value=value) for key, value in values.items()}
        rows.append(Row(name=encoder, cells=cells, absent=None if cells else reason or "no slide was mapped"))
    blocks = [
        Block(
            title=f"{place} ({'no labels' if true is None else f'{true} true fragments'})",
            columns=[
                Column(key=f"{place} iou", header="Tile mIoU ↑", digits=3, best="max"),
                Column(key=f"{place} pixel iou", header="Pixel mIoU ↑", digits=3, best="max"),
                Column(key=f"{place} pixel dice", header="Pixel mDice ↑", digits=3, best="max"),
                Column(key=f"{place} boundary", header="Boundary F ↑", digits=3, best="max"),
                Column(key=f"{place} fragments", header="Fragments", digits=0),
            ],
        )
        for place, true in found.items()
    ]
    notes = protocol_rules(reports, "segmentation", "probe", "tiles", "scores", "pixel", "boundary_f", "fragments")
    return Table(name="maps", title="Figure 4's maps: tiles, pixels and shapes", blocks=blocks, rows=rows, notes=notes)
