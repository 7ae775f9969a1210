"""Controls read tiles of their own split and slide alone, show what they say, and are functions of (seed, n)."""

import tempfile
from dataclasses import replace
from pathlib import Path

import fakes
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mad.config import load_config
from mad.config.training import RunConfig
from mad.files import MadError
from mad.training import views
from mad.training.data import TrainingSet, batches
from mad.training.index import Pairs, load_index
from mad.training.tile_reader import TileReader

TRIPLE = "2.5x-10x-40x"
PLAIN = {"jitter": 0, "grayscale": 0, "blur": [0, 0, 0], "solarize": 0}
CONTROLS = {
    "aligned": {},
    "shuffled": {"pairs": "shuffled"},
    "interpolated": {"pairs": "interpolated"},
    "same": {"pairs": "same"},
    "tri": {"mix": {TRIPLE: 1}},
    "tri-shuffled": {"mix": {TRIPLE: 1}, "pairs": "shuffled"},
    "one transition": {"mix": {"10x-40x": 1}},
    "within": {"mix_mode": "within"},
}


def family(slide, number, parents_at_10x, split, fine_split):
    """Rows of one 2.5x parent, of its children, and of those 10x parents among them with their own children."""
    keys = {f"{slide}_L0_0_{number}": ("2.5x-10x", split)}
    keys |= {f"{slide}_L1_0_{number}_{k}": ("10x-40x", fine_split) for k in parents_at_10x}
    rows = []
    for key, (kind, side) in keys.items():
        coarse, fine = kind.split("-")
        child = key.replace("_L1_", "_L2_").replace("_L0_", "_L1_")
        members = [(key, "parent", -1, coarse)] + [(f"{child}_{k}", "child", k, fine) for k in range(16)]
        for tile, role, position, magnification in members:
            shard, mpp = f"{slide}/{side}-{kind}-000000.tar", float(magnification[:-1])
            rows.append((tile, kind, role, key, position, side, mpp, shard, 0, 1, tile, "ok"))
    return rows


COLUMNS = ["tile_id", "kind", "role", "sample_id", "position", "split", "magnification"]
COLUMNS += ["shard", "offset", "size", "sha256", "status"]


@st.composite
def cohorts(draw):
    """Shard tables of up to three slides, by slide; splits by block, and now and then across a parent and its child."""
    tables = {}
    for slide in ("A_x", "B", "C")[: draw(st.integers(1, 3))]:
        rows = family(slide, 99, [0, 5], "train", "train")
        for number in range(draw(st.integers(0, 3))):
            cells = sorted(draw(st.sets(st.integers(0, 15), max_size=3)))
            sides = st.sampled_from(["train", "train", "val"])
            rows += family(slide, number, cells, draw(sides), draw(sides))
        table = pd.DataFrame(rows, columns=COLUMNS)
        lost = draw(st.sets(st.integers(0, len(table) - 1), max_size=8))
        table.loc[sorted(lost), "status"] = "unreadable"
        tables[slide] = table
    return tables


class Recorder(TileReader):
    """Pixels made from a row's number instead of a tar's; remembers what was read."""

    def __init__(self, index, tile_px):
        super().__init__(index, tile_px)
        self.seen = []

    def read(self, row):
        self.seen.append(row)
        return np.random.default_rng(row).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def recorded(index, control, **changes):
    run = RunConfig(**fakes.tiny_run(**({"steps": 6} | CONTROLS[control] | changes)))
    data = TrainingSet(index, run, 8, 8, 5)
    data.reader = Recorder(index, 8)
    return data


@settings(max_examples=40, deadline=None)
@given(cohorts(), st.sampled_from(sorted(CONTROLS)))
def test_every_control_reads_the_training_split_of_the_slide_that_it_claims(tables, control):
    whole = pd.concat([table.assign(slide=slide) for slide, table in tables.items()], ignore_index=True)
    split_of = whole.groupby("tile_id")["split"].agg(set)
    with tempfile.TemporaryDirectory() as folder:
        for slide, table in tables.items():
            table.to_parquet(Path(folder) / f"{slide}.parquet")
        index = load_index(folder, "train", 4)
    try:
        data, twin = recorded(index, control), recorded(index, control)
    except MadError as error:
        assert any(words in str(error) for words in ("no samples of kind", "two parents", "no readable sample"))
        return
    rows = index.rows
    for n in range(24):
        (view,) = data[n]
        read = rows.loc[data.reader.seen]
        data.reader.seen.clear()
        assert {"train"} == set(read["split"]) and all("train" in split_of[tile] for tile in read["tile_id"])
        assert set(read["status"]) == {"ok"} and read["slide"].nunique() == 1
        assert set(view.tiles) == set(read["tile_id"]) and len(view.student) == 4
        (other,) = twin[n]
        assert view.tiles == other.tiles
        np.testing.assert_array_equal(view.student, other.student)
        assert view.tiles[0].startswith(read["slide"].iloc[0] + "_L")
        check_family(control, view.tiles, read, data.order[n][0])


def check_family(control, tiles, read, kind):
    parents, children = read[read["role"] == "parent"], read[read["role"] == "child"]
    if control == "same":
        assert len(tiles) == 1
    elif control == "interpolated":
        assert tiles == tuple(parents["tile_id"]) and children.empty
    elif control.startswith("tri"):
        top, middle, finest = tiles[0], tiles[1:3], tiles[3:]
        assert [tile.rsplit("_", 1)[0].replace("_L2_", "_L1_") for tile in finest] == list(middle)
        above = {tile.rsplit("_", 1)[0].replace("_L1_", "_L0_") for tile in middle}
        assert (top in above) == (control == "tri") and len(above) == 1 and len(set(middle)) == 2
    else:
        assert set(read["kind"]) == {kind} and len(set(tiles)) == 5
        assert children["sample_id"].nunique() == 1
        assert (children["sample_id"].iloc[0] == tiles[0]) == (control != "shuffled")
    if control == "one transition":
        assert kind == "10x-40x"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two slides with pixels in which several children of a parent are parents; a third with one parent alone."""
    folder = tmp_path_factory.mktemp("shard")
    rng = np.random.default_rng(0)
    for slide, count in (("S01", 3), ("S02", 2), ("S03", 1)):
        table = pd.DataFrame(
            [row for n in range(count) for row in family(slide, n, [1, 4, 9], "train", "train")], columns=COLUMNS
        )
        rows = []
        for kind, members in table.groupby("kind"):
            columns = ["tile_id", "role", "sample_id", "position", "magnification"]
            images = [(*row, fakes.texture(rng, fakes.TILE_PX)) for row in members[columns].itertuples(index=False)]
            rows += fakes._write_tar(folder, slide, "train", kind, images)
        pd.DataFrame(rows).to_parquet(folder / f"{slide}.parquet")
    return load_index(folder, "train", 4)


def training_set(index, control, **changes):
    run = RunConfig(**fakes.tiny_run(**({"steps": 4} | CONTROLS[control] | changes)))
    return TrainingSet(index, run, fakes.TILE_PX, 16, 5)


def tensors(batch):
    return [t for group in batch.groups for t in (group.teacher, group.student, group.local) if t is not None]


@pytest.mark.parametrize("control", sorted(CONTROLS))
def test_controls_do_not_depend_on_processes_loaders_or_resumption(cohort, control):
    data = training_set(cohort, control)
    whole = list(batches(data, start=0, rank=0, world=1, workers=0))
    halves = [list(batches(data, start=0, rank=rank, world=2, workers=0)) for rank in (0, 1)]
    again = training_set(cohort, control)
    resumed = list(batches(again, start=2, rank=0, world=1, workers=0))
    loaded = list(batches(again, start=0, rank=0, world=1, workers=2))
    for step, batch in enumerate(whole):
        assert batch.tiles == [tile for rank in (0, 1) for tile in halves[rank][step].tiles]
        (group,), parts = batch.groups, [halves[rank][step].groups[0] for rank in (0, 1)]
        assert torch.equal(torch.cat([part.student for part in parts]), group.student)
        for twin in (loaded[step], resumed[step - 2] if step >= 2 else batch):
            assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(twin), strict=True))


def test_children_are_drawn_as_numpy_permutes_those_that_are_there(cohort):
    children = cohort.pairs["10x-40x"].children.copy()
    children[0, [2, 7, 15]] = -1
    index = replace(cohort, pairs={"10x-40x": Pairs(cohort.pairs["10x-40x"].parents, children)})
    pairing = training_set(index, "one transition").pairing
    for place, row in enumerate(children):
        wanted = np.random.default_rng(place).permutation(row[row >= 0])[:4].tolist()
        assert pairing.draw("10x-40x", place, np.random.default_rng(place))[1] == wanted


def test_shuffled_leaves_out_the_only_parent_of_a_slide_and_says_so(cohort, capfd):
    data = training_set(cohort, "shuffled", mix={"2.5x-10x": 1}, steps=40)
    assert data.counts == {"2.5x-10x": 5} and data.skipped == {"2.5x-10x": 1}
    assert "alone in their slide: {'2.5x-10x': 1}" in capfd.readouterr().err
    drawn = [data[n][0].tiles for n in range(160)]
    assert not any(tile.startswith("S03") for tiles in drawn for tile in tiles)
    donors = {(tiles[0], tiles[1].rsplit("_", 1)[0].replace("_L1_", "_L0_")) for tiles in drawn}
    assert len(donors) == 3 * 2 + 2 * 1  # every parent with every other of its slide
    assert all(own != donor for own, donor in donors)
    weights = training_set(cohort, "shuffled").weights  # kinds mix as in the aligned run
    assert weights == training_set(cohort, "aligned").weights == {"2.5x-10x": 6.0, "10x-40x": 18.0}


def test_shuffled_where_every_parent_is_alone_is_an_error(cohort, tmp_path):
    table = cohort.rows[(cohort.rows["slide"] == "S03") & (cohort.rows["kind"] == "2.5x-10x")]
    table.to_parquet(tmp_path / "S03.parquet")
    with pytest.raises(MadError, match=r"no slide has two parents of kind '2\.5x-10x'"):
        training_set(load_index(tmp_path, "train", 4), "shuffled")


def test_shuffled_and_aligned_show_the_same_parents_in_the_same_order(cohort):
    aligned, shuffled = (training_set(cohort, c, mix={"10x-40x": 1}) for c in ("aligned", "shuffled"))
    assert [aligned[n][0].tiles[0] for n in range(16)] == [shuffled[n][0].tiles[0] for n in range(16)]


def test_interpolated_shows_the_places_of_the_aligned_children_in_the_parents_pixels(cohort):
    aligned, interpolated = (training_set(cohort, c, photometric=PLAIN) for c in ("aligned", "interpolated"))
    for n in range(8):
        tiles, view = aligned[n][0].tiles, interpolated[n][0]
        rows = cohort.rows[(cohort.rows["sample_id"] == tiles[0])].set_index("tile_id")
        parent = aligned.reader.read(int(np.flatnonzero(cohort.rows["tile_id"] == tiles[0])[0]))
        for tile, shown in zip(tiles[1:], view.student, strict=True):
            row, column = divmod(int(rows.loc[tile, "position"]), 4)
            cell = parent[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].astype(float)
            assert np.abs(shown.mean(axis=(0, 1)) - cell.mean(axis=(0, 1))).max() < 3
        assert view.tiles == tiles[:1]


def test_same_shows_one_whole_tile_to_both_networks_and_keeps_the_share_of_parents(cohort):
    data = training_set(cohort, "same", mix={"10x-40x": 1}, photometric=PLAIN, steps=100)
    levels = []
    for n in range(400):
        (view,) = data[n]
        levels.append(view.tiles[0].split("_")[1])
        colours = [np.sort(image.reshape(-1, 3), axis=0) for image in (*view.teacher, *view.student)]
        assert all(np.array_equal(colours[0], other) for other in colours)
    assert levels.count("L1") / 400 == pytest.approx(2 / 6, abs=0.06)


def test_triples_show_two_scales_under_one_parent_and_only_where_they_are_asked_for(cohort):
    data = training_set(cohort, "tri")
    assert data.counts == {TRIPLE: 6}
    assert TRIPLE not in training_set(cohort, "aligned").weights
    both = training_set(cohort, "tri", mix={TRIPLE: 1, "10x-40x": 1})
    assert both.counts == {TRIPLE: 6, "10x-40x": 18}
    for n in range(8):
        assert [tile.split("_")[1] for tile in data[n][0].tiles] == ["L0", "L1", "L1", "L2", "L2"]
    with pytest.raises(MadError, match="no samples of kind '5x-10x-40x'"):
        training_set(cohort, "tri", mix={"5x-10x-40x": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dinov2", "pairs": "shuffled"}, "changes nothing under method 'dinov2'"),
        ({"pairs": "shuffled", "mix": {"standalone": 1}}, "`mix` has no pairs"),
        ({"targets": "cell", "mix": {"standalone": 1, "10x-40x": 0}}, "`mix` has no pairs"),
        ({"pair_tiles": "all"}, "'all' changes nothing under method 'mad'; take dinov2"),
        ({"centre_momentum": 0.5}, "0.5 changes nothing under centring 'sinkhorn'; take ema"),
        ({"kde_kappa": 2.0}, "2.0 changes nothing under spread 'koleo'; take kde"),
        ({"teacher_temp_start": 0.01}, "changes nothing without teacher_temp_warmup"),
        ({"teacher_temp_warmup": 1000}, "must not be longer than steps"),
        ({"ema": 1, "ema_end": 1}, "would never learn"),
        ({"lr": 1e-4, "min_lr": 1e-3}, r"min_lr \(0.001\) is the end of a decline"),
        ({"lr": float("inf")}, "finite number"),
        ({"photometric": {"blur": [2, 0, 1]}}, "less than or equal to 1"),
        ({"backbone": {"model": "m", "args": {"global_pool": "avgmax"}}}, "global_pool is set by backbone.pooling"),
        ({"backbone": {"model": "m", "mean": [0.5, 0.5, 0.5]}}, "mean and std go together"),
        ({"mix": {TRIPLE: 1}, "children": 3}, "even number of children"),
        ({"mix": {TRIPLE: 1}, "pairs": "interpolated"}, "other than 'interpolated'"),
    ],
)
def test_controls_without_effect_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig(**fakes.tiny_run(**changes))


@pytest.mark.parametrize(("side", "step"), [(32, 4), (30, 4), (20, 2)])
def test_enlarged_cells_tile_the_parent(side, step):
    ramp = np.zeros((side, side, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(side) * 8, np.arange(side)[:, None] * 8
    for position in range(step * step):
        cell = views.enlarged_cell(ramp, position, step).astype(float)
        assert cell.shape == (side, side, 3)
        centre = ((np.array(divmod(position, step)) + 0.5) * side / step - 0.5) * 8
        assert np.abs(cell.mean(axis=(0, 1))[[1, 0]] - centre).max() <= 5


def test_the_shipped_controls_are_the_demo_s_runs_with_the_keys_that_they_name():
    root = Path(__file__).parents[1]
    demo, controls = (load_config(root / path) for path in ("config.yaml", "configs/controls.yaml"))
    runs = {run.name: run.model_dump() for run in controls.runs}
    for name in ("mad", "dinov2"):
        assert runs[name] == demo.run(name).model_dump()
    differing = {name: {key for key in run if run[key] != runs["mad"][key]} - {"name"} for name, run in runs.items()}
    pairs = {name: {"pairs"} for name in ("shuffled", "interpolated", "same")}
    mixes = {"tri": {"mix"}, "one-transition": {"mix"}, "within": {"mix_mode"}}
    methods = {"dinov2": {"method"}, "mad_global": {"method"}}
    assert differing == {"mad": set()} | methods | pairs | mixes
