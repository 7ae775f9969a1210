"""Sample n is a pure function of (seed, n), whatever the number of processes and loaders; children are the parent's own."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import fakes
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import heed_permissions

from mad.config.training import RunConfig
from mad.files import MadError
from mad.tiles.shards import decode, encode
from mad.training.data import TrainingSet, batches
from mad.training.index import load_index
from mad.training.tile_reader import TileReader


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    fakes.write_cohort(folder)
    return folder


def training_set(results, seed=5, **changes):
    run = RunConfig(**fakes.tiny_run(**changes))
    return TrainingSet(load_index(results / "shard", "train", run.children), run, fakes.TILE_PX, 16, seed)


def test_the_passes_of_a_long_run_are_not_listed(results):
    data = training_set(results, steps=200_000)
    tracemalloc.start()
    first = next(batches(data, start=0, rank=0, world=1, workers=0, passes=4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first.tiles == data.__getitems__([0]).tiles
    assert peak < 8e6


def tensors(batch):
    return [t for group in batch.groups for t in (group.teacher, group.student, group.local) if t is not None]


def test_index_holds_only_the_split_and_pairs_children_with_their_parent(results):
    index = load_index(results / "shard", "train", 4)
    assert index.counts() == {"2.5x-10x": 16, "10x-40x": 16, "standalone": 24}
    assert set(index.rows["split"]) == {"train"}
    rows = index.rows
    for kind, pairs in index.pairs.items():
        assert pairs.children.shape == (16, 16)
        for parent, children in zip(pairs.parents, pairs.children, strict=True):
            assert rows.loc[parent, "role"] == "parent"
            assert set(rows.loc[children, "sample_id"]) == {rows.loc[parent, "sample_id"]}
            assert rows.loc[children, "position"].tolist() == list(range(16))
            assert set(rows.loc[children, "kind"]) == {kind}


def test_digest_follows_pixels_and_selection_but_not_the_place_in_the_tar(results, tmp_path):
    before = load_index(results / "shard", "train", 4).digest
    table = pd.read_parquet(results / "shard" / "S01.parquet")

    def digest(changed):
        (tmp_path / "S02.parquet").write_bytes((results / "shard" / "S02.parquet").read_bytes())
        changed.to_parquet(tmp_path / "S01.parquet")
        return load_index(tmp_path, "train", 4).digest

    assert digest(table.assign(offset=table["offset"] + 512)) == before
    assert digest(table.assign(sha256=table["sha256"].str[::-1])) != before
    assert digest(table.iloc[:-1]) != before


def test_unreadable_children_are_never_drawn_and_poor_pairs_left_out(results, tmp_path):
    table = pd.read_parquet(results / "shard" / "S01.parquet")
    first = table.loc[table["kind"] == "10x-40x", "sample_id"].iloc[0]
    lost = (table["sample_id"] == first) & (table["role"] == "child") & (table["position"] >= 4)
    table.loc[lost, "status"] = "unreadable"
    table.to_parquet(tmp_path / "S01.parquet")
    index = load_index(tmp_path, "train", 4)
    place = index.rows.loc[index.pairs["10x-40x"].parents, "sample_id"].tolist().index(first)
    assert (index.pairs["10x-40x"].children[place] >= 0).sum() == 4
    data = TrainingSet(index, RunConfig(**fakes.tiny_run()), fakes.TILE_PX, 16, 0)
    for seed in range(20):
        _, drawn = data.pairing.draw("10x-40x", place, np.random.default_rng(seed))
        assert sorted(index.rows.loc[drawn, "position"]) == [0, 1, 2, 3]
    assert load_index(tmp_path, "train", 5).counts()["10x-40x"] == 7


def test_children_are_the_parents_own_distinct_and_drawn_anew(results):
    data = training_set(results, steps=40)
    rows = data.index.rows
    drawn = {}
    for n in range(160):
        kind, place = data.order[n]
        if kind == "standalone":
            continue
        parent, *children = data[n][0].tiles
        own = rows[(rows["kind"] == kind) & (rows["role"] == "child") & (rows["sample_id"] == parent)]["tile_id"]
        assert len(set(children)) == 4
        assert set(children) <= set(own)
        drawn.setdefault((kind, place), set()).add(tuple(children))
    assert any(len(draws) > 1 for draws in drawn.values())


def test_both_methods_draw_the_same_tiles_and_dinov2_crops_one_of_them(results):
    mad, dino, every = (
        training_set(results, **c) for c in ({}, {"method": "dinov2"}, {"method": "dinov2", "pair_tiles": "all"})
    )
    for n in range(40):
        tiles = mad[n][0].tiles
        assert tuple(view.tiles[0] for view in every[n]) == tiles
        assert len(dino[n]) == 1
        assert dino[n][0].tiles[0] in tiles


def test_dinov2_sees_the_magnifications_in_mads_proportion(results):
    data = training_set(results, method="dinov2", mix={"10x-40x": 1}, steps=100)
    levels = [data[n][0].tiles[0].split("_")[1] for n in range(400)]
    assert levels.count("L1") / 400 == pytest.approx(2 / 6, abs=0.06)  # 2 of mad's 6 views are of the parent


@pytest.mark.parametrize("mode", ["alternate", "within"])
def test_batches_do_not_depend_on_processes_or_loaders(results, mode):
    data = training_set(results, mix_mode=mode, steps=6)
    whole = list(batches(data, start=0, rank=0, world=1, workers=0))
    loaded = list(batches(data, start=0, rank=0, world=1, workers=2))
    halves = [list(batches(data, start=0, rank=rank, world=2, workers=0)) for rank in (0, 1)]
    resumed = list(batches(data, start=4, rank=0, world=1, workers=0))
    for step, batch in enumerate(whole):
        assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(loaded[step]), strict=True))
        parts = {group.kind: [] for group in batch.groups}
        for rank in (0, 1):
            for group in halves[rank][step].groups:
                parts[group.kind].append(group.teacher)
        for group in batch.groups:
            assert torch.equal(torch.cat(parts[group.kind]), group.teacher)
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole[4]), tensors(resumed[0]), strict=True))
    assert any(len(batch.groups) > 1 for batch in whole) == (mode == "within")


def test_another_seed_is_another_order_with_other_views(results):
    first, same, other = training_set(results, seed=5), training_set(results, seed=5), training_set(results, seed=6)
    assert [first.order[n] for n in range(40)] == [same.order[n] for n in range(40)]
    assert [first.order[n] for n in range(40)] != [other.order[n] for n in range(40)]
    np.testing.assert_array_equal(first[7][0].teacher, same[7][0].teacher)


def test_reader_never_makes_up_pixels(results, tmp_path):
    index = load_index(results / "shard", "train", 4)
    with pytest.raises(MadError, match=index.rows["tile_id"][0]):
        TileReader(index, fakes.TILE_PX + 1).read(0)
    shutil.copytree(results / "shard", tmp_path / "shard")
    index = load_index(tmp_path / "shard", "train", 4)
    path, row = tmp_path / "shard" / index.rows["shard"][0], index.rows.loc[0]
    intact = path.read_bytes()
    for place in (0, row["size"] // 2):  # no image any more; an image of other pixels
        damaged = bytearray(intact)
        damaged[row["offset"] + place] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(MadError, match=f"{path.name}: tile {row['tile_id']} .*no readable image"):
            TileReader(index, fakes.TILE_PX).read(0)
    path.write_bytes(intact)
    reader = TileReader(index, fakes.TILE_PX)
    reader.read(0)
    path.write_bytes(intact[: row["offset"] + row["size"] // 2])  # the rest is still in memory
    with pytest.raises(MadError, match="no readable image"):
        reader.read(0)
    (tmp_path / "shard" / index.rows["shard"][0]).write_bytes(b"")
    with pytest.raises(MadError, match="no readable image"):
        TileReader(index, fakes.TILE_PX).read(0)
    (tmp_path / "shard" / index.rows["shard"][0]).unlink()
    with pytest.raises(MadError, match="cut this slide's shards again"):
        TileReader(index, fakes.TILE_PX).read(0)


@pytest.mark.parametrize(
    ("imported", "read"),
    [
        (
            "mad.training.index import *\nfrom mad.training.tile_reader",
            f"TileReader(load_index(sys.argv[1], 'train', 4), {fakes.TILE_PX}).read(0)",
        ),
        ("mad.training.stream", "next(resampled({sys.argv[2]: 3}, 4, np.random.default_rng(0)))"),
    ],
)
def test_a_tar_that_may_not_be_read_is_not_to_be_cut_again(results, tmp_path, imported, read):
    shutil.copytree(results / "shard", tmp_path / "shard")
    path = tmp_path / "shard" / load_index(tmp_path / "shard", "train", 4).rows["shard"][0]
    path.chmod(0)
    ask = f"import sys\nfrom {imported} import *\ntry: {read}\nexcept MadError as error: print(error)"
    command = [sys.executable, "-c", ask, str(tmp_path / "shard"), str(path)]
    done = subprocess.run(command, preexec_fn=heed_permissions, capture_output=True, text=True)
    assert done.returncode == 0 and "Permission denied" in done.stdout + done.stderr, done.stderr
    assert "mend its permissions" in done.stdout + done.stderr
    assert "cut this slide" not in done.stdout + done.stderr


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_reader_decodes_what_shards_hold_and_names_damage(tmp_path, format):
    image = fakes.texture(np.random.default_rng(0), fakes.TILE_PX)
    good = encode(image, format=format, quality=95, subsampling="444")
    flipped = bytearray(good)
    flipped[len(good) * 3 // 4] ^= 0x10
    table = pd.DataFrame(
        {
            "tile_id": [f"S_{n}" for n in range(5)], "kind": "2.5x", "role": "standalone",
            "sample_id": [f"S_{n}" for n in range(5)], "position": -1, "split": "train", "magnification": 2.5,
            "shard": "s.tar", "offset": np.arange(5) * len(good), "size": len(good), "status": "ok",
            "sha256": [hashlib.sha256(data).hexdigest() for data in (good, good, good[::-1], good[:30], good)],
        }
    )  # fmt: skip
    table.loc[3, "size"] = 30
    table.to_parquet(tmp_path / "S.parquet")
    # intact; other bytes than the table's; bytes of the table, but no image; likewise, cut short; tar cut short
    (tmp_path / "s.tar").write_bytes(good + flipped + good[::-1] + good + good[:-9])
    reader = TileReader(load_index(tmp_path, "train", 4), fakes.TILE_PX)
    np.testing.assert_array_equal(reader.read(0), decode(good))
    for row in range(1, 5):
        with pytest.raises(MadError, match=rf"s\.tar: tile S_{row} .*no readable image"):
            reader.read(row)


def test_no_tables_and_uneven_batches_are_errors(results, tmp_path):
    with pytest.raises(MadError, match="mad shard"):
        load_index(tmp_path, "train", 4)
    with pytest.raises(MadError, match="multiple of 3"):
        next(batches(training_set(results), start=0, rank=0, world=3, workers=0))


def test_a_slide_off_the_sheet_trains_nothing(results):
    everything = load_index(results / "shard", "train", 4)
    one = load_index(results / "shard", "train", 4, ["S01", "S03"])
    assert {tile.split("_")[0] for tile in one.rows["tile_id"]} == {"S01"}
    assert one.digest != everything.digest and len(one.rows) < len(everything.rows)
    with pytest.raises(MadError, match="no shard table of S09"):
        load_index(results / "shard", "train", 4, ["S01", "S09"])


FAULT = """
import sys
import fakes
from mad.config.training import RunConfig
from mad.files import MadError
from mad.training.data import TrainingSet, batches
from mad.training.index import load_index
run = RunConfig(**fakes.tiny_run())
data = TrainingSet(load_index(sys.argv[1], "train", 4), run, fakes.TILE_PX, 16, 5)
try:
    list(batches(data, start=0, rank=0, world=1, workers=2))
except MadError as error:
    kept = error if sys.argv[2] == "kept" else None
    sys.exit(3)
"""


@pytest.mark.parametrize("traceback", ["kept", "dropped"])
def test_a_process_ends_after_a_fault_in_a_loading_process(results, tmp_path, traceback):
    shutil.copytree(results / "shard", tmp_path / "shard")
    for tar in (tmp_path / "shard").glob("*/train*.tar"):
        tar.unlink()
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", FAULT, str(tmp_path / "shard"), traceback]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, timeout=600).returncode == 3


def test_a_loading_process_outlives_the_signal_of_its_job(results):
    data = training_set(results, steps=12)
    loader = batches(data, start=0, rank=0, world=1, workers=1)
    first = next(loader)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
    assert len([first, *loader]) == 12


def test_a_batch_grows_with_samples_of_many_tiles(results):
    """A standalone tile is one entry of its kind; a pair of `pair_tiles: all` gives five more of them."""
    data = training_set(results, method="dinov2", pair_tiles="all", mix_mode="within", batch=8)
    kinds = [data.order[n][0] for n in range(80)]
    first = next(n for n in range(80) if kinds[n] == "standalone" and kinds[n + 1] != "standalone")
    numbers = range(first, first + 8)
    wanted = [view for n in numbers for view in data[n]]
    for _ in range(2):  # the second time in arrays of the first
        (group,) = data.__getitems__(numbers).groups
        assert len(group.teacher) == len(wanted) > 8
        for place, view in enumerate(wanted):
            np.testing.assert_array_equal(group.teacher[place].numpy(), np.stack(view.teacher))
            np.testing.assert_array_equal(group.local[place].numpy(), np.stack(view.local))
        del group


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_a_loading_process_is_told_in_its_own_words(results, tmp_path, workers):
    shutil.copytree(results / "shard", tmp_path / "shard")
    data = training_set(tmp_path)
    for tar in (tmp_path / "shard").glob("*/train*.tar"):
        tar.unlink()
    with pytest.raises(MadError) as direct:
        data.__getitems__(range(4))
    with pytest.raises(MadError) as caught:
        next(batches(data, start=0, rank=0, world=1, workers=workers))
    assert str(caught.value) == str(direct.value) and "Traceback" not in str(caught.value)
