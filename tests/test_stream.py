"""`loader: stream`: the tars' own samples, of the run's kinds, without end, whatever the shards' sizes and faults."""

import itertools
import shutil
import subprocess
import sys

import fakes
import numpy as np
import pandas as pd
import pytest
import torch

from mad.config import parse_config
from mad.config.training import RunConfig
from mad.files import MadError, write_json
from mad.stages import train
from mad.training import stream
from mad.training.data import TrainingSet, batches
from mad.training.index import load_index
from mad.training.memory import trial_batches
from mad.training.records import read_metrics
from mad.training.samples import ViewMaker
from mad.training.stream import StreamSet, shard_url


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A slide with many samples, one with a few; a third of another split."""
    folder = tmp_path_factory.mktemp("results")
    for slide, split, pairs in (("S01", "train", 12), ("S02", "train", 2), ("S03", "val", 8)):
        fakes.write_slide(folder / "shard", slide, split, pairs, standalone=3)
    return folder


@pytest.fixture
def copy(results, tmp_path):
    shutil.copytree(results / "shard", tmp_path / "shard")
    return tmp_path


def stream_set(results, seed=5, **changes):
    run = RunConfig(**fakes.tiny_run(**{"loader": "stream", "shuffle_buffer": 8, "steps": 30} | changes))
    return StreamSet(load_index(results / "shard", "train", run.children), run, fakes.TILE_PX, 16, seed)


def read(data, start=0, rank=0, world=1, workers=0, steps=None):
    found = batches(data, start=start, rank=rank, world=world, workers=workers)
    return list(itertools.islice(found, steps))


def tensors(batch):
    return [t for group in batch.groups for t in (group.teacher, group.student, group.local) if t is not None]


@pytest.mark.parametrize("mode", ["alternate", "within"])
@pytest.mark.parametrize("mix", [{}, {"10x-40x": 1}, {"2.5x-10x": 1, "standalone": 2}])
def test_every_process_sees_tiles_of_the_runs_kinds_and_split_alone(results, mix, mode):
    data = stream_set(results, mix=mix, mix_mode=mode)
    rows = data.index.rows
    kind_of = rows.assign(kind=rows["kind"].astype(str).where(rows["role"] != "standalone", "standalone"))
    kinds_of = kind_of.groupby("tile_id")["kind"].agg(set)
    for rank in (0, 1):
        data.begin(0, rank)
        for n in range(60):
            kind, tiles = data.tiles(n, np.random.default_rng(0))
            assert kind == data.order.kind(n) and (not mix or kind in mix)
            assert all(kind in kinds_of[tile.tile_id] for tile in tiles)
            assert len(tiles) == (1 if kind == "standalone" else 5)


def test_children_belong_to_their_parent_and_pixels_to_their_tile(results):
    data = stream_set(results, mix={"2.5x-10x": 1, "10x-40x": 1})
    rows, positions = data.index.rows, set()
    indexed = TrainingSet(data.index, data.run, fakes.TILE_PX, 16, 5)
    for n in range(40):
        kind, (parent, *children) = data.tiles(n, np.random.default_rng(0))
        own = rows[(rows["kind"] == kind) & (rows["sample_id"] == parent.tile_id)].reset_index().set_index("tile_id")
        assert len({child.tile_id for child in children}) == 4
        for tile in (parent, *children):
            assert own.loc[tile.tile_id, "position"] == tile.position
            row = int(own.loc[tile.tile_id, "index"])
            np.testing.assert_array_equal(data.reader.read(tile), indexed.reader.read(row))
        positions |= {child.position for child in children}
    assert positions == set(range(16))  # drawn anew from all


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "dinov2"}, {"method": "dinov2", "pair_tiles": "all"}, {"pairs": "same"}, {"pairs": "interpolated"},
     {"method": "mad_global"}],
)  # fmt: skip
def test_batches_have_the_shapes_of_the_indexed_loader(results, changes):
    data = stream_set(results, **changes)
    indexed = TrainingSet(data.index, data.run, fakes.TILE_PX, 16, 5)
    for mine, theirs in zip(read(data, steps=6), read(indexed, steps=6), strict=True):
        assert [group.kind for group in mine.groups] == [group.kind for group in theirs.groups]
        assert [t.shape for t in tensors(mine)] == [t.shape for t in tensors(theirs)]
        assert len(mine.tiles) == len(theirs.tiles)


def test_masks_are_those_of_the_indexed_loader(results):
    run = RunConfig(**fakes.tiny_run(loader="stream", mix={"standalone": 1}, ibot={"weight": 1}))
    index = load_index(results / "shard", "train", run.children)
    sets = [kind(index, run, fakes.TILE_PX, 16, 5, (4, 4)) for kind in (StreamSet, TrainingSet)]
    counts = [[int(group.masks.sum()) for batch in read(data) for group in batch.groups] for data in sets]
    assert counts[0] == counts[1] and sum(counts[0])  # strata follow (seed, n)


def test_processes_see_other_streams_and_the_same_place_the_same_one(results):
    def seen(rank, start=0, workers=0):
        data = stream_set(results, mix={"10x-40x": 1})
        return [batch.tiles for batch in read(data, start=start, rank=rank, world=2, workers=workers, steps=8)]

    assert seen(0) == seen(0)
    assert seen(0) != seen(1)
    assert seen(0) != seen(0, start=1)  # resumed elsewhere: other samples
    assert seen(0, workers=2) == seen(0, workers=2)
    loaded = seen(0, workers=2)
    assert loaded[0::2] != loaded[1::2]


def test_a_tiny_set_streams_on_and_draws_samples_alike(results):
    data = stream_set(results, mix={"10x-40x": 1}, steps=350)
    drawn = [batch.tiles[place] for batch in read(data, workers=1) for place in range(0, 20, 5)]
    counts = pd.Series(drawn).value_counts()
    assert len(drawn) == 1400 and len(counts) == 14  # a slide of 12 samples, one of 2
    assert counts.min() > 60 and counts.max() < 140


def test_only_the_shown_images_are_decoded(results, monkeypatch):
    decoded = []
    monkeypatch.setattr(stream, "readable", lambda data: decoded.append(data) or np.zeros((32, 32, 3), np.uint8))
    data = stream_set(results, mix={"10x-40x": 1})
    data.__getitems__(range(4))
    assert len(decoded) == 4 * 5


def test_a_tar_cut_short_is_named_and_its_whole_samples_are_used(copy, capfd):
    data = stream_set(copy, mix={"10x-40x": 1}, steps=200)
    path = copy / "shard" / "S01" / "train-10x-40x-000000.tar"
    rows = data.index.rows[(data.index.rows["kind"] == "10x-40x") & (data.index.rows["shard"].str.startswith("S01"))]
    half = rows[rows["role"] == "child"].groupby("sample_id")["offset"].median().sort_values().iloc[6]
    path.write_bytes(path.read_bytes()[: int(half) + 700])  # within the seventh sample
    drawn = {batch.tiles[place] for batch in read(data) for place in range(0, 20, 5)}
    assert sum(tile.startswith("S01") for tile in drawn) == 6 and sum(tile.startswith("S02") for tile in drawn) == 2
    warnings = capfd.readouterr().err
    assert warnings.count("train-10x-40x-000000.tar: unexpected end of data; 6 samples of it are used") == 1


def test_a_tar_cut_at_a_member_is_noticed_by_its_table(copy, capfd):
    data = stream_set(copy, mix={"standalone": 1}, steps=40)
    row = data.index.rows[data.index.rows["shard"] == "S01/train-40x-000000.tar"].sort_values("offset").iloc[-1]
    path = copy / "shard" / row["shard"]
    path.write_bytes(path.read_bytes()[: row["offset"] - 512])
    assert len(read(data)) == 40
    assert "train-40x-000000.tar: it holds 2 of the 3 samples of its table" in capfd.readouterr().err


def test_tars_that_cannot_be_read_end_the_run_with_a_name(copy, capfd):
    data = stream_set(copy, mix={"10x-40x": 1})
    (copy / "shard" / "S01" / "train-10x-40x-000000.tar").unlink()
    assert {tile[:3] for batch in read(data) for tile in batch.tiles} == {"S02"}
    assert "S01/train-10x-40x-000000.tar: [Errno 2]" in capfd.readouterr().err
    (copy / "shard" / "S02" / "train-10x-40x-000000.tar").write_bytes(b"")
    with pytest.raises(MadError, match=r"S0\d/train-10x-40x-000000\.tar: .*; no tar of this kind can be read"):
        read(data)
    with pytest.raises(MadError, match="no tar of this kind can be read"):
        read(data, workers=1)


def test_damaged_images_are_never_made_up(copy):
    data = stream_set(copy, mix={"10x-40x": 1})
    row = data.index.rows[(data.index.rows["kind"] == "10x-40x") & (data.index.rows["role"] == "parent")].iloc[0]
    path = copy / "shard" / row["shard"]
    damaged = bytearray(path.read_bytes())
    damaged[row["offset"]] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(MadError, match=rf"{path.name}: tile {row['tile_id']} is no readable image"):
        read(data)


def test_images_of_another_cut_are_told_from_those_of_the_table(copy):
    """Tars that a table does not belong to hold tiles of the same names, all of them readable."""
    data = stream_set(copy, mix={"10x-40x": 1})
    table = (copy / "shard" / "S01.parquet").read_bytes()
    fakes.write_slide(copy / "shard", "S01", "train", 12, standalone=3, seed=7)
    (copy / "shard" / "S01.parquet").write_bytes(table)
    with pytest.raises(
        MadError, match=r"S01/train-10x-40x-000000\.tar: tile S01_\S+ is .*not that of its table .*mad shard"
    ):
        read(data)


def test_tars_come_from_a_url_or_a_command(results, tmp_path):
    runtime = fakes.tiny_run()["runtime"]
    direct = [batch.tiles for batch in read(stream_set(results), steps=5)]
    moved = tmp_path / "a place" / "it's"
    moved.parent.mkdir()
    shutil.copytree(results / "shard", moved)
    for url in (moved.as_uri(), f'pipe:cat "{moved}"/{{shard}}'):
        data = stream_set(results, runtime=runtime | {"shard_url": url})
        assert [batch.tiles for batch in read(data, steps=5)] == direct
    data = stream_set(results, runtime=runtime | {"shard_url": "pipe:false {shard}"})
    with pytest.raises(MadError, match=r"pipe:false S0\d/.*no tar of this kind can be read"):
        read(data)


def test_urls_of_shards():
    assert shard_url("/results/shard", "S 1/a.tar") == "/results/shard/S 1/a.tar"
    assert shard_url("https://host/bucket/", "S1/a.tar") == "https://host/bucket/S1/a.tar"
    assert shard_url("https://host/{shard}?key=1", "S1/a.tar") == "https://host/S1/a.tar?key=1"
    assert shard_url("pipe:aws s3 cp s3://b/{shard} -", "S 1/a.tar") == "pipe:aws s3 cp s3://b/'S 1/a.tar' -"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": "shuffled"}, "pairs: 'shuffled' joins tiles of several samples"),
        ({"mix": {"2.5x-10x-40x": 1}}, "mix: '2.5x-10x-40x' joins tiles of several samples"),
        ({"loader": "indexed", "runtime": {"shard_url": "https://host"}}, "only `loader: stream` reads from there"),
    ],
)
def test_what_needs_an_index_is_refused(tmp_path, changes, message):
    with pytest.raises(MadError, match=message):
        fakes.tiny_config(tmp_path, fakes.tiny_run(**{"loader": "stream"} | changes))


def test_indexed_is_the_default_and_the_recipe_tells_the_loader():
    from mad.config.recipe import freeze_recipe

    config = parse_config({"synthetic": {"patients": 3}, "runs": [fakes.tiny_run()]})
    assert freeze_recipe(config, "tiny")["run"]["loader"] == "indexed"


def test_memory_is_estimated_for_every_kind(results):
    data = stream_set(results)
    trials = trial_batches(data)
    assert len(trials) == 3 and all(len(one.groups[0].teacher) == 1 for one, _ in trials)


def test_the_stage_trains_resumes_and_says_that_samples_differ(results, tmp_path, capfd, monkeypatch):
    (tmp_path / "shard").symlink_to(results / "shard")
    entry = fakes.tiny_run(
        loader="stream", shuffle_buffer=8, steps=6, mix={"2.5x-10x": 1, "10x-40x": 1, "standalone": 1}
    )
    config = fakes.tiny_config(tmp_path, entry)
    original = ViewMaker.show

    def stop_at_step_4(self, reader, kind, tiles, n, rng):
        if n >= 4 * entry["batch"]:
            raise KeyboardInterrupt
        return original(self, reader, kind, tiles, n, rng)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ViewMaker, "show", stop_at_step_4)
        train.run(config, "tiny")
    assert "goes on with other samples" not in capfd.readouterr().err
    train.run(config, "tiny")
    assert "tiny: loader: stream goes on with other samples" in capfd.readouterr().err
    folder = tmp_path / "train" / "tiny"
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(6))
    assert all(np.isfinite(record["loss"]) for record in records)
    assert (folder / "encoder" / "model.safetensors").exists() and (folder / "summary.json").exists()


def test_arrays_of_a_batch_are_used_again_only_when_it_is_gone(results):
    data = stream_set(results, mix={"10x-40x": 1})
    kept = read(data, steps=3)
    before = [[t.clone() for t in tensors(batch)] for batch in kept]
    parts = [kept[2].groups[0].teacher[1:]]  # a view keeps its whole array
    copy_of_part = parts[0].clone()
    del kept[2]
    read(data, steps=6)
    for batch, tensors_before in zip(kept, before, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors_before, strict=True))
    assert torch.equal(parts[0], copy_of_part)


def test_two_processes_train_on_uneven_shards(results, tmp_path):
    (tmp_path / "shard").symlink_to(results / "shard")
    entry = fakes.tiny_run(loader="stream", shuffle_buffer=4, steps=4, warmup=1, mix_mode="within")
    path = tmp_path / "config.json"
    write_json(path, fakes.tiny_config(tmp_path, entry).model_dump(mode="json"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "mad", "train", "tiny", "--config", str(path)], capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr.decode()
    assert len(read_metrics(tmp_path / "train" / "tiny" / "metrics.jsonl")) == 4


def test_trial_batches_read_no_further_than_they_must(results, monkeypatch):
    data, drawn = stream_set(results, shuffle_buffer=64), []
    original = stream.draw
    monkeypatch.setattr(stream, "draw", lambda *arguments: drawn.append(1) or original(*arguments))
    trial_batches(data)
    assert len(drawn) <= 12 and not data._open and data.run.shuffle_buffer == 64  # 3 samples of each of 3 kinds
