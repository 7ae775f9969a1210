"""Stage `tile` on slides that lack pixels: too coarse for a magnification, or damaged where nothing else shows the place."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import write_tiff
from slide_files import damage

from mad.config import Config, parse_config
from mad.files import MadError, read_json
from mad.reporting.plan import plan
from mad.slides.readers import OpenSlideReader, ReadError, open_slide
from mad.slides.sheet import cohort_rows, write_sheet
from mad.stages import cohort, qc, tile

SIDE, STORED = 1536, 256
PEN_FREE = np.array([200, 120, 170])  # tissue: no ink


def tissue_on_glass() -> np.ndarray:
    """Glass with a square of tissue from pixel 256 to 1280."""
    pixels = np.full((SIDE, SIDE, 3), 240, np.uint8)
    noise = np.random.default_rng(0).integers(-20, 20, (1024, 1024, 1))
    pixels[256:1280, 256:1280] = PEN_FREE + noise
    return pixels


def configure(folder: Path, annotation: str = "", **tile_options: Any) -> Config:
    write_sheet(
        folder / "slides.tsv", [{"slide_id": "S", "path": "S.tiff", "patient_id": "P", "annotation": annotation}]
    )
    sheet = {"sheet": str(folder / "slides.tsv"), "split_by": "block"}
    options = {"magnifications": [10, 40], "tile_px": 64, **tile_options}
    return parse_config({"results": str(folder / "results"), "cohort": sheet, "tile": options})


def tiled(config: Config) -> tuple[dict[str, Any], pd.DataFrame]:
    tile.run(config, cohort_rows(config)[0])
    folder = Path(config.results) / "tile"
    return read_json(folder / "S.json"), pd.read_parquet(folder / "S.parquet")


def test_enlarged_magnifications_are_told(tmp_path: Path) -> None:
    """A 20x scan under `upsample`: in the table, in the remark, and by the contract's own words."""
    write_tiff(tmp_path / "S.tiff", [tissue_on_glass()], mpp=0.5)
    told, table = tiled(configure(tmp_path, magnifications=[2.5, 10, 40], on_missing_scale="upsample"))
    found = table.groupby("magnification")["pyramid"].unique().map(list).to_dict()
    assert found == {2.5: ["area"], 10.0: ["area"], 40.0: ["enlarged"]} and not table["native"].any()
    assert told["status"] == "ok" and told["cause"] == "40x enlarged 2x: finer than the slide's 0.5 um/px"
    contract = (Path(__file__).parents[1] / "docs" / "data-contracts.md").read_text()
    (line,) = (line for line in contract.splitlines() if line.startswith("| `pyramid` | string"))
    assert all(f"`{value}`" in line for value in ("scanner", "area", "enlarged"))
    told, table = tiled(configure(tmp_path, magnifications=[2.5, 10, 40]))
    assert "40x left out" in told["cause"] and "enlarged" not in set(table["pyramid"])


@pytest.mark.parametrize(("codec", "block"), [("jpeg", 1), ("deflate", 3)])
def test_damaged_tiles_cost_their_own_place_alone(tmp_path: Path, codec: str, block: int) -> None:
    """One stored tile in the midst of the tissue; nine, which painted black would be large enough for ink."""
    write_tiff(tmp_path / "S.tiff", [tissue_on_glass()], 0.25, compression=codec)
    config = configure(tmp_path)
    _, whole = tiled(config)
    rows = range(2, 2 + block)
    damage(tmp_path / "S.tiff", [6 * row + column for row in rows for column in rows])
    told, table = tiled(config)
    area = {1: "0.0041", 3: "0.037"}[block]  # (block x 256 x .25 um)^2
    assert told["status"] == "ok" and told["cause"].startswith(f"{area} mm2 of the slide cannot be decoded")
    first, end, margin = 512, 512 + 256 * block, 64  # 16 um around what is black
    inside = table["x"].between(first, end - 1) & table["y"].between(first, end - 1)
    assert inside.sum() == 17 * block**2 and (whole.loc[inside, "status"] == "ok").all()
    assert (table.loc[inside, "status"] == "blank").all() and (table.loc[inside, "tissue"] == 0).all()
    near = (table["x"] + table["side"] > first - margin) & (table["x"] < end + margin)
    near &= (table["y"] + table["side"] > first - margin) & (table["y"] < end + margin)
    assert (~near).sum() > 300
    pd.testing.assert_frame_equal(table[~near], whole[~near])
    assert (table["pen"] == 0).all()
    assert plan(config)["slides"][0]["error"] is None


def test_a_thin_damaged_strip_is_neither_tissue_nor_glass(tmp_path: Path) -> None:
    """4 um of 16, one row of the masks' cells: thinner than what they see as black."""
    write_tiff(tmp_path / "S.tiff", [tissue_on_glass()], 0.25, tile=None, rowsperstrip=16)
    (tmp_path / "S.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    config = configure(tmp_path, annotation="S.geojson")
    _, whole = tiled(config)
    damage(tmp_path / "S.tiff", [640 // 16])
    _, table = tiled(config)
    row = (table["magnification"] == 40) & (table["y"] == 640)
    tissue, glass = row & table["x"].between(320, 1151), row & ~table["x"].between(192, 1279)
    assert (whole.loc[tissue, "tissue"] == 1).all() and (whole.loc[glass, "share_Background"] == 1).all()
    assert (table.loc[tissue, "tissue"] == 0.75).all() and (table.loc[glass, "share_Background"] == 0.75).all()


def test_glass_alone_is_remarked_on_as_no_label(tmp_path: Path) -> None:
    """By default glass of an annotated slide is labelled: that hides no annotation that gave nothing."""
    write_tiff(tmp_path / "S.tiff", [tissue_on_glass()], 0.25)
    (tmp_path / "S.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    config = configure(
        tmp_path, annotation="S.geojson", tile_px=48
    )  # tiles at the corners of the tissue are mostly glass
    cohort.run(config)
    tiled(config)
    qc.run(config)
    (facts,) = read_json(tmp_path / "results" / "report" / "qc.json")["slides"]
    assert facts["warnings"] == ["annotated, but no tile got a label other than Background"]


def test_the_rest_of_an_overview_is_as_it_was(tmp_path: Path) -> None:
    """Both readers; two levels, both damaged: the finer one is read around its own damage."""
    pixels = tissue_on_glass()
    path = tmp_path / "S.tiff"
    write_tiff(path, [pixels, pixels[::4, ::4]], 0.25)
    whole = OpenSlideReader(path).overview(16.0, 97, 97)  # the last row and column lie beyond the border
    with tifffile.TiffFile(path) as file:
        second = file.pages[1].dataoffsets[0], file.pages[1].databytecounts[0]
    with path.open("r+b") as file:
        file.seek(second[0])
        file.write(bytes(second[1]))
    for reader in (open_slide(path), OpenSlideReader(path)):
        view, lost = reader.salvaged_overview(16.0, 97, 97)  # from level 0, which is whole
        assert not lost.any() and np.abs(view.astype(int) - whole).max() < 25  # the level was not averaged
    whole = view
    damage(path, [7, 35])  # the last is the slide's lower right corner
    for reader in (open_slide(path), OpenSlideReader(path)):
        with pytest.raises(ReadError):
            reader.overview(16.0, 96, 96)
        view, lost = reader.salvaged_overview(16.0, 97, 97)
        expected = np.zeros((97, 97), bool)
        expected[16:32, 16:32] = expected[80:96, 80:96] = True
        assert np.array_equal(lost, expected) and (view[lost] == 0).all()
        assert np.array_equal(view[~lost], whole[~lost])
        shifted, part = reader.salvaged_overview(16.0, 50, 40, left=160, top=320)
        assert np.array_equal(part, expected[20:70, 10:50]) and (shifted[part] == 0).all()


def test_a_slide_without_a_whole_tile_fails_by_name(tmp_path: Path) -> None:
    write_tiff(tmp_path / "S.tiff", [tissue_on_glass()], 0.25)
    damage(tmp_path / "S.tiff", list(range(36)))
    for reader in (open_slide(tmp_path / "S.tiff"), OpenSlideReader(tmp_path / "S.tiff")):
        with pytest.raises(ReadError, match="more than 50% of the slide cannot be decoded: copy it anew"):
            reader.salvaged_overview(16.0, 200, 200)
    config = configure(tmp_path)
    told, table = tiled(config)
    assert told["status"] == "failed" and "copy it anew" in told["cause"] and table.empty
    with pytest.raises(MadError, match="tile in row 0, column 0"):
        tile.run(config.model_copy(update={"on_bad_slide": "fail"}), cohort_rows(config)[0])
