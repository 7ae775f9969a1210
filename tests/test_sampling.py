"""Selection: caps, stability, completeness of pairs, blocks."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.slides.scale import plan_scale
from mad.tiles.index import empty_table, tile_columns, tile_table
from mad.tiles.pyramid import Grid, Ladder, parse_tile_id
from mad.tiles.sampling import COLUMNS, UNLABELLED, block_split, candidates, expand, hash_rank, under_caps

LADDER = Ladder((2.5, 10.0, 40.0))
CLASSES = ["A", "Background"]


def slide_table(slide: str, seed: int, width: int = 2 * 1792 + 300, height: int = 1792) -> pd.DataFrame:
    """A tile table with random tissue and classes; its right-hand tiles cross the border."""
    rng = np.random.default_rng(seed)
    grid = Grid(LADDER, 112.0, width, height)
    plan = plan_scale(mpp=0.25, level_downsamples=[1, 4, 16], magnifications=LADDER.magnifications, tile_px=112)
    shape = grid.level_shape(2)
    tissue = (rng.random(shape) < 0.8).astype(np.int64)
    labels = np.stack([tissue * (rng.random(shape) < 0.9), 1 - tissue], axis=-1).astype(np.int64)
    table = tile_table(slide, grid, plan, tissue, labels, (1, 1), CLASSES, min_tissue=0.1, min_annotated=0.5)
    return table.assign(split="train")


def select(tables: dict[str, pd.DataFrame], caps: dict[str, int | None], **options: float) -> pd.DataFrame:
    settings = {"seed": 3, "background": "Background", "background_pairs": False}
    found = [candidates(table, LADDER, **settings).assign(slide_id=slide) for slide, table in tables.items()]
    return under_caps(pd.concat(found), caps, None, options.get("test_share", 1.0))


def test_the_tile_table_is_complete_sorted_and_consistent() -> None:
    table = slide_table("S", 0)
    assert list(table.columns) == [*tile_columns(CLASSES), "split"]
    assert table["tile_id"].is_unique
    counts = table.groupby("magnification").size().to_dict()
    columns = -(-(2 * 1792 + 300) // 112)
    assert counts == {2.5: 3, 10.0: (2 * 4 + 1) * 4, 40.0: columns * 16}
    keys = [(len(index), *index) for index in (parse_tile_id(name)[1] for name in table["tile_id"])]
    assert keys == sorted(keys)
    by_id = table.set_index("tile_id")
    children = table[table["parent_id"].notna()]
    parents = by_id.loc[children["parent_id"]]
    assert (parents["x"].to_numpy() <= children["x"].to_numpy()).all()
    assert ((parents["x"] + parents["side"]).to_numpy() >= (children["x"] + children["side"]).to_numpy()).all()
    fine = table[(table["magnification"] == 40) & (table["status"] != "edge")]
    mean = fine.groupby("parent_id")["tissue"].agg(["mean", "size"])
    whole = mean[mean["size"] == 16]
    assert np.allclose(by_id.loc[whole.index, "tissue"], whole["mean"], atol=1e-6)
    assert empty_table(CLASSES).dtypes.equals(table.drop(columns="split").dtypes)


def test_every_pair_is_complete_and_aligned() -> None:
    table = slide_table("S", 1)
    rows = expand(select({"S": table}, {}), table, LADDER)
    assert list(rows.columns) == COLUMNS
    status = table.set_index("tile_id")["status"]
    for (kind, _, sample_id), sample in rows[rows["kind"].str.contains("-")].groupby(["kind", "split", "sample_id"]):
        parent = parse_tile_id(sample_id)[1]
        assert sample["role"].tolist() == ["parent", *["child"] * 16]
        assert sample["position"].tolist() == [-1, *range(16)]
        assert [parse_tile_id(name)[1] for name in sample["tile_id"]][1:] == LADDER.children(parent)
        assert (status[sample["tile_id"]] != "edge").all()
        assert status[sample_id] == "ok"
        assert kind == LADDER.transition(len(parent) - 2)
    usable = table[(table["status"] == "ok") & (table["label"] != "Background")]
    alone = rows[rows["role"] == "standalone"]
    assert set(usable["tile_id"]) <= set(alone["tile_id"])
    assert not (status[alone["tile_id"]] == "edge").any()


@pytest.fixture(scope="module")
def two_slides() -> dict[str, pd.DataFrame]:
    return {"S1": slide_table("S1", 0), "S2": slide_table("S2", 1).assign(split="test")}


@settings(max_examples=15)
@given(pairs=st.integers(0, 30), alone=st.integers(0, 30))
def test_caps_hold_per_kind_class_and_split(two_slides: dict[str, pd.DataFrame], pairs: int, alone: int) -> None:
    chosen = select(two_slides, {"10x-40x": pairs, "40x": alone}, test_share=0.5)
    for (kind, split, label), count in chosen.groupby(["kind", "split", "label"]).size().items():
        cap = {"10x-40x": pairs, "40x": alone}.get(kind, 10**9)
        assert label == UNLABELLED or count <= (cap if split == "train" else np.ceil(cap / 2))


def test_adding_a_slide_reshuffles_nobody() -> None:
    """Ranks of the old slides stay, and what is selected of them is the best-ranked part of what was selected before."""
    old = {name: slide_table(name, n) for n, name in enumerate(["S1", "S2"])}
    caps = {"10x-40x": 10, "40x": 25, "10x": 8, "2.5x": 1, "2.5x-10x": 1}
    before, after = select(old, caps), select({**old, "S3": slide_table("S3", 9)}, caps)
    for (kind, label), now in after[after["slide_id"] != "S3"].groupby(["kind", "label"]):
        then = before[(before["kind"] == kind) & (before["label"] == label)].sort_values("rank")
        assert now.sort_values("rank")["tile_id"].tolist() == then["tile_id"].tolist()[: len(now)]
    assert (hash_rank(pd.Series(["a", "b"]), 1) != hash_rank(pd.Series(["a", "b"]), 2)).all()


def test_without_a_background_class_every_usable_parent_is_a_candidate() -> None:
    table = slide_table("S", 0)
    found = candidates(table, LADDER, seed=0, background=None, background_pairs=False)
    assert (found["kind"] == "10x-40x").sum() == ((table["magnification"] == 10) & (table["status"] == "ok")).sum() > 0


def test_unlabelled_tiles_have_a_cap_of_their_own() -> None:
    table = slide_table("S", 0).assign(label=pd.NA)
    found = candidates(table, LADDER, seed=0, background="Background", background_pairs=False)
    assert set(found["label"]) == {UNLABELLED}
    assert under_caps(found, {}, 4, 1.0).groupby("kind").size().max() == 4


@pytest.mark.parametrize("count", [6, 7, 12, 40])
def test_blocks_are_contiguous_with_a_guard_between(count: int) -> None:
    split = block_split(np.arange(count), count, {"train": 0.6, "val": 0.0, "test": 0.4}, guard=1)
    text = "".join({"train": "T", "test": "t", None: "."}[name] for name in split)
    head, tail = text.split(".")
    assert set(head) == {"T"} and set(tail) == {"t"}
    assert abs(len(head) - 0.6 * (count - 1)) <= 0.5
