"""`TileStore`: the tiles of the shards from Python, by id; and `verify`: every byte of the shards is watched."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline import configure, run_all

from mad.files import MadError, sha256_file
from mad.tiles.shards import decode, read_member
from mad.tiles.store import TileStore, UnknownTileError
from mad.tiles.verify import Fault, verify_slide


@pytest.fixture(scope="module")
def results(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return run_all(configure(folder, slides, sample={"max_pairs": {"10x-40x": 2}, "max_standalone": {"40x": 3}}))


@pytest.fixture(scope="module")
def tiles(results: Path) -> TileStore:
    return TileStore(results)


def test_a_tile_is_had_by_its_id(tiles: TileStore, results: Path) -> None:
    row = tiles.table[tiles.table["magnification"] == 40].iloc[-1]
    pixels = tiles[row["tile_id"]]
    assert pixels.dtype == np.uint8 and pixels.shape == (112, 112, 3)
    assert np.array_equal(pixels, decode(read_member(results / "shard", row["shard"], row["offset"], row["size"])))


def test_a_store_is_a_mapping(tiles: TileStore) -> None:
    ids = list(tiles)
    assert len(ids) == len(tiles) == len(set(ids)) < len(tiles.table)  # a 10x tile is a child and a parent
    assert set(tiles.table["split"]) == {"train", "test"}
    fine = tiles.table.query("magnification == 40 and split == 'test'")["tile_id"].unique()[:3]
    assert np.array_equal(tiles.read(fine), np.stack([tiles[tile] for tile in fine]))
    assert fine[0] in tiles and "S02_L0_9_9" not in tiles and tiles.get("S02_L0_9_9") is None
    assert next(iter(tiles.items()))[0] == ids[0]
    with pytest.raises(MadError, match="no tile ids"):
        tiles.read([])


def test_a_pair_is_the_parent_and_its_children_in_order(tiles: TileStore) -> None:
    """The parent is, but for two JPEGs, the area average of the mosaic of its children."""
    parent, children = tiles.pair("S01_L0_0_0")
    assert len(children) == 16
    mosaic = np.stack(children).reshape(4, 4, 112, 112, 3).transpose(0, 2, 1, 3, 4).reshape(112, 4, 112, 4, 3)
    aligned = np.abs(mosaic.mean(axis=(1, 3)) - parent).mean()
    assert aligned < 0.5 * np.abs(mosaic.mean(axis=(1, 3)) - np.roll(parent, 28, axis=1)).mean()
    with pytest.raises(UnknownTileError, match="no pair of 'S01_L2_0_0_0_0'; did you mean 'S01_"):
        tiles.pair("S01_L2_0_0_0_0")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("S01_L0_0_1", "no tile 'S01_L0_0_1'; did you mean 'S01_L"),
        ("S91_L0_0_0", "no slide 'S91'; did you mean 'S01'"),
        ("tile", "no tile id; one looks like"),
    ],
)
def test_an_unknown_id_is_told_with_the_nearest(tiles: TileStore, wrong: str, message: str) -> None:
    with pytest.raises(UnknownTileError, match=message) as error:
        tiles[wrong]
    assert isinstance(error.value, MadError) and isinstance(error.value, KeyError)


def test_only_the_wanted_slides(results: Path, tmp_path: Path) -> None:
    assert {tile.split("_")[0] for tile in TileStore(results, slides=["S02"])} == {"S02"}
    with pytest.raises(MadError, match="no shard table of 'S03'"):
        TileStore(results, slides=["S03"])
    with pytest.raises(MadError, match="snakemake --cores 2 shard"):
        TileStore(tmp_path)


def test_a_changed_tile_is_refused(results: Path, tmp_path: Path) -> None:
    store = TileStore(copy(results, tmp_path))
    row = store.table.iloc[0]
    flip(tmp_path / "shard" / row["shard"], row["offset"] + row["size"] // 2)
    with pytest.raises(MadError, match="not those of its index"):
        store[row["tile_id"]]


def test_the_guide_s_examples_run(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of docs/shards.md, one after the other, on a results folder."""
    guide = (Path(__file__).parents[1] / "docs" / "shards.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    monkeypatch.chdir(results.parent)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
    assert len(blocks) == 3
    assert scope["batch"].shape[1:] == (112, 112, 3) and scope["place"]["kind"] == "10x-40x"
    parent, children = scope["tiles"].pair(scope["sample"]["__key__"])
    assert np.abs(scope["parent"].astype(int) - parent).max() <= 3  # another JPEG decoder
    assert len(children) == len(scope["children"]) == 16


def test_no_torch_is_loaded() -> None:
    code = "import sys, mad.tiles.store, mad.tiles.verify; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def copy(results: Path, folder: Path) -> Path:
    """A copy of the shards of S01 alone, whose stamp tells the digest of every tar."""
    (folder / "shard" / "S01").mkdir(parents=True)
    (folder / "shard" / "S01.parquet").write_bytes((results / "shard" / "S01.parquet").read_bytes())
    tars = sorted((results / "shard" / "S01").glob("*.tar"))
    for tar in tars:
        (folder / "shard" / "S01" / tar.name).write_bytes(tar.read_bytes())
    recorded = {tar.name: {"bytes": tar.stat().st_size, "sha256": sha256_file(tar)} for tar in tars}
    (folder / "shard" / "S01" / "index.json").write_text(json.dumps({"key": "", "tars": recorded}))
    return folder


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def faults(folder: Path) -> list[Fault]:
    return [fault for _, found in verify_slide(folder / "shard", "S01") for fault in found]


@pytest.fixture(scope="module")
def whole(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy(results, tmp_path_factory.mktemp("whole"))


def test_whole_shards_have_no_fault(whole: Path, results: Path) -> None:
    checked = dict(verify_slide(whole / "shard", "S01"))
    tars = sorted(f"S01/{tar.name}" for tar in (whole / "shard" / "S01").glob("*.tar"))
    assert list(checked) == [*tars, "S01.parquet"] and not any(checked.values())
    assert all(not found for slide in ("S01", "S02") for _, found in verify_slide(results / "shard", slide))


@given(data=st.data())
def test_one_flipped_bit_anywhere_is_found(whole: Path, data: st.DataObject) -> None:
    tars = sorted((whole / "shard" / "S01").glob("*.tar"))
    path = data.draw(st.sampled_from(tars))
    position = data.draw(st.integers(0, path.stat().st_size - 1))
    bit = data.draw(st.integers(0, 7))
    flip(path, position, bit)
    try:
        found = faults(whole)
        assert found and {fault.shard for fault in found} == {f"S01/{path.name}"}
    finally:
        flip(path, position, bit)


def members(folder: Path, name: str = "S01/train-2.5x-10x-000000.tar") -> tuple[Path, pd.DataFrame]:
    table = pd.read_parquet(folder / "shard" / "S01.parquet")
    return folder / "shard" / name, table[table["shard"] == name].sort_values("offset").reset_index(drop=True)


@pytest.mark.parametrize(
    ("where", "cause"),
    [
        ("pixels", "not those of its SHA-256"),
        ("header", "tar header before it"),
        ("padding", "padding after it is not zero"),
        ("json header", "header of its sample's JSON member"),
        ("json form", "JSON member is not what was written"),
        ("json value", "a JSON member was changed"),
        ("end", "two blocks of zeros"),
    ],
)
def test_the_place_of_a_fault_is_told_and_nothing_else(results: Path, tmp_path: Path, where: str, cause: str) -> None:
    folder = copy(results, tmp_path)
    path, rows = members(folder)
    row, last = rows.iloc[3], rows.iloc[-1]
    json_header = last["offset"] + last["size"] + -last["size"] % 512
    digit = path.read_bytes().index(b'"x": ', json_header) + 5
    positions = {
        "pixels": row["offset"] + 100,
        "header": row["offset"] - 512 + 3,
        "padding": row["offset"] + row["size"],
        "json header": json_header + 5,
        "json form": json_header + 512,
        "json value": digit,
        "end": path.stat().st_size - 1,
    }
    assert row["size"] % 512
    flip(path, positions[where])
    (fault,) = faults(folder)
    assert cause in fault.cause and fault.shard.endswith(path.name)
    expected = {"pixels": row["tile_id"], "header": row["tile_id"], "padding": row["tile_id"]}
    expected |= {"json header": "S01_L0_0_0", "json form": "S01_L0_0_0"}
    assert fault.tile_id == expected.get(where, "")


def test_what_is_missing_short_long_or_strange_is_told(results: Path, tmp_path: Path) -> None:
    folder = copy(results, tmp_path)
    path, rows = members(folder)
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 512)
    assert [fault.cause for fault in faults(folder)] == ["512 more bytes follow the end of the archive"]
    path.write_bytes(data[: int(rows.iloc[-1]["offset"]) + 10])
    assert any(
        "ends within it" in fault.cause and fault.tile_id == rows.iloc[-1]["tile_id"] for fault in faults(folder)
    )
    path.unlink()
    assert [fault.cause for fault in faults(folder)] == ["cannot be read: No such file or directory"]
    path.write_bytes(data)
    (path.parent / "train-40x-000009.tar").write_bytes(data)
    (fault,) = faults(folder)
    assert fault.shard == "S01/train-40x-000009.tar" and "does not name" in fault.cause
    (path.parent / "train-40x-000009.tar").unlink()
    table = pd.read_parquet(folder / "shard" / "S01.parquet")
    dropped = table[~((table["kind"] == "2.5x-10x") & (table["position"] == 5))]
    dropped.to_parquet(folder / "shard" / "S01.parquet")  # a member that the table does not name
    assert any("does not follow the member before it" in fault.cause for fault in faults(folder))
    (folder / "shard" / "S01.parquet").write_bytes(b"no table")
    (fault,) = faults(folder)
    assert "no readable table" in fault.cause
