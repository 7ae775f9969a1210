"""Tiles with equal pixels: which are duplicates, which of them are tested, what is said."""

from __future__ import annotations

import pandas as pd
import pytest

from mad.evaluation.duplicates import find_duplicates


def tiles(*rows: tuple[str, str, str, str | None, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["tile_id", "slide_id", "split", "sha256", "blur"])


def test_copies_across_slides_leave_the_test() -> None:
    found = find_duplicates(
        tiles(
            ("A_1", "A", "train", "x", 90), ("B_1", "B", "test", "x", 90), ("C_1", "C", "test", "x", 90),
            ("B_2", "B", "test", "y", 90), ("C_2", "C", "test", "y", 90), ("C_3", "C", "test", "z", 90),
            ("A_2", "A", "train", "v", 90), ("D_1", "D", "val", "v", 90),
        )
    )  # fmt: skip
    assert found.excluded == {"B_1", "C_1", "C_2"}  # of a copy that only the test holds, the first stays
    assert found.num_tiles == 7 and found.num_uniform == 0
    assert found.slides == [
        "A (train) and B (test): 1 tile(s)",
        "A (train) and C (test): 1 tile(s)",
        "A (train) and D (val): 1 tile(s)",
        "B (test) and C (test): 1 tile(s)",
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [("A_1", "A", "test", "x", 90), ("A_2", "A", "test", "x", 90)],  # one slide, one split: its own affair
        [("A_1", "A", "train", "", 90), ("B_1", "B", "test", "", 90)],  # no digest
        [("A_1", "A", "train", None, 90), ("B_1", "B", "test", None, 90)],
        [("A_1", "A", "train", "x", 90), ("B_1", "B", "test", "y", 90)],
    ],
)
def test_what_is_no_duplicate(rows: list[tuple[str, str, str, str | None, float]]) -> None:
    found = find_duplicates(tiles(*rows))
    assert (found.excluded, found.num_tiles, found.slides) == (set(), 0, [])


def test_halves_of_one_slide_count_and_uniform_tiles_do_not() -> None:
    found = find_duplicates(
        tiles(
            ("A_1", "A", "train", "x", 40), ("A_2", "A", "test", "x", 40),
            ("A_3", "A", "train", "g", 0), ("A_4", "A", "test", "g", 0), ("B_1", "B", "test", "g", 0.4),
        )
    )  # fmt: skip
    assert found.excluded == {"A_2"} and found.num_tiles == 2 and found.num_uniform == 3
    assert found.slides == ["A (test) and A (train): 1 tile(s)"]


def test_a_slide_under_two_names_is_not_tested_at_all() -> None:
    rows = [
        (f"{slide}_{n}", slide, split, str(n), 50.0)
        for slide, split in (("A", "train"), ("B", "test"))
        for n in range(9)
    ]
    found = find_duplicates(tiles(*rows))
    assert len(found.excluded) == 9 and found.slides == ["A (train) and B (test): 9 tile(s)"]
    assert find_duplicates(tiles()).excluded == set()
