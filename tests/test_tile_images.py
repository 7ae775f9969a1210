"""The images of a tile table: read once, embedded once, whatever stopped the calls between."""

import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mad.evaluation.tile_table import read_image
from mad.files import MadError, read_parquet
from mad.stages import tile_images
from mad.stages.tile_images import embed_images, look_at_images

NUM = 11


class Encoder:
    """Mean colour; counts its tiles, and falls over after `limit` of them."""

    def __init__(self, weights="a", limit=10**9):
        self.audit = {"spec": "test", "weights_sha256": weights, "dim": 3}
        self.seen, self.limit = 0, limit

    def __call__(self, tiles):
        if self.seen + len(tiles) > self.limit:
            raise KeyboardInterrupt
        self.seen += len(tiles)
        return tiles.mean(axis=(1, 2), dtype=np.float32)


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Eleven images, the last one with the pixels of the first; four tiles a part."""
    monkeypatch.setattr(tile_images, "PART", 4)
    names = [tmp_path / f"{n}.png" for n in range(NUM)]
    for n, name in enumerate(names):
        save(name, n % (NUM - 1))
    return names


def save(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def embed(paths, encoder, out):
    facts = look_at_images(paths, out / "images.parquet")
    found = embed_images(encoder, "test", paths, facts["sha256"], 2, out / "test")
    expected = np.stack([read_image(path).mean(axis=(0, 1)) for path in paths])
    assert found == pytest.approx(expected, abs=1e-3)
    stored = np.load(out / "test" / "embeddings.npy")
    assert stored.dtype == np.float32 and np.array_equal(stored, found) and not (out / "test" / "parts").exists()
    assert read_parquet(out / "test" / "embeddings.parquet")["tile_id"].tolist() == facts["sha256"].tolist()
    return encoder.seen


@pytest.fixture
def reads(monkeypatch):
    """Names of the images that are read."""
    found = []
    monkeypatch.setattr(tile_images, "read_image", lambda path: (found.append(path.name), read_image(path))[1])
    return found


def test_a_second_call_reads_no_image_and_embeds_none(paths, tmp_path, reads, capsys):
    assert embed(paths, Encoder(), tmp_path / "out") == NUM - 1, "equal pixels are embedded once"
    assert len(reads) == NUM + NUM - 1
    reads.clear()
    assert embed(paths, Encoder(), tmp_path / "out") == 0 and not reads
    told = capsys.readouterr().err
    assert "11 of 11 images are as they were: not read again" in told
    assert "embed test: 10 of 10 different tiles were embedded before and are reused" in told


def test_a_killed_call_goes_on_where_it_was(paths, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        embed(paths, Encoder(limit=9), out)  # two parts of four tiles are written, of the third two tiles are lost
    assert len(list((out / "test" / "parts").glob("*.npy"))) == 2 and not (out / "test" / "embeddings.npy").exists()
    assert embed(paths, Encoder(), out) == 2 and "8 of 10 different tiles" in capsys.readouterr().err


def test_killed_before_the_parts_were_joined(paths, tmp_path, monkeypatch):
    def fall(folder, name, *rest):
        if name == tile_images.WHOLE:
            raise KeyboardInterrupt
        written(folder, name, *rest)

    written = tile_images.write_embeddings
    monkeypatch.setattr(tile_images, "write_embeddings", fall)
    with pytest.raises(KeyboardInterrupt):
        embed(paths, Encoder(), tmp_path / "out")
    monkeypatch.setattr(tile_images, "write_embeddings", written)
    assert embed(paths, Encoder(), tmp_path / "out") == 0


def test_killed_while_those_of_an_earlier_call_are_written_anew(paths, tmp_path, monkeypatch):
    assert embed(paths[:8], Encoder(), tmp_path / "out") == 8

    def killed(folder, *given):
        if folder.name == "test":
            (folder / "embeddings.json").unlink(missing_ok=True)
            raise KeyboardInterrupt
        write(folder, *given)

    write = tile_images.write_embeddings
    monkeypatch.setattr(tile_images, "write_embeddings", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(paths, Encoder(), tmp_path / "out")
    monkeypatch.setattr(tile_images, "write_embeddings", write)
    assert embed(paths, Encoder(limit=0), tmp_path / "out") == 0


def test_a_changed_image_alone_is_embedded_anew(paths, tmp_path, reads):
    out = tmp_path / "out"
    embed(paths, Encoder(), out)
    reads.clear()
    save(paths[4], 77)
    assert embed(paths, Encoder(), out) == 1 and reads == ["4.png"] * 2  # to look at it, and to embed it
    save(tmp_path / "new.png", 78)
    assert embed([tmp_path / "new.png", *paths[:2:-1]], Encoder(), out) == 1, "in another order, three left out"
    reads.clear()
    os.utime(paths[5], ns=(1, 1))
    assert embed([tmp_path / "new.png", *paths[:2:-1]], Encoder(), out) == 0 and reads == ["5.png"], "the same pixels"


def test_another_encoder_embeds_all_of_them(paths, tmp_path):
    out = tmp_path / "out"
    embed(paths, Encoder("a"), out)
    with pytest.raises(KeyboardInterrupt):
        embed(paths, Encoder("b", limit=5), out)
    assert embed(paths, Encoder("c"), out) == NUM - 1
    assert embed(paths, Encoder("c"), out) == 0 and embed(paths, Encoder("a"), out) == NUM - 1


def test_what_was_read_before_a_broken_image_is_kept(paths, tmp_path, reads):
    paths[6].write_text("no image")
    for _ in range(2):
        with pytest.raises(MadError, match=r"6\.png: cannot be read as an image"):
            look_at_images(paths, tmp_path / "images.parquet")
    assert reads == [*(f"{n}.png" for n in range(7)), "6.png"]
    paths[6].unlink()
    with pytest.raises(MadError, match=r"6\.png: cannot be read as an image"):
        look_at_images(paths, tmp_path / "images.parquet")
    save(paths[6], 6)
    facts = look_at_images(paths, tmp_path / "images.parquet")
    assert isinstance(facts, pd.DataFrame) and facts["sha256"].nunique() == NUM - 1
    assert (facts[["height", "width"]] == 8).all(axis=None)


def test_an_image_that_is_named_twice_is_one(paths, tmp_path):
    for _ in range(2):  # a row each was stored
        facts = look_at_images([*paths, paths[3]], tmp_path / "images.parquet")
        assert len(facts) == NUM + 1 and facts.iloc[-1].equals(facts.iloc[3].rename(NUM))


def test_an_encoder_that_gives_no_numbers_names_the_image(paths, tmp_path):
    class Broken(Encoder):
        def __call__(self, tiles):
            vectors = super().__call__(tiles)
            vectors[self.seen > 5 :] = np.nan if self.seen > 5 else 0
            return vectors

    with pytest.raises(MadError, match=r"not finite for .*5\.png"):
        embed(paths, Broken(), tmp_path / "out")
