"""Selection: caps, stability, completeness of pairs, blocks."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mad.config import parse_config
from mad.files import MadError, write_parquet
from mad.slides.scale import plan_scale
from mad.slides.sheet import write_sheet
from mad.stages import sample
from mad.tiles.index import empty_table, tile_columns, tile_table
from mad.tiles.pyramid import Grid, Ladder, parse_tile_id
from mad.tiles.sampling import (
    COLUMNS,
    UNLABELLED,
    Caps,
    Limits,
    block_split,
    candidates,
    expand,
    first_children,
    hash_rank,
)

LADDER = Ladder((2.5, 10.0, 40.0))
CLASSES = ["A", "Background"]
OPTIONS = {"seed": 3, "background": "Background", "background_pairs": False}


def slide_table(slide: str, seed: int, width: int = 2 * 1792 + 300, height: int = 1792) -> pd.DataFrame:
    """A tile table with random tissue and classes; its right-hand tiles cross the border."""
    rng = np.random.default_rng(seed)
    grid = Grid(LADDER, 112.0, width, height)
    plan = plan_scale(
        mpp=0.25, level_downsamples=[1, 4, 16], longer_px=width, magnifications=LADDER.magnifications, tile_px=112
    )
    shape = grid.level_shape(2)
    tissue = (rng.random(shape) < 0.8).astype(np.int64)
    labels = np.stack([tissue * (rng.random(shape) < 0.9), 1 - tissue], axis=-1).astype(np.int64)
    table = tile_table(slide, grid, plan, tissue, labels, (1, 1), CLASSES, min_tissue=0.1, min_annotated=0.5)
    return table.assign(split="train")


def select(tables: dict[str, pd.DataFrame], caps: Caps) -> pd.DataFrame:
    """The selection of a cohort, as its stage makes it: tile_id beside the columns of `candidates`."""
    limits = Limits(caps)
    found = {slide: limits.add(candidates(table, LADDER, **OPTIONS)) for slide, table in tables.items()}
    parts = [
        limits.select(rows).pipe(
            lambda part, ids: part.assign(tile_id=ids.take(part["row"]).array), tables[slide]["tile_id"]
        )
        for slide, rows in found.items()
    ]
    return pd.concat([part.astype(dict.fromkeys(("kind", "split", "label"), "string")) for part in parts])


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
    rows = expand(candidates(table, LADDER, **OPTIONS), table["tile_id"], LADDER)
    assert list(rows.columns) == COLUMNS
    status = table.set_index("tile_id")["status"]
    for (kind, _, sample_id), family in rows[rows["kind"].str.contains("-")].groupby(["kind", "split", "sample_id"]):
        parent = parse_tile_id(sample_id)[1]
        assert family["role"].tolist() == ["parent", *["child"] * 16]
        assert family["position"].tolist() == [-1, *range(16)]
        assert [parse_tile_id(name)[1] for name in family["tile_id"]][1:] == LADDER.children(parent)
        assert (status[family["tile_id"]] != "edge").all()
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
@given(pairs=st.integers(0, 30), alone=st.integers(0, 30), background=st.none() | st.integers(0, 9))
def test_the_best_ranked_of_each_kind_class_and_split_are_selected(
    two_slides: dict[str, pd.DataFrame], pairs: int, alone: int, background: int | None
) -> None:
    """Slide by slide gives what sorting the whole cohort would give; the order of the slides does not matter."""
    caps = Caps({"10x-40x": pairs, "40x": {"A": alone, "Background": background}}, 7, 0.5)
    chosen = select(two_slides, caps)
    whole = select(two_slides, Caps({}))
    for (kind, split, label), rows in whole.groupby(["kind", "split", "label"]):
        cap = {"10x-40x": pairs, "40x": alone if label == "A" else background}.get(kind)
        cap = 7 if label == UNLABELLED else cap
        cap = len(rows) if cap is None else cap if split == "train" else -(-cap // 2)
        mine = chosen[(chosen["kind"] == kind) & (chosen["split"] == split) & (chosen["label"] == label)]
        assert set(mine["tile_id"]) == set(rows.sort_values("rank")["tile_id"][:cap])
    assert set(select(dict(reversed(two_slides.items())), caps)["tile_id"]) == set(chosen["tile_id"])


def test_adding_a_slide_reshuffles_nobody() -> None:
    """Ranks of the old slides stay, and what is selected of them is the best-ranked part of what was selected before."""
    old = {name: slide_table(name, n) for n, name in enumerate(["S1", "S2"])}
    caps = Caps({"10x-40x": 10, "40x": 25, "10x": 8, "2.5x": 1, "2.5x-10x": 1})
    before, after = select(old, caps), select({**old, "S3": slide_table("S3", 9)}, caps)
    for (kind, label), now in after[~after["tile_id"].str.startswith("S3")].groupby(["kind", "label"]):
        then = before[(before["kind"] == kind) & (before["label"] == label)].sort_values("rank")
        assert now.sort_values("rank")["tile_id"].tolist() == then["tile_id"].tolist()[: len(now)]


def test_ranks_stay_as_they_are() -> None:
    """Other ranks would be another selection, and every shard would be cut anew."""
    assert hash_rank(["S01_L2_0_0_3_9", "a"], 0).tolist() == [8803472503578182074, 4699331762285919882]
    assert (hash_rank(["a", "b"], 1) != hash_rank(["a", "b"], 2)).all()
    assert hash_rank([], 1).tolist() == []


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 4000),
    ladder=st.sampled_from([(2.5, 10, 40), (5, 10, 20), (10, 40)]),
)
@settings(max_examples=25)
def test_a_tile_lies_inside_the_slide_where_all_of_its_children_do(
    width: int, height: int, ladder: tuple[float, ...]
) -> None:
    """So a pair is complete or its parent is an edge tile: there is no policy to choose."""
    steps = Ladder(tuple(map(float, ladder)))
    grid = Grid(steps, 112.0, width, height)
    plan = plan_scale(
        mpp=10 / ladder[-1], level_downsamples=[1], longer_px=width, magnifications=steps.magnifications, tile_px=112
    )
    cells = np.ones((*grid.level_shape(len(steps) - 1), 1), np.int64)
    table = tile_table("S", grid, plan, cells[..., 0], cells, (1, 1), ["A"], min_tissue=0, min_annotated=0.5)
    coarse = table["tile_id"].isin(table["parent_id"].dropna())
    first = pd.Series(first_children(table, steps), table["tile_id"])
    assert ((first >= 0).to_numpy() == (coarse & (table["status"] != "edge")).to_numpy()).all()
    for parent, row in first[first >= 0].items():
        count = len(steps.children(parse_tile_id(str(parent))[1]))
        assert (table["parent_id"][row : row + count] == parent).all()
        assert table["tile_id"][row].endswith("_0")


def test_standalone_tiles_are_drawn_independently_of_pairs() -> None:
    """MAD paper, Methods: a standalone tile may be a parent or a child as well; background is standalone alone."""
    table = slide_table("S", 1)
    rows = expand(candidates(table, LADDER, **OPTIONS), table["tile_id"], LADDER)
    alone = set(rows.loc[rows["role"] == "standalone", "tile_id"])
    assert alone & set(rows.loc[rows["role"] == "parent", "tile_id"])
    assert alone & set(rows.loc[rows["role"] == "child", "tile_id"])
    label = table.set_index("tile_id")["label"]
    assert "Background" in set(label[list(alone)])
    assert "Background" not in set(label[rows.loc[rows["role"] == "parent", "tile_id"]])


def test_background_parents_make_pairs_where_that_is_wanted() -> None:
    table = slide_table("S", 1)
    table["label"] = table["label"].mask(table["magnification"] == 10, "Background")
    kinds = {
        wanted: set(candidates(table, LADDER, **{**OPTIONS, "background_pairs": wanted})["kind"].astype(str))
        for wanted in (True, False)
    }
    assert kinds[True] - kinds[False] == {"10x-40x"}


def test_without_a_background_class_every_usable_parent_is_a_candidate() -> None:
    table = slide_table("S", 0)
    found = candidates(table, LADDER, seed=0, background=None, background_pairs=False)
    assert (found["kind"] == "10x-40x").sum() == ((table["magnification"] == 10) & (table["status"] == "ok")).sum() > 0


def test_unlabelled_tiles_have_a_cap_of_their_own() -> None:
    chosen = select({"S": slide_table("S", 0).assign(label=pd.array([pd.NA], "string")[0])}, Caps({}, 4))
    assert set(chosen["label"]) == {UNLABELLED} and chosen.groupby("kind").size().max() == 4


def test_an_empty_slide_gives_an_empty_selection() -> None:
    table = empty_table(CLASSES).assign(split=[])
    rows = expand(candidates(table, LADDER, **OPTIONS), table["tile_id"], LADDER)
    full = slide_table("S", 0)
    assert rows.empty and rows.dtypes.equals(
        expand(candidates(full, LADDER, **OPTIONS), full["tile_id"], LADDER).dtypes
    )


@pytest.mark.parametrize("count", [6, 7, 12, 40])
def test_blocks_are_contiguous_with_a_guard_between(count: int) -> None:
    split = block_split(np.arange(count), count, {"train": 0.6, "val": 0.0, "test": 0.4}, guard=1)
    text = "".join({"train": "T", "test": "t", None: "."}[name] for name in split)
    head, tail = text.split(".")
    assert set(head) == {"T"} and set(tail) == {"t"}
    assert abs(len(head) - 0.6 * (count - 1)) <= 0.5


def test_what_the_border_cuts_off_goes_with_the_last_block() -> None:
    split = block_split(np.array([0, 9, 10]), 10, {"train": 0.5, "val": 0.0, "test": 0.5}, guard=1)
    assert split.tolist() == ["train", "test", "test"]


def test_the_stage_gives_the_same_bytes_in_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["S1", "S2", "S3"]
    write_sheet(tmp_path / "slides.tsv", [{"slide_id": s, "path": f"{s}.svs", "patient_id": s} for s in names])
    monkeypatch.setattr(sample, "SLIDES_PER_PROCESS", 1)
    written = []
    for processes in (1, 2):
        config = parse_config(
            {
                "results": str(tmp_path / str(processes)),
                "cohort": {"sheet": str(tmp_path / "slides.tsv"), "split": {"train": 1, "val": 0, "test": 0}},
                "label": {"classes": CLASSES},
                "sample": {"max_pairs": {"10x-40x": {"A": 9}}, "max_standalone": {"40x": 20}},
            }
        )
        for number, name in enumerate(names):
            table = slide_table(name, number).drop(columns="split")
            write_parquet(tmp_path / str(processes) / "tile" / f"{name}.parquet", table)
        monkeypatch.setenv("OMP_NUM_THREADS", str(processes))
        sample.run(config)
        written.append([(tmp_path / str(processes) / "sample" / f"{name}.parquet").read_bytes() for name in names])
    assert written[0] == written[1]
    selected = pd.concat(pd.read_parquet(tmp_path / "1" / "sample" / f"{name}.parquet") for name in names)
    heads = selected[selected["role"] != "child"].groupby(["kind", "label"]).size()
    assert heads["10x-40x", "A"] == 9 and heads["40x", "A"] == heads["40x", "Background"] == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pairs": {"10x-20x": 3}}, r"max_pairs names \['10x-20x'\]; the ladder"),
        ({"max_standalone": {"40x": {"Gray": 3}}}, r"max_standalone names \['Gray'\]; label.classes has"),
    ],
)
def test_caps_of_what_there_is_not_are_named(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(MadError, match=message):
        parse_config({"results": str(tmp_path), "sample": options})


def test_caps_of_a_file_that_is_merged_over_are_taken_away_by_null(tmp_path: Path) -> None:
    ladder = {"magnifications": [5, 20]}
    caps = {"max_standalone": {"2.5x": None, "10x": None, "40x": None, "5x": 3}}
    assert parse_config({"results": str(tmp_path), "tile": ladder, "sample": caps}).sample.max_standalone["5x"] == 3
