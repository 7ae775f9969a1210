"""Table 2 of the MAD paper: what the shards hold, counted as the paper counts and tile by tile."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd

from mad.reporting.from_json import BLOCK_NOTE
from mad.reporting.table import Block, Cell, Column, Row, Table

UNLABELLED = "Unlabelled"


def table2(
    tiles: pd.DataFrame, *, classes: list[str], background: str | None, ladder: list[float], split_by: str
) -> Table:
    """Composition of the shards: the paper's columns in its order, and ours in a block of their own.

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
    names = [*classes, *([UNLABELLED] if (readable["own"] == UNLABELLED).any() else [])]
    rows: list[Row] = []
    grand = dict.fromkeys(("standalone", "total", "train", "test", "val", "alone", "unique"), 0)
    for name in names:
        mine = readable[readable["group"] == name]
        pairs = {}
        for kind in kinds:
            roles = mine.loc[mine["kind"] == kind, "role"]
            parents, children = int((roles == "parent").sum()), int((roles == "child").sum())
            pairs[kind] = Cell(value=f"{parents:,} → {children:,}" if parents else None)
        alone = mine["role"] == "standalone"
        counted = mine[(mine["role"] == "child") | (alone if name == background else False)]
        numbers = {
            "standalone": None if name == background else int(alone.sum()),
            "total": len(counted),
            **{split: int((counted["split"] == split).sum()) for split in ("train", "test", "val")},
            "alone": int(alone.sum()),
            "unique": int(readable.loc[readable["own"] == name, "tile_id"].nunique()),
        }
        grand = {key: grand[key] + (number or 0) for key, number in numbers.items()}
        rows.append(Row(name=name, cells=pairs | {key: Cell(value=number) for key, number in numbers.items()}))
    rows.append(Row(name="Grand Total", cells={key: Cell(value=number) for key, number in grand.items()}))
    counted_alone = (
        f"; of {background}: its standalone tiles, which the standalone column leaves out" if background else ""
    )
    notes = [
        "Parents → children; a pair belongs to the class of its parent.",
        f"Total Tiles, as the paper counts them: the children of both transitions{counted_alone}. Train, Test and Val are "
        "parts of it.",
        "Standalone tiles are drawn independently of the pairs: a tile may be both.",
        "Unique tiles: every tile once, by its own class, whatever its role; a 10x tile can be a child and a parent.",
    ]
    if len(readable) < len(tiles):
        notes.append(f"{len(tiles) - len(readable):,} rows are unreadable and not counted.")
    return Table(
        name="table2", title="Table 2. Dataset composition and split", rows=rows, row_header="Tissue Class",
        blocks=[Block(title="As in the paper", columns=paper_columns(ladder)), Block(title="Beside it", columns=OURS)],
        notes=notes + ([BLOCK_NOTE] if split_by == "block" else []),
    )  # fmt: skip


def paper_columns(ladder: list[float]) -> list[Column]:
    """The columns of the paper's Table 2, in its order and words."""
    return [
        *(
            Column(key=f"{coarse:g}x-{fine:g}x", header=f"Spatially-Aligned Pairs {coarse:g}x → {fine:g}x", digits=0)
            for coarse, fine in pairwise(ladder)
        ),
        Column(key="standalone", header=f"Standalone ({', '.join(f'{m:g}x' for m in ladder)})", digits=0),
        Column(key="total", header="Total Tiles", digits=0),
        Column(key="train", header="Data Split: Train", digits=0),
        Column(key="test", header="Data Split: Test", digits=0),
    ]


OURS = [
    Column(key="val", header="Data Split: Val", digits=0),
    Column(key="alone", header="All standalone", digits=0),
    Column(key="unique", header="Unique tiles", digits=0),
]
"""What the paper does not print."""
