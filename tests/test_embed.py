"""Stage embed: every vector belongs to its tile, nothing is encoded twice or in vain, nothing half-done is vouched for."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from pipeline import configure, run_all
from slide_files import damage

from mad.files import MadError, read_json
from mad.models.embedding import embed_tiles
from mad.slides.readers import open_slide
from mad.stages import embed, evaluate
from mad.tiles.embeddings import encoder_digest

COLOUR = {"encoders": [{"name": "colour", "spec": "colour", "batch": 7}]}


def expected(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate(cv2.meanStdDev(pixels)).ravel() / 255


@pytest.fixture(scope="module")
def results(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = configure(tmp_path_factory.mktemp("embed"), slides, **COLOUR)
    folder = run_all(config)
    embed.run(config, "colour")
    return folder


def test_every_vector_is_its_tiles(results: Path, slides: Path) -> None:
    """Rows of the shards once each, and rows of the dense maps, against the slide's own pixels."""
    for slide_id, part in (("S01", ""), ("S02", ""), ("S02", "dense")):
        vectors = np.load(results / "embed" / "colour" / part / f"{slide_id}.npy")
        rows = pd.read_parquet(results / "embed" / "colour" / part / f"{slide_id}.parquet")
        places = pd.read_parquet(results / "tile" / f"{slide_id}.parquet")
        assert rows["tile_id"].is_unique and len(vectors) == len(rows)
        if part:
            inside = places[(places["status"] != "edge") & (places["magnification"] > 2.5)]
            assert set(rows["tile_id"]) == set(inside["tile_id"])
        else:
            shards = pd.read_parquet(results / "shard" / f"{slide_id}.parquet")
            assert set(rows["tile_id"]) == set(shards["tile_id"])
        places = rows.merge(places, on="tile_id")
        with open_slide(slides / f"{slide_id}.tiff") as slide:
            for n in np.random.default_rng(0).choice(len(rows), 40, replace=False):
                tile, downsample = places.iloc[n], {2.5: 16, 10.0: 4, 40.0: 1}[places["magnification"].iloc[n]]
                pixels = slide.read(
                    int(tile["level"]), int(tile["x"]) // downsample, int(tile["y"]) // downsample, 112, 112
                )
                assert np.abs(vectors[n] - expected(pixels)).max() < (1e-6 if part else 0.02), tile["tile_id"]
    audit = read_json(results / "embed" / "colour" / "audit.json")
    assert audit["dim"] == 6 and audit["config"]["spec"] == "colour"


def test_only_what_changed_is_encoded_again(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path, slides, **COLOUR)
    folder = run_all(config)
    done: list[str] = []
    real = embed.embed_tiles
    monkeypatch.setattr(embed, "embed_tiles", lambda *given: done.append(given[3].split()[2]) or real(*given))
    embed.run(config, "colour")
    assert sorted(done) == ["S01", "S02", "S02"]
    done.clear()
    embed.run(config, "colour")
    assert done == []
    (folder / "embed" / "colour" / "S01.json").unlink()  # as a kill between array and stamp leaves it
    with pytest.raises(MadError, match=r"S01.npy: not embedded whole"):
        evaluate.load(config, "colour")
    embed.run(config, "colour")
    assert done == ["S01"]
    (folder / "embed" / "colour" / "dense" / "S02.json").unlink()
    capsys.readouterr()
    embed.run(config, "colour")
    assert done == ["S01", "S02"] and " tiles of 1 slides in " in capsys.readouterr().err


def test_a_slide_that_was_mended_is_embedded_whole(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A good copy over a damaged one, by `cp -p`: of equal size and time."""
    shutil.copytree(slides, tmp_path / "slides")
    slide, sound = tmp_path / "slides" / "S02.tiff", slides / "S02.tiff"
    config = configure(tmp_path, tmp_path / "slides", **COLOUR)
    folder = run_all(config)
    stamp = slide.stat().st_atime_ns, slide.stat().st_mtime_ns
    damage(slide, [30])
    os.utime(slide, ns=stamp)
    dense = folder / "embed" / "colour" / "dense" / "S02.npy"
    embed.run(config, "colour")
    lacking = len(np.load(dense))
    embed.run(config, "colour")
    assert "colour: 0 tiles of 0 slides" in capsys.readouterr().err, "what stays damaged is not embedded again"
    shutil.copyfile(sound, slide)
    os.utime(slide, ns=stamp)
    embed.run(config, "colour")
    assert lacking < len(np.load(dense)) == len(pd.read_parquet(dense.with_suffix(".parquet")))


@pytest.mark.parametrize("limit", [1, 3, 64])
def test_batches_shrink_where_memory_ends(limit: int) -> None:
    sizes: list[int] = []

    class Small:
        audit = {"dim": 1}

        def __call__(self, tiles: np.ndarray) -> np.ndarray:
            sizes.append(len(tiles))
            if len(tiles) > limit:
                raise torch.OutOfMemoryError("full")
            return tiles.reshape(len(tiles), -1)[:, :1].astype(np.float32)

    images = (np.full((2, 2, 3), n, np.uint8) for n in range(21))
    small = Small()
    vectors = embed_tiles(small, images, 8, "embed")
    assert vectors[:, 0].tolist() == list(range(21))
    assert max(sizes) == 8 and sum(size for size in sizes if size <= limit) == 21
    sizes.clear()
    embed_tiles(small, (np.full((2, 2, 3), n, np.uint8) for n in range(21)), 8, "the next slide")
    assert max(sizes) <= limit, "what did not fit is not tried again"
    with pytest.raises(MadError, match="one tile is too much"):
        limit = 0
        embed_tiles(Small(), [np.zeros((2, 2, 3), np.uint8)], 4, "embed")


@pytest.mark.parametrize(
    "words", ["DefaultCPUAllocator: can't allocate memory: you tried", "not enough memory: you", "CPU out of memory"]
)
def test_batches_shrink_where_the_memory_of_a_cpu_ends(words: str) -> None:
    class Small:
        audit = {"dim": 1}

        def __call__(self, tiles: np.ndarray) -> np.ndarray:
            if len(tiles) > 2:
                raise RuntimeError(words)
            return tiles.reshape(len(tiles), -1)[:, :1].astype(np.float32)

    vectors = embed_tiles(Small(), (np.full((2, 2, 3), n, np.uint8) for n in range(9)), 8, "embed")
    assert vectors[:, 0].tolist() == list(range(9))
    words = "shapes do not match"
    with pytest.raises(RuntimeError, match="shapes do not match"):
        embed_tiles(Small(), [np.zeros((2, 2, 3), np.uint8)] * 4, 4, "embed")


def test_an_error_while_decoding_reaches_the_stage() -> None:
    class Any:
        audit = {"dim": 1}

        def __call__(self, tiles: np.ndarray) -> np.ndarray:
            return np.zeros((len(tiles), 1), np.float32)

    def images():
        yield np.zeros((2, 2, 3), np.uint8)
        raise MadError("tile 2 is damaged")

    with pytest.raises(MadError, match="tile 2 is damaged"):
        embed_tiles(Any(), images(), 1, "embed")
    assert embed_tiles(Any(), [], 4, "embed").shape == (0, 1)


def test_numbers_that_are_not_finite_stop_the_stage(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        audit = {"dim": 2}

        def __call__(self, tiles: np.ndarray) -> np.ndarray:
            return np.full((len(tiles), 2), np.nan, np.float32)

    config = configure(tmp_path, slides, **COLOUR)
    folder = run_all(config)
    embed.run(config, "colour")
    monkeypatch.setattr(embed, "load_encoder", lambda *_: Broken())
    with pytest.raises(MadError, match=r"not finite for S01_L\d"):
        embed.run(config, "colour")
    assert not (folder / "embed" / "colour" / "audit.json").exists()
    with pytest.raises(MadError, match="no finished embeddings"):
        evaluate.load(config, "colour")


def test_the_first_tile_whose_embedding_is_not_finite_is_named() -> None:
    class Broken:
        audit = {"dim": 1}

        def __call__(self, tiles: np.ndarray) -> np.ndarray:
            return np.where(tiles[:, :1, 0, 0] == 5, np.nan, 1.0).astype(np.float32)

    images = (np.full((2, 2, 3), n, np.uint8) for n in range(9))
    with pytest.raises(MadError, match="not finite for tile-5 and 0 more of 3"):
        embed_tiles(Broken(), images, 3, "embed", "tile-{}".format)


def test_an_encoder_is_its_weights_and_what_shapes_them() -> None:
    plain = {"weights_sha256": "ab", "dim": 8}
    assert encoder_digest(plain) == "ab" and encoder_digest({"dim": 8}) is None
    others = ({"args": {"act_layer": "SiLU"}}, {"args": {"act_layer": "GELU"}}, {"config_sha256": "c"})
    assert len({"ab", *(encoder_digest(plain | more) for more in others)}) == 4
