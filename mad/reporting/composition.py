"""Table 2 of the MAD paper: what the shards hold, counted as the paper counts and tile by tile."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import pandas as pd

from mad.reporting.from_json import BLOCK_NOTE
from mad.reporting.table import Block, Cell, Column, Row, Table

UNLABELLED = "Unlabelled"


@dataclass
class Composition:
    """What Table 2 counts, added up slide by slide: `rows` are readable ones by class of the sample (of a pair its parent's),
    kind, role and split, `unique` are readable tiles by their own class, each once."""

    rows: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    unique: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0

    def add(self, tiles: pd.DataFrame) -> None:
        """Count one slide: its shard table with each tile's label (tile_id kind role sample_id split status label)."""
        readable = tiles[tiles["status"] == "ok"]
        self.unreadable += len(tiles) - len(readable)
        own = readable["label"].astype(object).fillna(UNLABELLED)
        once = ~readable["tile_id"].duplicated()
        sample = readable["sample_id"].map(dict(zip(readable.loc[once, "tile_id"], own[once], strict=True)))
        keys = readable[["kind", "role", "split"]]
        keys.insert(0, "class", sample.astype(object).fillna(UNLABELLED))
        self.rows.update({tuple(key): int(n) for key, n in keys.value_counts().items()})  # type: ignore[arg-type]
        self.unique.update({str(name): int(n) for name, n in own[once].value_counts().items()})


def table2(
    found: Composition, *, classes: list[str], background: str | None, ladder: list[float], split_by: str
) -> Table:
    """Composition of the shards: the paper's columns in its order, and ours in a block of their own.

    Args:
        found: counts of all shard tables.
        classes: class names in order.
        background: the class that stands for glass.
        ladder: magnifications, coarsest first.
        split_by: of the cohort.
    """
    kinds = [f"{coarse:g}x-{fine:g}x" for coarse, fine in pairwise(ladder)]
    names = [*classes, *([UNLABELLED] if found.unique[UNLABELLED] else [])]
    rows: list[Row] = []
    grand = dict.fromkeys(("standalone", "total", "train", "test", "val", "alone", "unique"), 0)
    for name in names:
        mine = [(*key[1:], n) for key, n in found.rows.items() if key[0] == name]
        pairs = {}
        for kind in kinds:
            parents, children = (
                sum(n for k, r, _, n in mine if (k, r) == (kind, role)) for role in ("parent", "child")
            )
            pairs[kind] = Cell(value=f"{parents:,} → {children:,}" if parents else None)
        alone = sum(n for _, role, _, n in mine if role == "standalone")
        roles = ("child", "standalone") if name == background else ("child",)
        counted = [(split, n) for _, role, split, n in mine if role in roles]
        numbers = {
            "standalone": None if name == background else alone,
            "total": sum(n for _, n in counted),
            **{split: sum(n for s, n in counted if s == split) for split in ("train", "test", "val")},
            "alone": alone,
            "unique": found.unique[name],
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
    if found.unreadable:
        notes.append(f"{found.unreadable:,} rows are unreadable and not counted.")
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
