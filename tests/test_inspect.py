"""`mad inspect`: what is said of a slide is what tiling does with it."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import heed_permissions, write_tiff
from PIL import ImageCms
from rich.console import Console
from slide_files import LEVELS, write_aperio, write_dicom, write_jpeg_2000, write_ome
from typer.testing import CliRunner

from mad.cli import app
from mad.config.model import TileConfig
from mad.files import MadError, to_json
from mad.reporting.inspect import describe, describe_each, render
from mad.tiles.aligned import open_aligned
from mad.tiles.index import tile_table

CONFIG = TileConfig(tile_px=112)
GREY = np.full((1100, 1300, 3), 200, np.uint8)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One level of 1300 x 1100 px at 0.5 um/px, JPEG."""
    path = tmp_path_factory.mktemp("single") / "half.tiff"
    write_tiff(path, [GREY], mpp=0.5, compression="jpeg")
    return path


@pytest.fixture(scope="module")
def scaleless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide that tells no um/px."""
    path = tmp_path_factory.mktemp("scaleless") / "nompp.tiff"
    write_tiff(path, [GREY], mpp=None)
    return path


def test_a_40x_pyramid_is_native_at_every_level(coordinate_slide: Path) -> None:
    found = describe(coordinate_slide, CONFIG)
    assert found["error"] is None
    assert (found["vendor"], found["reader"], found["compression"]) == ("generic-tiff", "TiffReader", "DEFLATE")
    assert (found["dimensions"], found["bounds"]) == ([2000, 1900], [0, 0, 2000, 1900])
    assert (found["storage_tile"], found["icc_profile_bytes"]) == ([256, 256], None)
    assert found["mpp"] == pytest.approx(0.25) and found["mpp_source"] == "TIFF resolution"
    assert [level["mpp"] for level in found["levels"]] == pytest.approx([0.25, 1, 4], rel=5e-3)
    rows = found["magnifications"]
    assert [(row["magnification"], row["level"], row["native"]) for row in rows] == [
        (2.5, 2, True),
        (10, 1, True),
        (40, 0, True),
    ]
    assert [row["shrink"] for row in rows] == [1, 1, 1]
    assert [row["tile_side_px"] for row in rows] == [1792, 448, 112]
    assert (found["grid"]["touching"], found["grid"]["whole"]) == ([2, 2], [1, 1])
    assert found["grid"]["keeps_pixel_grid"]


def test_a_20x_slide_is_shrunk_and_loses_40x(single: Path) -> None:
    """At 0.5 um/px, 10x is level 0 shrunk 2x, 2.5x shrunk 8x; 40x is dropped, or enlarged where that is asked for."""
    found = describe(single, CONFIG)
    assert found["compression"] == "JPEG" and found["reader"] == "TiffReader"
    coarse, middle, fine = found["magnifications"]
    assert (coarse["shrink"], middle["shrink"]) == (pytest.approx(8, rel=1e-6), pytest.approx(2, rel=1e-6))
    assert not coarse["native"] and not middle["native"]
    assert (fine["available"], fine["tiles"], fine["tiles_whole"]) == (False, 0, 0)
    assert not found["grid"]["keeps_pixel_grid"]
    enlarged = describe(single, CONFIG.model_copy(update={"on_missing_scale": "upsample"}))["magnifications"][2]
    assert enlarged["available"] and enlarged["shrink"] == pytest.approx(0.5) and enlarged["tiles"] > 0
    failed = describe(single, CONFIG.model_copy(update={"on_missing_scale": "fail"}))
    assert failed["mpp"] == pytest.approx(0.5) and failed["grid"] is None
    assert "on_missing_scale" in failed["error"]


@pytest.mark.parametrize("mpp", [None, 0.3, 0.125])
@pytest.mark.parametrize("slide", ["coordinate_slide", "single"])
def test_tiles_are_those_of_the_tile_table(slide: str, mpp: float | None, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(slide)
    found = describe(path, CONFIG, mpp)
    with open_aligned(path, CONFIG, mpp) as aligned:
        cells = np.ones(aligned.grid.level_shape(2), np.int64)
        options = {"min_tissue": 0.1, "min_annotated": 0.5}
        table = tile_table("S", aligned.grid, aligned.plan, cells, cells[..., None], (1, 1), ["A"], **options)
    assert len(table) > 0
    for row in found["magnifications"]:
        part = table[table["magnification"] == row["magnification"]]
        assert row["tiles"] == len(part)
        assert row["tiles_whole"] == (part["status"] == "ok").sum()
        if len(part):
            assert set(part["level"]) == {row["level"]} and set(part["native"]) == {row["native"]}
            assert part["mpp"].iloc[0] == pytest.approx(row["mpp"])


def test_a_slide_without_scale_still_tells_the_rest_and_the_mend(scaleless: Path) -> None:
    found = describe(scaleless, CONFIG)
    assert found["dimensions"] == [1300, 1100] and found["levels"][0]["mpp"] is None
    assert found["mpp"] is None and found["magnifications"] == []
    assert "`mpp` column" in found["error"]
    given = describe(scaleless, CONFIG, mpp=0.25)
    assert (given["mpp"], given["mpp_source"], given["error"]) == (0.25, "cohort sheet", None)


def test_an_icc_profile_is_told(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_tiff(tmp_path / "icc.tiff", [GREY], mpp=0.25, iccprofile=profile)
    assert describe(tmp_path / "icc.tiff", CONFIG)["icc_profile_bytes"] == len(profile)


def test_formats_tell_reader_codec_scale_and_profile(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_ome(tmp_path / "a.ome.tif", LEVELS, compression="webp", iccprofile=profile)
    write_aperio(tmp_path / "b.svs")
    write_jpeg_2000(tmp_path / "c.svs", 33005)
    write_dicom(tmp_path, LEVELS, "1.2.840.10008.1.2.4.90", icc=profile)
    found = [describe(tmp_path / name, CONFIG) for name in ("a.ome.tif", "b.svs", "c.svs", "0.dcm")]
    assert [(f["vendor"], f["reader"], f["compression"], f["mpp_source"]) for f in found] == [
        ("ome-tiff", "TiffReader", "WEBP", "OME-XML"),
        ("aperio", "TiffReader", "DEFLATE", "vendor property"),
        ("aperio", "OpenSlideReader", "APERIO_JP2000_RGB", "vendor property"),
        ("dicom", "OpenSlideReader", "ISO_15444_1", "vendor property"),
    ]
    assert [f["icc"].split(" (")[0] for f in found] == ["kept", "none", "none", "kept"]
    assert describe(tmp_path / "0.dcm", CONFIG.model_copy(update={"icc": "apply"}))["icc"].startswith("applied to sRGB")
    console = Console(width=140, record=True, file=io.StringIO())
    for facts in found:
        console.print(*render(facts), sep="\n")
    text = console.export_text()
    for part in (
        "ome-tiff, read by TiffReader",
        "compression WEBP",
        "(OME-XML)",
        "kept (sRGB",
        "dicom, read by OpenSlideReader",
    ):
        assert part in text


def test_what_contradicts_the_file_is_warned_of(single: Path) -> None:
    assert "the sheet wins" in describe(single, CONFIG, mpp=0.25)["warning"]


def test_what_is_no_slide_is_an_error_and_the_next_goes_on(tmp_path: Path, single: Path) -> None:
    text = tmp_path / "notes.svs"
    text.write_text("no slide")
    with pytest.raises(MadError, match="whole-slide"):
        describe(text, CONFIG)
    found = describe_each([text, tmp_path / "none.svs", single], CONFIG)
    assert [bool(facts["error"]) for facts in found] == [True, True, False]
    assert "no such slide" in found[1]["error"]


def test_values_survive_json(coordinate_slide: Path, single: Path, scaleless: Path) -> None:
    found = describe_each([coordinate_slide, single, scaleless, Path("none.svs")], CONFIG)
    assert json.loads(to_json(found)) == found


def test_tables_show_every_case(coordinate_slide: Path, single: Path, scaleless: Path) -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    for facts in describe_each([coordinate_slide, single, scaleless, Path("none.svs")], CONFIG):
        console.print(*render(facts), sep="\n")
    text = console.export_text()
    for part in (
        "native",
        "shrunk 8x",
        "dropped",
        "1792",
        "unknown",
        "2 x 2 coarsest tiles",
        "none.svs: no such slide",
    ):
        assert part in text


def test_command(tmp_path: Path, coordinate_slide: Path, scaleless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2 where a slide fails, JSON of all slides, the ladder of --config; without a file the defaults."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAD_CONFIG", raising=False)
    config = tmp_path / "own.yaml"
    config.write_text("tile: {magnifications: [5, 20], tile_px: 128}\n")
    run = CliRunner().invoke(app, ["inspect", str(scaleless), str(coordinate_slide), "--json", "--config", str(config)])
    assert run.exit_code == 2
    bad, good = json.loads(run.stdout)
    assert bad["error"] and not good["error"]
    assert [row["magnification"] for row in good["magnifications"]] == [5, 20]
    assert good["grid"]["tile_px"] == 128
    run = CliRunner().invoke(app, ["inspect", str(coordinate_slide)])
    assert run.exit_code == 0 and "tiles of 224 px" in run.stdout
    run = CliRunner().invoke(app, ["inspect", str(scaleless), "--mpp", "0.25"])
    assert run.exit_code == 0 and "cohort sheet" in run.stdout


def test_a_slide_that_may_not_be_read_is_told_beside_the_rest(tmp_path: Path, coordinate_slide: Path) -> None:
    locked = tmp_path / "locked.svs"
    locked.touch(mode=0)
    command = [sys.executable, "-m", "mad", "inspect", str(locked), str(coordinate_slide)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, preexec_fn=heed_permissions)
    assert done.returncode == 2 and "mend its permissions" in " ".join(done.stdout.split()), done.stderr
    assert "2000 x 1900 px" in done.stdout


def test_real_slides(real_slides: Path) -> None:
    paths = sorted(real_slides.glob("*.svs"))
    assert paths and all(facts["error"] is None for facts in describe_each(paths, CONFIG))
