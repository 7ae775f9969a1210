"""Test tiles whose pixels are in the cohort a second time: found by the digest of their encoded bytes, named, and not tested.

The same slide under two names, or a region scanned twice, puts training tiles into the test. Equal bytes decode to equal pixels,
so the shards' `sha256` tells without reading an image. A tile without structure (glass, a scanner's fill colour) may equal another
one legitimately and is no duplicate. Slide-level heads read no shards: there equal embeddings tell (`find_copies`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from mad.evaluation.bags import Bag
from mad.evaluation.folds import Split

UNIFORM = 1.0
"""Variance of the Laplacian (grey levels squared) under which a tile has no structure: no tissue, in focus or not, is that even."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """What was found."""

    excluded: set[str]
    """tile_ids that must not be tested."""
    num_tiles: int
    """Tiles that share their pixels with a tile of another slide, or of another split."""
    num_uniform: int
    """Tiles without structure that do, left where they are."""
    slides: list[str]
    """Pairs of slides (or a slide and itself, in two splits) with the number of shared digests, most first."""

    def facts(self) -> dict[str, Any]:
        """What every JSON says of it."""
        return {
            "tiles": self.num_tiles,
            "excluded_from_test": len(self.excluded),
            "uniform": self.num_uniform,
            "slides": self.slides,
        }


def find_duplicates(tiles: pd.DataFrame) -> Duplicates:
    """Duplicates among the tiles of a cohort, and which of them to leave out of the test.

    Of tiles with equal pixels on two slides or in two splits, those of the test split are left out; where all are of the test
    split, the first of them stays. Copies within one slide and one split are that slide's own affair.

    Args:
        tiles: tile_id slide_id split sha256 blur, each tile once, in the order of the cohort; a digest may be missing or empty.
    """
    known = tiles[tiles["sha256"].notna() & (tiles["sha256"] != "")]
    twice = known[known["sha256"].duplicated(keep=False)]
    side = twice["slide_id"].astype(str) + "\0" + twice["split"].astype(str)
    twice = twice[side.groupby(twice["sha256"].to_numpy()).transform("nunique").to_numpy() > 1]
    uniform = (twice["blur"] < UNIFORM).to_numpy()
    found = twice[~uniform]
    tested = found[found["split"] == "test"]
    in_training = set(found.loc[found["split"] != "test", "sha256"])
    again = tested["sha256"].isin(in_training) | tested["sha256"].duplicated()
    return Duplicates(
        excluded=set(tested.loc[again, "tile_id"]),
        num_tiles=len(found),
        num_uniform=int(uniform.sum()),
        slides=_pairs(found),
    )


def find_copies(bags: Iterable[Bag], patient_of: Mapping[str, str], splits: list[Split]) -> list[dict[str, Any]]:
    """Slides of two patients that have equal tokens, one of them trained on while the other is tested: perhaps one slide twice.

    A token that a slide has several times (glass, a collapsed encoder) tells of no other slide.

    Returns:
        `{"slides": [a, b], "tokens": how many are equal}` of every such pair, most first.
    """
    parts = []
    for bag in bags:
        digests = [hashlib.blake2b(bag.store[row].tobytes(), digest_size=8).digest() for row in bag.rows]
        values, times = np.unique(np.frombuffer(b"".join(digests), np.uint64), return_counts=True)
        parts.append(pd.DataFrame({"slide": bag.slide_id, "digest": values[times == 1]}))
    tokens = pd.concat(parts, ignore_index=True)
    twice = tokens[tokens["digest"].duplicated(keep=False)]
    counts: dict[tuple[str, str], int] = {}
    for slides in twice.groupby("digest")["slide"].unique():
        for pair in combinations(sorted(slides), 2):
            counts[pair] = counts.get(pair, 0) + 1
    tested = [split.test for split in splits]
    apart = {
        (a, b): number
        for (a, b), number in counts.items()
        if any((patient_of[a] in side) != (patient_of[b] in side) for side in tested)
    }
    return [
        {"slides": list(pair), "tokens": number}
        for pair, number in sorted(apart.items(), key=lambda one: (-one[1], one[0]))
    ]


def _pairs(found: pd.DataFrame) -> list[str]:
    """ "A (train) and B (test): 12 tiles", of every two sides that share digests."""
    counts: dict[tuple[str, str], int] = {}
    sides = found["slide_id"].astype(str) + " (" + found["split"].astype(str) + ")"
    for names in sides.groupby(found["sha256"].to_numpy()).unique():
        first, *others = sorted(names)
        for other in others:
            counts[first, other] = counts.get((first, other), 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f"{a} and {b}: {number} tile(s)" for (a, b), number in ordered]
