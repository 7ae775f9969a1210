"""The viewer: where its pictures and layers lie on the slide, which files there are, what the pages list, and the server."""

from __future__ import annotations

import http.client
import json
import math
import shutil
import socket
import struct
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import shapely
from conftest import decode_coordinates, write_tiff
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pipeline import configure
from slide_files import damage
from typer.testing import CliRunner

from mad.cli import app
from mad.config import Config, parse_config
from mad.files import MadError, read_json, read_parquet, write_json, write_parquet
from mad.reporting.layers import Layer, write_layer
from mad.reporting.overlay import class_colours
from mad.reporting.serve import open_server
from mad.slides.deepzoom import NAME, OVERLAP, TILE_PX, frame_of, last_single_tile, strips
from mad.slides.readers import open_slide
from mad.slides.sheet import cohort_rows, write_sheet
from mad.slides.shown import viewed_slides
from mad.stages import cohort, tile, viewer
from mad.tiles.pyramid import Grid, Ladder

CLASSES = {"a": "#0072b2", "b": "#e69f00", "c": "#009e73"}


@pytest.mark.parametrize("magnification, level", [(40, 0), (10, 1), (2.5, 2)])
def test_a_picture_s_pixel_is_that_of_its_place(coordinate_slide: Path, magnification: float, level: int) -> None:
    left, top, width, height = 160, 320, 1000, 903
    with open_slide(coordinate_slide) as slide:
        slide.properties = {
            f"openslide.bounds-{name}": str(value)
            for name, value in {"x": left, "y": top, "width": width, "height": height}.items()
        }
        frame = frame_of(slide, 0.25, magnification)
        assert frame.downsample == 4**level and (frame.left, frame.top) == (left, top)
        picture = np.concatenate(list(strips(slide, frame, rows=100)))
    assert picture.shape == (math.ceil(height / 4**level), math.ceil(width / 4**level), 3)
    x, y, read_from = decode_coordinates(picture)
    assert (read_from == level).all()
    assert (x == left // 4**level + np.arange(frame.width)).all()
    assert (y[:, 0] == top // 4**level + np.arange(frame.height)).all()


def test_a_picture_is_never_enlarged_and_strips_do_not_drift(coordinate_slide: Path) -> None:
    with open_slide(coordinate_slide) as slide:
        assert frame_of(slide, 1.0, 40).downsample == 1  # a 10x slide
        frame = frame_of(slide, 0.375, 10)  # 8 / 3 level-0 px per pixel
        assert frame.downsample == pytest.approx(1 / 0.375)
        picture = np.concatenate(list(strips(slide, frame, rows=7)))
    assert picture.shape == (frame.height, frame.width, 3)
    expected = (np.arange(frame.height) + 0.5) * frame.downsample - 0.5
    told = (expected % 256 > 8) & (expected % 256 < 248) & (expected < 1890)  # y modulo 256, up to the border
    assert np.abs(picture[told, 0, 1] - expected[told] % 256).max() < 1.5, "as far off at the end as at the start"


@settings(max_examples=40)
@given(
    finest=st.floats(28, 300), left=st.integers(0, 5000), top=st.integers(0, 5000), rows=st.integers(1, 2),
    columns=st.integers(1, 2), level=st.integers(0, 2), seed=st.integers(0, 99), keeps=st.booleans(),
)  # fmt: skip
def test_a_layer_s_pixel_lies_where_its_tile_does(
    tmp_path_factory: pytest.TempPathFactory, finest: float, left: int, top: int, rows: int, columns: int, level: int,
    seed: int, keeps: bool,
) -> None:  # fmt: skip
    """Exactly where the slide keeps its own pixels; elsewhere tiles are rounded to level-0 pixels, the layer's far border too."""
    finest = round(finest) if keeps else finest
    grid = Grid(
        Ladder((2.5, 10.0, 40.0)), finest, math.ceil(columns * 16 * finest), math.ceil(rows * 16 * finest), left, top
    )
    row, column = (place.ravel() for place in np.indices(grid.level_shape(level)))
    x, y, width, height = grid.rectangle(level, row, column)
    names = np.random.default_rng(seed).choice([*CLASSES, None], len(x))
    tiles = pd.DataFrame({"x": x, "y": y, "side": width, "class": names})
    folder = tmp_path_factory.mktemp("layer")
    told = write_layer(folder, Layer("e", 10.0, tiles, 0.5), CLASSES, (left, top, 10, 10), (9000, 9000))
    image = np.asarray(Image.open(folder / told["picture"]))
    x0, y0, wide, high = told["extent"]
    side_x, side_y = wide / image.shape[1], high / image.shape[0]
    off = 0 if keeps else 1.5
    for start, number, step, near, far in ((x0, column, side_x, x, x + width), (y0, row, side_y, y, y + height)):
        assert np.abs(start + number * step - near).max() <= off
        assert np.abs(start + (number + 1) * step - far).max() <= off
    found = [tuple(pixel) for pixel in image[row, column]]
    assert found == [(0, 0, 0, 0) if name is None else (*bytes.fromhex(CLASSES[name][1:]), 255) for name in names]
    shutil.rmtree(folder)


def test_polygons_count_as_qupath_does(tmp_path: Path) -> None:
    tiles = pd.DataFrame({"x": [300, 400], "y": [500, 500], "side": [100, 100], "class": ["a", "a"]})
    for bounds, corner in (((0, 0, 9000, 9000), [0, 0]), ((200, 100, 1000, 1000), [200, 100])):
        told = write_layer(tmp_path, Layer("e", 10.0, tiles), CLASSES, bounds, (9000, 9000))
        (feature,) = read_json(tmp_path / told["geojson"])["features"]
        ring = np.array(feature["geometry"]["coordinates"][0])
        assert (ring.min(axis=0) == np.array([300, 500]) - corner).all()
        assert feature["properties"]["classification"]["name"] == "a"


def test_slides_of_the_viewer() -> None:
    splits = {"S2": "test", "S1": "train", "S3": "test"}
    rows = [SimpleNamespace(slide_id=name, annotation="x", split=split) for name, split in splits.items()]

    def viewed(slides: object) -> list[str]:
        return viewed_slides(rows, parse_config({"viewer": {"slides": slides}}))

    assert viewed("maps") == ["S2"] == viewed_slides(rows, Config())
    assert viewed("all") == ["S2", "S1", "S3"]
    assert viewed(["S3", "S1", "S3"]) == ["S3", "S1"]
    with pytest.raises(MadError, match="no slide 'S33'; did you mean 'S3'"):
        viewed(["S33"])


# ---- files -------------------------------------------------------------------------------------------------------------------


def predict(config: Config, slide: str, encoders: dict[str, float]) -> pd.DataFrame:
    """Pretended predictions of every tile of the maps: the class of each is told by its place."""
    results, classes = Path(config.results), config.label.classes
    tiles = read_parquet(results / "tile" / f"{slide}.parquet")
    tiles = tiles[
        (tiles["status"] != "edge") & tiles["magnification"].isin(config.evaluate.segmentation_magnifications)
    ]
    number = (tiles["x"] // tiles["side"] + tiles["y"] // tiles["side"]) % len(classes)
    for shift, (encoder, score) in enumerate(encoders.items()):
        predicted = np.array(classes, object)[(number + shift) % len(classes)]
        folder = results / "evaluate" / encoder
        write_parquet(folder / "segmentation.parquet", tiles.assign(predicted=predicted))
        maps = [{"slide_id": slide, "magnification": m, "mean_iou": score} for m in (10.0, 40.0)]
        write_json(folder / "segmentation.json", {"status": "ok", "maps": maps})
    return tiles


@pytest.fixture(scope="module")
def small(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two slides, of which S02 is mapped by two encoders of three; a third slide is damaged."""
    folder = tmp_path_factory.mktemp("viewer")
    encoders = [{"name": name, "spec": "colour"} for name in ("first", "second", "third")]
    config = configure(folder, slides, encoders=encoders, viewer={"slides": "all", "magnification": 20, "quality": 95})
    with (folder / "slides.tsv").open("a") as sheet:
        sheet.write(f"bad\t{folder}/bad.tiff\tP3\ttrain\n")
    (folder / "bad.tiff").write_bytes(b"II*\x00 damaged")
    cohort.run(config)
    for row in cohort_rows(config):
        tile.run(config, row)
        viewer.run_slide(config, row)
    predict(config, "S02", {"first": 0.75, "second": 0.5})
    viewer.run(config)
    return config


def test_every_tile_of_a_pyramid_is_there(small: Config, slides: Path) -> None:
    folder = Path(small.results) / "report/viewer/pyramids/S01"
    told = read_json(folder / "slide.json")
    assert told["status"] == "ok" and told["downsample"] == 2 and (told["width"], told["height"]) == (896, 896)
    finest = math.ceil(math.log2(896))
    files = {path.relative_to(folder / f"{NAME}_files").as_posix() for path in (folder / f"{NAME}_files").rglob("*.*")}
    expected = set()
    for level in range(finest + 1):
        count = math.ceil(math.ceil(896 / 2 ** (finest - level)) / TILE_PX)
        expected |= {f"{level}/{column}_{row}.jpg" for column in range(count) for row in range(count)}
    assert files == expected
    thumbnail = Image.open(folder / f"{NAME}_files/{told['thumbnail_level']}/0_0.jpg")
    assert thumbnail.size == (448, 448), "the finest level of one tile"
    with open_slide(slides / "S01.tiff") as slide:
        wanted = slide.overview(2, 896, 896)
    corner = np.asarray(Image.open(folder / f"{NAME}_files/{finest}/1_1.jpg"), float)
    start = TILE_PX - OVERLAP
    assert corner.shape == (896 - start, 896 - start, 3)
    assert np.abs(corner - wanted[start:, start:]).mean() < 4, "JPEG"


@given(st.integers(1, 300_000), st.integers(1, 300_000))
def test_the_thumbnail_is_one_tile(width: int, height: int) -> None:
    level = last_single_tile(SimpleNamespace(width=width, height=height))  # type: ignore[arg-type]
    finest = math.ceil(math.log2(max(width, height)))
    assert 0 <= level <= finest
    assert math.ceil(max(width, height) / 2 ** (finest - level)) <= TILE_PX
    assert level == finest or math.ceil(max(width, height) / 2 ** (finest - level - 1)) > TILE_PX


def test_pages_list_what_there_is(small: Config) -> None:
    folder = Path(small.results) / "report" / "viewer"
    assert {path.name for path in (folder / "pages").iterdir()} == {"S01.html", "S02.html"}
    index = (folder / "index.html").read_text()
    assert "pages/S01.html" in index and "3 layers" in index and "7 layers" in index
    assert "pages/bad.html" not in index and "bad.tiff: no slide that can be read" in index
    page = (folder / "pages" / "S02.html").read_text()
    for name in ("labels.", "first_", "second_"):
        for magnification in ("10x", "40x"):
            assert f"../layers/S02/{name}{magnification}.geojson" in page
            assert (folder / f"layers/S02/{name}{magnification}.png").exists()
    assert "third" not in page and "0.75" in page
    assert page.index("../layers/S02/annotation.geojson") < page.index("../layers/S02/labels.10x.geojson")
    told = json.loads(page.split('id="page">')[1].split("</script>")[0])
    assert told["classes"] == [list(item) for item in class_colours(small.label).items()], "the figures' colours"
    licence = (folder / "assets" / "openseadragon.LICENSE.txt").read_text()
    assert "Redistribution" in licence
    assert "http" not in page.split("<body")[1].split("<script")[0], "nothing comes from elsewhere"


def test_labels_are_those_of_the_tile_table(small: Config) -> None:
    folder = Path(small.results)
    tiles = read_parquet(folder / "tile" / "S02.parquet")
    tiles = tiles[tiles["magnification"] == 40]
    image = np.asarray(Image.open(folder / "report/viewer/layers/S02/labels.40x.png"))
    colours = class_colours(small.label)
    for x, y, side, label in tiles[["x", "y", "side", "label"]].itertuples(index=False):
        expected = (0, 0, 0, 0) if pd.isna(label) else (*bytes.fromhex(colours[label][1:]), 255)
        assert tuple(image[y // side, x // side]) == expected


def test_the_annotation_is_that_of_the_sheet(small: Config, slides: Path) -> None:
    drawn, shown = (
        read_json(path)["features"]
        for path in (slides / "S02.geojson", Path(small.results) / "report/viewer/layers/S02/annotation.geojson")
    )
    assert len(drawn) == len(shown)
    for before, after in zip(drawn, shown, strict=True):
        assert before["properties"]["classification"]["name"] == after["properties"]["classification"]["name"]
        assert shapely.geometry.shape(before["geometry"]).equals(shapely.geometry.shape(after["geometry"]))


def test_an_annotation_that_cannot_be_read_costs_its_layer_alone(small: Config, tmp_path: Path) -> None:
    root = Path(small.results)
    for part in ("tile", "evaluate", "report/viewer/pyramids"):
        shutil.copytree(root / part, tmp_path / "results" / part)
    (tmp_path / "bad.geojson").write_text("{")
    sheet = Path(str(small.cohort.sheet)).read_text()
    path_of = {row.slide_id: str(row.annotation) for row in cohort_rows(small)}
    (tmp_path / "slides.tsv").write_text(
        sheet.replace(path_of["S01"], str(tmp_path / "bad.geojson")).replace(path_of["S02"], "")
    )
    changed = {
        "results": str(tmp_path / "results"),
        "cohort": small.cohort.model_copy(update={"sheet": str(tmp_path / "slides.tsv")}),
    }
    config = small.model_copy(update=changed)
    viewer.run(config)
    page = (tmp_path / "results/report/viewer/pages/S01.html").read_text()
    assert "labels.10x.png" in page and "annotation.geojson" not in page
    assert "annotation.geojson" not in (tmp_path / "results/report/viewer/pages/S02.html").read_text(), (
        "none in the sheet"
    )
    with pytest.raises(MadError, match=r"bad\.geojson: no QuPath GeoJSON"):
        viewer.run(config.model_copy(update={"on_bad_slide": "fail"}))


def test_a_missing_pyramid_is_named(small: Config, tmp_path: Path) -> None:
    with pytest.raises(MadError, match="run `mad viewer S01` first"):
        viewer.run(small.model_copy(update={"results": str(tmp_path)}))


def test_a_damaged_slide_stops_only_where_that_is_wanted(small: Config) -> None:
    bad = next(row for row in cohort_rows(small) if row.slide_id == "bad")
    with pytest.raises(MadError, match="no slide that can be read"):
        viewer.run_slide(small.model_copy(update={"on_bad_slide": "fail"}), bad)
    kept = Path(small.results) / "report/viewer/pyramids/bad/slide.json"
    assert read_json(kept)["status"] == "failed", "what was there stays"


def test_what_cannot_be_decoded_is_black_in_the_picture(tmp_path: Path) -> None:
    """One level alone; a strip that is lost whole, and one damaged tile beside whole ones."""
    pixels = np.random.default_rng(0).integers(100, 200, (1024, 768, 3), np.uint8)
    write_tiff(tmp_path / "S.tiff", [pixels], 0.25)
    damage(tmp_path / "S.tiff", [0, 1, 2, 7])
    pixels[:256] = pixels[512:768, 256:512] = 0
    with open_slide(tmp_path / "S.tiff") as slide:
        picture = np.concatenate(list(strips(slide, frame_of(slide, 0.25, 40), rows=256)))
    assert np.array_equal(picture, pixels)


def test_a_viewer_of_no_slide_says_so(tmp_path: Path) -> None:
    write_sheet(tmp_path / "s.tsv", [{"slide_id": "S", "path": "S.tiff", "patient_id": "P", "split": "train"}])
    config = parse_config({"results": str(tmp_path / "results"), "cohort": {"sheet": str(tmp_path / "s.tsv")}})
    viewer.run(config)
    assert "No slide can be shown" in (tmp_path / "results/report/viewer/index.html").read_text()


# ---- the server ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(small: Config) -> object:
    with open_server(Path(small.results) / "report" / "viewer") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_the_server_gives_the_files(small: Config, address: str) -> None:
    for name in (
        "",
        "pages/S02.html",
        "assets/viewer.js",
        "layers/S02/first_10x.png",
        "pyramids/S01/slide_files/0/0_0.jpg",
    ):
        with urllib.request.urlopen(address + name) as answer:
            assert answer.status == 200
            assert answer.read() == (Path(small.results) / "report/viewer" / (name or "index.html")).read_bytes()
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(address + "../../tile/S01.parquet")


def test_the_server_answers_to_this_machine_alone(address: str) -> None:
    port = int(address.rsplit(":", 1)[1].strip("/"))

    def status(path: str, host: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path, headers={"Host": host})
        return connection.getresponse().status

    for host in (f"127.0.0.1:{port}", "localhost", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert status("/", host) == 200
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "[", ""):
        assert status("/", host) == 403
    assert status("/%00", "localhost") == 404


def test_a_browser_that_hangs_up_prints_nothing(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    port = int(address.rsplit(":", 1)[1].strip("/"))
    for _ in range(3):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets
        connection.sendall(b"GET /assets/viewer.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv(1)
        connection.close()
    with urllib.request.urlopen(address) as answer:  # it lives on
        assert answer.status == 200
    deadline = time.monotonic() + 10
    while (
        any("process_request_thread" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert capfd.readouterr().err == ""


def test_view_names_what_is_wrong(small: Config, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["view", str(tmp_path)])
    assert isinstance(done.exception, MadError) and f"{tmp_path}: no viewer there" in str(done.exception)
    folder = Path(small.results) / "report" / "viewer"
    with open_server(folder) as server, pytest.raises(MadError, match=f"port {server.server_port} cannot be used"):
        open_server(folder, server.server_port)
