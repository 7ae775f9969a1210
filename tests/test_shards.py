"""Shards: what is written is what webdataset, tarfile and an offset read; bytes depend on content alone."""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from mad.files import MadError
from mad.tiles.shards import ShardWriter, blur_score, decode, encode, member_header, read_member

RNG = np.random.default_rng(0)
TILES = RNG.integers(0, 256, (17, 32, 32, 3)).astype(np.uint8)
OPTIONS = {"quality": 95, "subsampling": "444"}


def write(
    folder: Path, max_bytes: int = 10**9, count: int = 3
) -> tuple[list[str], dict[str, list[tuple[str, int, int]]]]:
    places = {}
    with ShardWriter(folder, "train-10x-40x", max_bytes) as writer:
        for n in range(count):
            images = {"parent.jpg": encode(TILES[16], format="jpg", **OPTIONS)}
            images |= {f"{k:02d}.jpg": encode(TILES[k], format="jpg", **OPTIONS) for k in range(16)}
            key = f"S_L1_0_0_{n}"
            places[key] = writer.add(key, images, {"tile_id": key, "mpp": 1.0})
    return writer.names, places


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_encoding_round_trips(format: str) -> None:
    smooth = np.linspace(0, 255, 112 * 112 * 3).reshape(112, 112, 3).astype(np.uint8)
    data = encode(smooth, format=format, **OPTIONS)
    assert data == encode(smooth, format=format, **OPTIONS)
    assert np.abs(decode(data).astype(int) - smooth).max() <= (4 if format == "jpg" else 0)


def test_members_are_found_by_offset_by_tarfile_and_by_webdataset(tmp_path: Path) -> None:
    names, places = write(tmp_path)
    assert names == ["train-10x-40x-000000.tar"]
    with tarfile.open(tmp_path / names[0]) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
        assert {(member.mtime, member.uid, member.mode) for member in tar.getmembers()} == {(0, 0, 0o644)}
    for key, found in places.items():
        extensions = ["parent.jpg", *(f"{k:02d}.jpg" for k in range(16))]
        for extension, place in zip(extensions, found, strict=True):
            data = read_member(tmp_path, *place, sha256=hashlib.sha256(members[f"{key}.{extension}"]).hexdigest())
            assert data == members[f"{key}.{extension}"]
    samples = list(webdataset.WebDataset(str(tmp_path / names[0]), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(places)
    assert set(samples[0]) >= {"parent.jpg", "00.jpg", "15.jpg", "json"}


def test_the_same_content_gives_the_same_bytes_and_size_is_bounded(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    name = "train-10x-40x-000000.tar"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    one = (tmp_path / "a" / name).stat().st_size // 3
    names, places = write(tmp_path / "c", max_bytes=2 * one, count=5)
    assert len(names) == 3
    assert [found[0][0] for found in places.values()] == [names[0], names[0], names[1], names[1], names[2]]
    assert max(path.stat().st_size for path in (tmp_path / "c").iterdir()) <= 2 * one + 1024


@given(st.text("S01_Lx.jpg-", min_size=1, max_size=130), st.integers(0, 1 << 34))
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert member_header(name, size) == info.tobuf(tarfile.GNU_FORMAT)


def test_long_names_and_digests(tmp_path: Path) -> None:
    """A slide_id of 100 letters makes names that no tar block holds; offsets and tarfile still agree."""
    key = "S" * 100 + "_L2_0_0_0_0"
    with ShardWriter(tmp_path, "train-40x", 10**9) as writer:
        places = [writer.add(f"{key}{n}", {"jpg": bytes([n]) * (100 + n)}, {"n": n})[0] for n in range(3)]
    [(name, stamp)] = writer.tars.items()
    data = (tmp_path / name).read_bytes()
    assert stamp == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with tarfile.open(tmp_path / name) as tar:
        assert tar.getnames() == [f"{key}{n}.{end}" for n in range(3) for end in ("jpg", "json")]
    for n, place in enumerate(places):
        assert read_member(tmp_path, *place) == bytes([n]) * (100 + n)


def test_a_failure_leaves_nothing_under_a_final_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train-40x", 10**9) as writer:
        writer.add("S_L2_0_0_0_0", {"jpg": b"x"}, {})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_missing_short_and_changed_shards_are_named(tmp_path: Path) -> None:
    names, places = write(tmp_path)
    place = places["S_L1_0_0_1"][3]
    with pytest.raises(MadError, match="no such shard"):
        read_member(tmp_path, "other.tar", 0, 1)
    with pytest.raises(MadError, match="not those of its index"):
        read_member(tmp_path, *place, sha256="0" * 64)
    path = tmp_path / names[0]
    path.write_bytes(path.read_bytes()[: place[1] + 5])
    with pytest.raises(MadError, match="not those of its index"):
        read_member(tmp_path, *place)


def test_blur_lowers_the_score() -> None:
    import cv2

    assert blur_score(cv2.GaussianBlur(TILES[0], (0, 0), 2)) < 0.1 * blur_score(TILES[0])
    assert blur_score(np.full((32, 32, 3), 255, np.uint8)) == 0
