"""Scores of Figure 4's maps: by tile, by pixel, and of the shapes that the map draws."""

from __future__ import annotations

from mad.reporting.from_json import Reports, common_notes, done, find_report, protocol_rules, told
from mad.reporting.table import Block, Cell, Column, Row, Table


def map_table(encoders: list[str], reports: Reports) -> Table:
    """A block per slide and magnification: mean IoU of tiles and of pixels, boundary F-score, fragments."""
    rows: list[Row] = []
    found: dict[str, int | None] = {}
    numbers: dict[str, set[int]] = {}
    for encoder in encoders:
        report, reason = find_report(reports, encoder, "segmentation")
        cells: dict[str, Cell] = {}
        for number, line in enumerate(report["maps"] if report else []):
            place = f"{line['slide_id']} {line['magnification']:g}x"
            numbers.setdefault(place, set()).add(number)
            broken = line["fragments"] or {"true": None, "predicted": None}
            found[place] = broken["true"]
            values = {
                "iou": line["mean_iou"], "pixel iou": line["pixel"]["mean_iou"], "pixel dice": line["pixel"]["mean_dice"],
                "boundary": line["boundary_f"], "fragments": broken["predicted"], "n": line["scored"],
            }  # fmt: skip
            cells |= {f"{place} {key}": Cell(value=value) for key, value in values.items()}
        rows.append(Row(name=encoder, cells=cells, absent=None if cells else reason or "no slide was mapped"))
    # The n-th map of one encoder is not that of another where embeddings of a slide lack.
    lines = {place: " or ".join(map(str, sorted(known))) for place, known in numbers.items()}
    blocks = [
        Block(
            title=f"{place} ({'no labels' if true is None else f'{true} true fragments'})",
            columns=[
                _score(place, "iou", "Tile mIoU ↑", lines[place], "mean_iou"),
                _score(place, "pixel iou", "Pixel mIoU ↑", lines[place], "pixel", "mean_iou"),
                _score(place, "pixel dice", "Pixel mDice ↑", lines[place], "pixel", "mean_dice"),
                _score(place, "boundary", "Boundary F ↑", lines[place], "boundary_f"),
                _count(place, "fragments", "Fragments", lines[place], "fragments", "predicted"),
                _count(place, "n", "n tiles", lines[place], "scored"),
            ],
        )
        for place, true in found.items()
    ]
    notes = common_notes(reports, "segmentation")
    bare = {encoder: report.get("without_embeddings") for encoder, report in done(reports, "segmentation").items()}
    notes += told(
        {
            encoder: [f"Not mapped, without embeddings: {', '.join(slides)}."] if slides else []
            for encoder, slides in bare.items()
        }
    )
    notes += ["No intervals: every map is of one slide."] if blocks else []
    notes += protocol_rules(reports, "segmentation", "probe", "tiles", "scores", "pixel", "boundary_f", "fragments")
    return Table(name="maps", title="Figure 4's maps: tiles, pixels and shapes", blocks=blocks, rows=rows, notes=notes)


def _score(place: str, key: str, header: str, *path: str) -> Column:
    """A score of one map; `path` is its place in the maps of segmentation.json: the map's number, from 0, and keys."""
    return Column(key=f"{place} {key}", header=header, digits=3, best="max", source=("segmentation", "maps", *path))


def _count(place: str, key: str, header: str, *path: str) -> Column:
    return Column(key=f"{place} {key}", header=header, digits=0, source=("segmentation", "maps", *path))
