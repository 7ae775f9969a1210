"""Embeddings for TRIDENT's tools: each vector stands beside the place that its tile's pixels came from."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from test_export import tiled, trident_patches
from typer.testing import CliRunner

from mad.cli import app
from mad.config import Config
from mad.files import MadError, write_json, write_parquet
from mad.tiles.aligned import open_aligned
from mad.tiles.export import Selection
from mad.tiles.export_features import export_features
from mad.tiles.pyramid import parse_tile_id


def mean_colour(pixels: np.ndarray) -> np.ndarray:
    """The encoder of these tests, float32 [3]: no two tiles of the coordinate slide look alike to it."""
    return pixels.reshape(-1, 3).mean(axis=0, dtype=np.float64).astype(np.float32)


def embedded(config: Config, slide: Path, part: str, tile_ids: list[str]) -> None:
    """What stage `embed` leaves for some tiles, in any order."""
    folder = Path(config.results) / "embed" / "mean"
    with open_aligned(slide, config.tile) as reader:
        vectors = np.stack([mean_colour(reader.tile(parse_tile_id(name)[1])) for name in tile_ids])
    (folder / part).mkdir(parents=True, exist_ok=True)
    np.save(folder / part / "C1.npy", vectors)
    write_parquet(folder / part / "C1.parquet", pd.DataFrame({"tile_id": tile_ids}))
    write_json(folder / part / "C1.json", {"key": "", "tiles": len(tile_ids)})
    write_json(folder / "audit.json", {"encoder": "mean", "weights_sha256": "ab12"})


@pytest.fixture
def config(coordinate_slide: Path, tmp_path: Path) -> Config:
    """C1 tiled and embedded: all its 10x tiles and the first 40x ones, those of the shards shuffled."""
    config = tiled(tmp_path, {"C1": coordinate_slide})
    table = pd.read_parquet(Path(config.results) / "tile" / "C1.parquet")
    table = table[(table["status"] == "ok") & (table["magnification"] > 2.5)]
    ids = [*table[table["magnification"] == 10]["tile_id"], *table[table["magnification"] == 40]["tile_id"][:60]]
    embedded(config, coordinate_slide, "", list(np.random.default_rng(0).permutation(ids)))
    embedded(config, coordinate_slide, "dense", ids[:5])
    return config


def write(config: Config, magnification: float, folder: Path, *, dense: bool = False) -> dict[str, int]:
    chosen = Selection(magnification)
    return export_features(Path(config.results), ["C1"], "mean", chosen, config.tile.tile_px, folder, dense=dense)


@pytest.mark.parametrize("magnification", [10, 40])
def test_round_trip(config: Config, coordinate_slide: Path, tmp_path: Path, magnification: float) -> None:
    """TRIDENT's reading of slide, coordinates and attributes finds the pixels that each row of `features` was made of."""
    written = write(config, magnification, tmp_path / "out")
    path = tmp_path / f"out/{magnification}x_64px_0px_overlap/features_mean/coordinates.h5"
    assert list((tmp_path / "out").rglob("*.h5")) == [path]
    with h5py.File(path) as file:
        features, ids = file["features"][:], [name.decode() for name in file["tile_id"]]
        about = dict(file["features"].attrs)
    assert written == {"C1": len(features)} and features.dtype == np.float32 and len(features) >= 40
    patches = trident_patches(path, coordinate_slide)
    for name, vector in zip(ids, features, strict=True):
        assert np.array_equal(mean_colour(patches[name]), vector), name
    source = np.load(Path(config.results) / "embed/mean/C1.npy")
    rows = pd.read_parquet(Path(config.results) / "embed/mean/C1.parquet")["tile_id"]
    mine = rows.isin(ids)
    assert dict(zip(rows[mine], map(bytes, source[mine]), strict=True)) == dict(
        zip(ids, map(bytes, features), strict=True)
    )
    assert about == {
        "name": "coordinates",
        "savetodir": str(path.parent),
        "encoder": "mean",
        "weights_sha256": "ab12",
    }


def test_coordinates_bear_the_attributes_of_coordinate_files(config: Config, tmp_path: Path) -> None:
    write(config, 10, tmp_path / "out")
    (path,) = (tmp_path / "out").rglob("*.h5")
    with h5py.File(path) as file:
        found = {name: np.asarray(value).tolist() for name, value in file["coords"].attrs.items()}
        assert file["coords"].dtype == np.int64
    assert found == {
        "patch_size": 64,
        "patch_size_level0": 256,
        "level0_magnification": 40,
        "target_magnification": 10,
        "overlap": 0,
        "name": "coordinates",
        "savetodir": str(tmp_path / "out/10x_64px_0px_overlap"),
        "level0_width": 2000,
        "level0_height": 1900,
    }


def test_dense_embeddings_and_magnifications_without_one(config: Config, tmp_path: Path) -> None:
    """Each kind has a folder of its own: the other one's slides stay as they are."""
    write(config, 10, tmp_path / "out")
    (sparse,) = tmp_path.rglob("features_mean/*.h5")
    before = sparse.read_bytes()
    assert write(config, 10, tmp_path / "out", dense=True) == {"C1": 5}
    (dense,) = tmp_path.rglob("features_mean_dense/*.h5")
    assert sparse.read_bytes() == before != dense.read_bytes() and len(list(tmp_path.rglob("*.h5"))) == 2
    assert write(config, 2.5, tmp_path / "none") == {} and not (tmp_path / "none").exists()


def test_slides_that_are_not_embedded_are_told_from_such_without_tiles(config: Config, tmp_path: Path) -> None:
    settings = config.model_dump(mode="json") | {"encoders": [{"name": "mean", "spec": "colour"}]}
    write_json(tmp_path / "config.json", settings)
    words = ["export", "--encoder", "mean", "--dense", "-m", "10", "-m", "2.5", "-o", str(tmp_path / "out")]
    words += ["--config", str(tmp_path / "config.json")]
    done = CliRunner().invoke(app, words)
    told = done.stderr
    assert done.exit_code == 0
    assert "export 10x: embeddings by mean of 5 tiles of 1 slides" in told and "not embedded" not in told
    assert "1 slides have no such tile that is embedded" in told
    (Path(config.results) / "embed" / "mean" / "dense" / "C1.json").unlink()
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, MadError)
    assert str(done.exception).startswith("C1: not embedded whole by mean: those of `evaluate.segmentation_slides` are")


def test_faults_are_named(config: Config, coordinate_slide: Path, tmp_path: Path) -> None:
    folder = Path(config.results) / "embed" / "mean"
    embedded(config, coordinate_slide, "", ["C1_L1_0_0_0"])
    rows = pd.DataFrame({"tile_id": ["C1_L1_99_0_0"]})
    write_parquet(folder / "C1.parquet", rows)
    with pytest.raises(MadError, match="C1 was tiled anew since it was embedded"):
        write(config, 10, tmp_path / "out")
    np.save(folder / "C1.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(MadError, match=r"\(2, 3\) for 1 tiles"):
        write(config, 10, tmp_path / "out")
    write_json(folder / "audit.json", {"status": "absent", "reason": "the licence of X was not accepted"})
    with pytest.raises(MadError, match="encoder 'mean' is absent: the licence of X"):
        write(config, 10, tmp_path / "out")
    (folder / "audit.json").unlink()
    with pytest.raises(MadError, match="snakemake --cores 2 embed"):
        write(config, 10, tmp_path / "out")
    assert not (tmp_path / "out").exists()
