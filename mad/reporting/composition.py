"""Table 2 of the MAD paper: what the shards hold, counted as the paper counts and tile by tile."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd

from mad.reporting.table import Block, Cell, Column, Row, Table
from mad.reporting.tables import BLOCK_NOTE

UNLABELLED = "Unlabelled"


def table2(
    tiles: pd.DataFrame, *, classes: list[str], background: str | None, ladder: list[float], split_by: str
) -> Table:
    """Composition of the shards, in the paper's layout.

    Args:
        tiles: rows of all shard tables with the tile's label: tile_id kind role sample_id split status label.
        classes: class names in order.
        background: the class that stands for glass.
        ladder: magnifications, coarsest first.
        split_by: of the cohort.
    """
    readable = tiles[tiles["status"] == "ok"] if "status" in tiles else tiles
    label_of = readable.drop_duplicates("tile_id").set_index("tile_id")["label"]
    sample_class = readable["sample_id"].map(label_of).astype(object)
    readable = readable.assign(
        own=readable["label"].astype(object).fillna(UNLABELLED), group=sample_class.fillna(UNLABELLED)
    )
    kinds = [f"{coarse:g}x-{fine:g}x" for coarse, fine in pairwise(ladder)]
    splits = ["train", "val", "test"]
    columns = [Column(key=kind, header=kind.replace("-", " → "), digits=0) for kind in kinds]
    columns += [Column(key="standalone", header=f"Standalone ({', '.join(f'{m:g}x' for m in ladder)})", digits=0)]
    columns += [Column(key="total", header="Total tiles (as the paper counts)", digits=0)]
    columns += [Column(key=split, header=split.capitalize(), digits=0) for split in splits]
    columns += [Column(key="unique", header="Unique tiles", digits=0)]
    names = [*classes, *([UNLABELLED] if (readable["own"] == UNLABELLED).any() else [])]
    rows, grand = [], dict.fromkeys(["standalone", "total", *splits, "unique"], 0)
    for name in names:
        mine = readable[readable["group"] == name]
        cells: dict[str, Cell] = {}
        for kind in kinds:
            of_kind = mine[mine["kind"] == kind]
            parents, children = int((of_kind["role"] == "parent").sum()), int((of_kind["role"] == "child").sum())
            cells[kind] = Cell(value=f"{parents:,} → {children:,}" if parents else "–")
        alone = mine["role"] == "standalone"
        counted = mine[(mine["role"] == "child") | (alone if name == background else False)]
        numbers = {
            "standalone": int(alone.sum()),
            "total": len(counted),
            **{split: int((counted["split"] == split).sum()) for split in splits},
            "unique": int(readable.loc[readable["own"] == name, "tile_id"].nunique()),
        }
        cells |= {key: Cell(value=number) for key, number in numbers.items()}
        grand = {key: grand[key] + number for key, number in numbers.items()}
        rows.append(Row(name=name, cells=cells))
    rows.append(Row(name="Grand Total", cells={key: Cell(value=number) for key, number in grand.items()}))
    notes = [
        "Parents → children; a pair belongs to the class of its parent.",
        "Total, as the paper counts it: the children of both transitions"
        + (f"; for {background}: its standalone tiles as well. " if background else ". ")
        + "Train, val and test are parts of this total.",
        "Unique tiles: every tile once, by its own class, whatever its role; a 10x tile can be a child and a parent.",
    ]
    if len(readable) < len(tiles):
        notes.append(f"{len(tiles) - len(readable):,} rows are unreadable and not counted.")
    block = Block(title="Tiles", columns=columns)
    return Table(
        name="table2", title="Table 2. Dataset composition and split", blocks=[block], rows=rows, row_header="Tissue class",
        notes=notes + ([BLOCK_NOTE] if split_by == "block" else []),
    )  # fmt: skip
