"""Coordinates for CLAM and TRIDENT: their own reading rules give the pixels of our tiles."""

from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import openslide
import pandas as pd
import pytest
from conftest import decode_coordinates, write_tiff
from slide_files import HEIGHT, LEVELS, WIDTH, write_ome

from mad.config import Config, parse_config
from mad.files import MadError
from mad.slides.sheet import cohort_rows, write_sheet
from mad.stages import tile
from mad.tiles.aligned import open_aligned
from mad.tiles.export import Selection, export, slide_name
from mad.tiles.pyramid import parse_tile_id


def tiled(folder: Path, slides: dict[str, Path], **settings: Any) -> Config:
    """Tile slides on a ladder of 2.5x, 10x and 40x; every pixel counts as tissue."""
    records = [{"slide_id": name, "path": str(path), "patient_id": name} for name, path in slides.items()]
    write_sheet(folder / "slides.tsv", records)
    every = {"tile_px": 64, "min_tissue": 0, **settings}
    cohort = {"sheet": str(folder / "slides.tsv"), "split_by": "block"}
    config = parse_config({"results": str(folder / "results"), "cohort": cohort, "tile": every})
    for row in cohort_rows(config):
        tile.run(config, row)
    return config


@pytest.fixture
def config(coordinate_slide: Path, tmp_path: Path) -> Config:
    return tiled(tmp_path, {"C1": coordinate_slide})


def written(config: Config, format: Any, magnification: float, **options: Any) -> Path:
    folder = Path(config.results) / "export" / format
    selection = Selection(magnification, **options)
    slides = [row.slide_id for row in cohort_rows(config)]
    export(Path(config.results), slides, format, selection, config.tile.tile_px, folder)
    (path,) = folder.rglob("*.h5")
    return path


def clam_patches(h5: Path, slide: Path) -> dict[str, np.ndarray]:
    """CLAM's `Whole_Slide_Bag_FP`: read_region(coord, patch_level, (patch_size, patch_size))."""
    wsi = openslide.OpenSlide(slide)
    with h5py.File(h5) as file:
        coords, level, size = file["coords"], file["coords"].attrs["patch_level"], file["coords"].attrs["patch_size"]
        ids = [name.decode() for name in file["tile_id"]]
        return {
            name: np.asarray(wsi.read_region(coord, level, (size, size)).convert("RGB"))
            for name, coord in zip(ids, coords[:], strict=True)
        }


def trident_patches(h5: Path, slide: Path) -> dict[str, np.ndarray]:
    """TRIDENT's `WSIPatcher`: the level nearest below the downsample within .1, a square of it, resized."""
    wsi = openslide.OpenSlide(slide)
    with h5py.File(h5) as file:
        attributes, coords = dict(file["coords"].attrs), file["coords"][:]
        ids = [name.decode() for name in file["tile_id"]]
    source, wanted = 10 / attributes["level0_magnification"], 10 / attributes["target_magnification"]
    downsample, size = wanted / source, attributes["patch_size"]
    near = [n for n, d in enumerate(wsi.level_downsamples) if abs(d - downsample) <= 0.1]
    level = near[0] if near else max(n for n, d in enumerate(wsi.level_downsamples) if d <= downsample)
    side = round(round(size * downsample) / int(wsi.level_downsamples[level]))
    patches = {}
    for name, (x, y) in zip(ids, coords, strict=True):
        patch = np.asarray(wsi.read_region((x, y), level, (side, side)).convert("RGB"))
        patches[name] = patch if side == size else cv2.resize(patch, (size, size))
    return patches


@pytest.mark.parametrize("format", ["clam", "trident"])
@pytest.mark.parametrize("magnification", [2.5, 10, 40])
def test_their_reading_rules_give_our_tiles(
    config: Config, coordinate_slide: Path, format: str, magnification: float
) -> None:
    patches = {"clam": clam_patches, "trident": trident_patches}[format](
        written(config, format, magnification), coordinate_slide
    )
    table = pd.read_parquet(Path(config.results) / "tile" / "C1.parquet")
    wanted = table[(table["magnification"] == magnification) & (table["status"] == "ok")]
    assert list(patches) == list(wanted["tile_id"]) and len(patches) >= 1 and wanted["native"].all()
    with open_aligned(coordinate_slide, config.tile) as slide:
        for name, pixels in list(patches.items())[:: max(1, len(patches) // 40)]:
            assert np.array_equal(pixels, slide.tile(parse_tile_id(name)[1])), name


def test_a_level_that_the_slide_lacks_is_read_from_a_finer_one(coordinate_slide: Path, tmp_path: Path) -> None:
    """20x of levels 1/4/16: CLAM is given a square of twice the side at level 0, TRIDENT shrinks of itself."""
    config = tiled(tmp_path, {"C1": coordinate_slide}, magnifications=[10, 20, 40])
    patches = clam_patches(written(config, "clam", 20), coordinate_slide)
    assert {pixels.shape for pixels in patches.values()} == {(128, 128, 3)}
    shrunk = trident_patches(written(config, "trident", 20), coordinate_slide)
    with open_aligned(coordinate_slide, config.tile) as slide:
        for name in list(patches)[::50]:
            mine = slide.tile(parse_tile_id(name)[1])
            assert np.array_equal(cv2.resize(patches[name], (64, 64), interpolation=cv2.INTER_AREA), mine)
            assert np.abs(shrunk[name].astype(int) - mine).max() <= 1


@pytest.mark.parametrize("magnification", [2.5, 10, 40])
def test_levels_that_openslide_lacks_are_read_from_level_0(tmp_path: Path, magnification: float) -> None:
    """Of an OME-TIFF, whose levels are SubIFDs, CLAM sees the first alone; elsewhere it read black."""
    path = tmp_path / "slide.ome.tif"
    write_ome(path, LEVELS)
    config = tiled(tmp_path, {"C1": path})
    h5 = written(config, "clam", magnification)
    with h5py.File(h5) as file:
        coords = dict(zip((name.decode() for name in file["tile_id"]), file["coords"][:], strict=True))
        assert file["coords"].attrs["level_dim"].tolist() == [WIDTH, HEIGHT]
    patches = clam_patches(h5, path)
    side = round(64 * 40 / magnification)
    assert patches.keys() == coords.keys() and h5.stem == "slide"
    for name, pixels in patches.items():
        columns, rows, level = decode_coordinates(pixels)
        x, y = coords[name]
        assert (columns == np.arange(x, x + side)).all() and (rows == np.arange(y, y + side)[:, None]).all()
        assert not level.any()


def test_a_slide_that_openslide_cannot_open_is_not_for_clam(tmp_path: Path) -> None:
    path = tmp_path / "strips.tif"
    write_tiff(path, LEVELS[:1], mpp=0.25, tile=None, rowsperstrip=16)
    config = tiled(tmp_path, {"C1": path})
    with pytest.raises(MadError, match="strips.tif: CLAM cannot read it, since OpenSlide cannot"):
        written(config, "clam", 40)


def test_attributes_and_layout_are_those_of_the_tools(config: Config, coordinate_slide: Path) -> None:
    path = written(config, "clam", 10)
    assert path.relative_to(config.results) == Path("export/clam/10x_64px_0px_overlap/patches/coordinates.h5")
    assert (path.parents[1] / "process_list_autogen.csv").read_text().split() == ["slide_id", "coordinates.tiff"]
    with h5py.File(path) as file:
        assert file["coords"].dtype == np.int64 and file["coords"].shape[1] == 2
        found = {name: np.asarray(value).tolist() for name, value in file["coords"].attrs.items()}
    assert found == {
        "patch_size": 64,
        "patch_level": 1,
        "downsample": [4.0, 4.0],
        "downsampled_level_dim": [500, 475],
        "level_dim": [500, 475],
        "name": "coordinates",
        "save_path": str(path.parent),
    }
    path = written(config, "trident", 2.5)
    assert path.relative_to(config.results) == Path(
        "export/trident/2.5x_64px_0px_overlap/patches/coordinates_patches.h5"
    )
    with h5py.File(path) as file:
        found = {name: np.asarray(value).tolist() for name, value in file["coords"].attrs.items()}
    assert found == {
        "patch_size": 64,
        "patch_size_level0": 1024,
        "level0_magnification": 40,
        "target_magnification": 2.5,
        "overlap": 0,
        "name": "coordinates",
        "savetodir": str(path.parents[1]),
        "level0_width": 2000,
        "level0_height": 1900,
    }


def test_status_and_label_choose_tiles() -> None:
    table = pd.DataFrame(
        {"magnification": [10.0] * 4 + [40.0], "status": ["ok", "ok", "blank", "edge", "ok"]}
        | {"label": ["A", None, "A", "B", "A"], "tile_id": list("abcde")}
    )

    def chosen(**options: Any) -> str:
        return "".join(Selection(10, **options).of(table)["tile_id"])

    assert chosen() == "ab" and chosen(labels=["A"]) == "a" and chosen(status=["ok", "blank", "edge"]) == "abcd"
    assert chosen(status=["blank", "edge"], labels=["B", "C"]) == "d" and chosen(labels=["C"]) == ""


@pytest.mark.parametrize("format", ["clam", "trident"])
def test_a_slide_without_a_tile_is_left_out(config: Config, format: Any) -> None:
    """CLAM stops at a file without coordinates."""
    folder = Path(config.results) / "empty"
    assert export(Path(config.results), ["C1"], format, Selection(40, labels=["Gray Matter"]), 64, folder) == {}
    assert not list(folder.rglob("*.h5"))


def test_faults_are_named(config: Config, coordinate_slide: Path, tmp_path: Path) -> None:
    results, where = Path(config.results), tmp_path / "out"
    with pytest.raises(MadError, match=r"no slide was tiled at 20x; there is 2.5x, 10x, 40x"):
        export(results, ["C1"], "clam", Selection(20), 64, where)
    with pytest.raises(MadError, match="snakemake --cores 2 tile"):
        export(results, ["C2"], "clam", Selection(10), 64, where)
    other = tmp_path / "other"
    other.mkdir()
    (other / "coordinates.tiff").write_bytes(coordinate_slide.read_bytes())
    both = tiled(tmp_path, {"C1": coordinate_slide, "C2": other / "coordinates.tiff"})
    with pytest.raises(MadError, match="files of the name 'coordinates'.*export each with an --output of its own"):
        export(Path(both.results), ["C1", "C2"], "clam", Selection(10), 64, where)
    assert not where.exists()
    for slide in ("C1", "C2"):
        export(Path(both.results), [slide], "clam", Selection(10), 64, where / slide)
        (path,) = (where / slide).rglob("process_list_autogen.csv")
        assert path.read_text().split() == ["slide_id", "coordinates.tiff"]
        with h5py.File(path.parent / "patches" / "coordinates.h5") as file:
            assert file["tile_id"][0].startswith(slide.encode())


def test_clams_list_holds_what_earlier_calls_wrote(coordinate_slide: Path, tmp_path: Path) -> None:
    other = tmp_path / "a slide, the second.tiff"
    other.write_bytes(coordinate_slide.read_bytes())
    config = tiled(tmp_path, {"C1": coordinate_slide, "C2": other})
    for slide, listed in (("C2", [other.name]), ("C1", [other.name, "coordinates.tiff"]), ("C2", None)):
        export(Path(config.results), [slide], "clam", Selection(10), 64, tmp_path / "out")
        (path,) = (tmp_path / "out").rglob("process_list_autogen.csv")
        assert pd.read_csv(path)["slide_id"].tolist() == (listed or [other.name, "coordinates.tiff"])
    (path.parent / "patches" / f"{other.stem}.h5").unlink()
    export(Path(config.results), ["C1"], "clam", Selection(10), 64, tmp_path / "out")
    assert pd.read_csv(path)["slide_id"].tolist() == ["coordinates.tiff"]


def test_names_are_cut_as_trident_cuts_them() -> None:
    assert [slide_name(f"a/{name}") for name in ("S.1.svs", "S.ome.tiff", "S.OME.tif")] == ["S.1", "S", "S"]
