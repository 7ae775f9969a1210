"""The pages in a real browser: nothing fails to load, nothing is logged as an error, and what is shown is where it belongs."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import shapely
from browser import open_browser
from conftest import write_tiff
from PIL import Image
from test_qc_page import slides
from test_tables import small_table
from test_viewer import predict

from mad.config import parse_config
from mad.files import read_json, read_parquet, write_json, write_parquet
from mad.reporting.overlay import class_colours
from mad.reporting.qc_page import qc_page
from mad.reporting.quality import cohort_quality
from mad.reporting.serve import open_server
from mad.reporting.table_page import table_page
from mad.slides.sheet import cohort_rows, write_sheet
from mad.stages import cohort, tile, viewer

LOADED = "typeof viewer !== 'undefined' && viewer.world.getItemAt(0)?.getFullyLoaded() && !viewer.isAnimating()"
PIXEL = """
const [canvas, x, y] = arguments, at = toScreen(x, y), ratio = canvas.width / canvas.clientWidth;
return [...canvas.getContext("2d").getImageData(Math.floor(at.x * ratio), Math.floor(at.y * ratio), 1, 1).data];
"""

REPORT = Path(__file__).parents[1] / "results" / "report" / "report.html"


def test_the_viewer(tmp_path: Path) -> None:
    """A slide that is dark where one 10x tile lies, and layers that set this tile apart: both are seen at the same place."""
    side = 448
    column, row = 2, 1
    pixels = np.full((4 * side, 4 * side, 3), 235, np.uint8)
    pixels[row * side : (row + 1) * side, column * side : (column + 1) * side] = (90, 30, 120)
    write_tiff(tmp_path / "S.tiff", [np.ascontiguousarray(pixels[::step, ::step]) for step in (1, 4, 16)], mpp=0.25)
    write_sheet(tmp_path / "s.tsv", [{"slide_id": "S", "path": "S.tiff", "patient_id": "P", "split": "test"}])
    config = parse_config({
        "results": str(tmp_path / "results"), "cohort": {"sheet": str(tmp_path / "s.tsv")}, "tile": {"tile_px": 112},
        "encoders": [{"name": name, "spec": "colour"} for name in ("first", "second")], "viewer": {"slides": "all"},
    })  # fmt: skip
    cohort.run(config)
    (slide,) = cohort_rows(config)
    tile.run(config, slide)
    viewer.run_slide(config, slide)
    predict(config, "S", {"first": 0.75, "second": 0.5})
    for encoder in ("first", "second"):
        path = tmp_path / "results/evaluate" / encoder / "segmentation.parquet"
        table = read_parquet(path)
        inside = (table["x"] // side == column) & (table["y"] // side == row)
        write_parquet(path, table.assign(predicted=np.where(inside, "Gray Matter", "Background")))
    viewer.run(config)
    colours = [(*bytes.fromhex(class_colours(config.label)[name][1:]), 255) for name in ("Gray Matter", "Background")]

    with open_server(tmp_path / "results/report/viewer") as server, open_browser(tmp_path / "profile") as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}/"
        browser.driver.get(root)
        browser.wait("document.images.length === 1 && document.images[0].complete && document.images[0].naturalWidth")
        browser.driver.find_element("partial link text", "S").click()
        browser.wait(LOADED)
        boxes = browser.driver.find_elements("css selector", "input[type=checkbox]")
        assert len(boxes) == 4 and [box.is_selected() for box in boxes] == [True, False, False, False]
        browser.wait("layers.every((layer) => layer.pixels)")

        def colour(what: str, x: float, y: float) -> tuple[int, ...]:
            return tuple(browser.run(PIXEL, browser.driver.find_element("css selector", what), x, y))

        def check_places(reach: float) -> None:
            """The slide and the layer change colour at the tile's four borders, to `reach` level-0 px."""
            for x, y, inside in (
                *((column * side + sign * reach, (row + 0.5) * side, sign > 0) for sign in (-1, 1)),
                *(((column + 1) * side + sign * reach, (row + 0.5) * side, sign < 0) for sign in (-1, 1)),
                *(((column + 0.5) * side, row * side + sign * reach, sign > 0) for sign in (-1, 1)),
                *(((column + 0.5) * side, (row + 1) * side + sign * reach, sign < 0) for sign in (-1, 1)),
            ):
                assert colour("#maps", x, y) == colours[0 if inside else 1], (x, y)
                assert (colour(".openseadragon-canvas > canvas", x, y)[1] < 130) == inside, (x, y)

        browser.run("const range = document.querySelector('input[type=range]'); range.value = 100; range.oninput()")
        check_places(reach=12)
        browser.driver.find_element("id", "in").click()
        browser.wait(LOADED)
        browser.run(
            "const [x, y, side] = arguments, at = toPicture(x - side / 4, y - side / 4), wide = (1.5 * side) / slide.downsample;"
            "viewer.viewport.fitBounds(viewer.world.getItemAt(0).imageToViewportRectangle(at.x, at.y, wide, wide), true); draw()",
            column * side, row * side, side,
        )  # fmt: skip
        browser.wait(LOADED)
        check_places(reach=6)
        assert "µm" in browser.driver.find_element("id", "scale").text
        browser.hover("#slide")
        size = browser.run("return [viewer.canvas.clientWidth, viewer.canvas.clientHeight]")
        middle = browser.run("return toSlide(new OpenSeadragon.Point(...arguments))", size[0] / 2, size[1] / 2)
        told = browser.driver.find_element("id", "cursor").text
        assert abs(int(told.split("x ")[1].split(",")[0]) - middle[0]) < 8 and "first 10x: " in told

        boxes[0].click()
        assert colour("#maps", (column + 0.5) * side, (row + 0.5) * side)[3] == 0, "switched off"
        boxes[3].click()
        assert colour("#maps", (column + 0.5) * side, (row + 0.5) * side)[3] in (127, 128), "half transparent"
        assert browser.driver.save_screenshot(str(tmp_path / "shot.png"))
        assert len(np.unique(np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).reshape(-1, 3), axis=0)) > 20

        browser.read_logs()
        server.shutdown()
    assert not browser.errors and not browser.unanswered
    assert set(browser.answers.values()) <= {200, 304}
    foreign = [address for address in browser.answers if not address.startswith((root, "data:", "chrome", "about:"))]
    assert not foreign, "the viewer needs no network"


OUTER, HOLE = (400, 300, 1300, 1100), (700, 500, 900, 800)  # left, top, right, bottom in level-0 px of what is scanned
CORNER = (1000, 500)  # of what is scanned on the slide


def test_an_annotation_is_drawn_where_it_lies(tmp_path: Path) -> None:
    """Of a slide whose scanned area starts elsewhere than the slide: QuPath counts from its corner, the page from the slide's."""
    pixels = np.full((1792, 1792, 3), 235, np.uint8)
    write_tiff(tmp_path / "S.tiff", [np.ascontiguousarray(pixels[::step, ::step]) for step in (1, 4, 16)], mpp=0.25)
    areas = {
        "White Matter": shapely.Polygon(shapely.box(*OUTER).exterior, [shapely.box(*HOLE).exterior]),
        "3": shapely.box(1200, 1000, 1500, 1400),
        "Unknown": shapely.box(100, 100, 200, 200),
    }
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(area),
            "properties": {"classification": {"name": name}},
        }
        for name, area in areas.items()
    ]
    write_json(tmp_path / "S.geojson", {"type": "FeatureCollection", "features": features})
    record = {"slide_id": "S", "path": "S.tiff", "patient_id": "P", "split": "test", "annotation": "S.geojson"}
    write_sheet(tmp_path / "s.tsv", [record])
    config = parse_config({
        "results": str(tmp_path / "results"), "cohort": {"sheet": str(tmp_path / "s.tsv")}, "tile": {"tile_px": 112},
        "viewer": {"slides": "all"}, "label": {"classes": ["White Matter", "3", "Background"]},
    })  # fmt: skip
    cohort.run(config)
    (slide,) = cohort_rows(config)
    tile.run(config, slide)
    viewer.run_slide(config, slide)
    facts = tmp_path / "results/report/viewer/pyramids/S/slide.json"
    told = {"left": CORNER[0], "top": CORNER[1], "bounds": [*CORNER, 1792, 1792], "size": [4000, 3000]}
    write_json(facts, read_json(facts) | told)
    viewer.run(config)
    colours = {name: (*bytes.fromhex(colour[1:]), 255) for name, colour in class_colours(config.label).items()}

    with open_server(tmp_path / "results/report/viewer") as server, open_browser(tmp_path / "profile") as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}/"
        browser.driver.get(f"{root}pages/S.html")
        browser.wait(LOADED)
        browser.wait("layers.every((layer) => layer.pixels || layer.paths)")
        maps = browser.driver.find_element("css selector", "#maps")
        box = browser.driver.find_element("css selector", "input[type=checkbox]")
        assert box.is_selected() and box.find_element("xpath", "..").text.strip() == "annotation", "it comes first"

        def colour(x: float, y: float) -> tuple[int, ...]:
            return tuple(browser.run(PIXEL, maps, CORNER[0] + x, CORNER[1] + y))

        def check_borders(places: tuple[int, int, int, int], wanted: tuple[int, ...]) -> float:
            """The class's colour on all four sides up to the corners; none 4 px of the screen to either side, or further on."""
            left, top, right, bottom = places
            off = 4 / browser.run("return toScreen(1, 0).x - toScreen(0, 0).x")
            for share in (0.02, 0.5, 0.98):
                x, y = left + share * (right - left), top + share * (bottom - top)
                for sides, across in (([(left, y), (right, y)], (off, 0)), ([(x, top), (x, bottom)], (0, off))):
                    for place in sides:
                        assert colour(*place) == wanted, place
                        if share == 0.5:
                            assert all(colour(*np.add(place, np.multiply(sign, across)))[3] == 0 for sign in (-1, 1))
            for x, y in ((left, top), (right, top), (left, bottom), (right, bottom)):
                beyond = (x + (off if x == right else -off), y), (x, y + (off if y == bottom else -off))
                assert all(colour(*place)[3] == 0 for place in beyond)
            return off

        for places in (OUTER, HOLE):
            assert check_borders(places, colours["White Matter"]) > 2
        assert colour(100, 150)[3] == 0, "an unknown class"
        browser.run(
            "const [x, y] = arguments, at = toPicture(x, y);"
            "viewer.viewport.fitBounds(viewer.world.getItemAt(0).imageToViewportRectangle(at.x, at.y, 60, 80), true); draw()",
            CORNER[0] + HOLE[0] - 20, CORNER[1] + HOLE[1] - 10,
        )  # fmt: skip
        browser.wait(LOADED)
        assert check_borders(HOLE, colours["White Matter"]) < 2.2, "the place is known to half a pixel of the picture"

        for place, name in (
            ((500, 400), "White Matter"),
            ((800, 600), "–"),
            ((1250, 1050), "White Matter"),
            ((1400, 1200), "3"),
            ((60, 60), "–"),
        ):
            browser.run(
                "const [x, y] = arguments, at = toScreen(x, y), corner = viewer.canvas.getBoundingClientRect();"
                "tellCursor({ clientX: corner.left + at.x, clientY: corner.top + at.y })",
                CORNER[0] + place[0] + 0.5, CORNER[1] + place[1] + 0.5,
            )  # fmt: skip
            told = browser.driver.find_element("id", "cursor").text.splitlines()
            assert (
                told[0] == f"x {CORNER[0] + place[0]}, y {CORNER[1] + place[1]} px"
                and told[-1] == f"annotation: {name}"
            )

        on_line = (HOLE[0], 600)
        browser.run("const range = document.querySelector('input[type=range]'); range.value = 50; range.oninput()")
        assert colour(*on_line)[3] in (127, 128), "half transparent"
        box.click()
        assert colour(*on_line)[3] == 0, "switched off"
        browser.driver.find_element("css selector", ".openseadragon-canvas").send_keys("r", "f")
        assert browser.run("return [viewer.viewport.getRotation(true), viewer.viewport.getFlip()]") == [0, False]

        browser.read_logs()
        server.shutdown()
    assert not browser.errors and not browser.unanswered
    assert set(browser.answers.values()) <= {200, 304}
    assert not [a for a in browser.answers if not a.startswith((root, "data:", "chrome", "about:"))]


def test_a_table_sorts(tmp_path: Path) -> None:
    """By the numbers behind what is printed: 0.504 and 0.501 both print as 0.50."""
    (tmp_path / "t.html").write_text(table_page(small_table()), encoding="utf-8")
    with open_browser(tmp_path / "profile") as browser:
        browser.driver.get((tmp_path / "t.html").as_uri())

        def order() -> list[str]:
            return browser.run(
                "return [...document.querySelector('tbody').rows].map((row) => row.cells[0].textContent)"
            )

        name, up, down = browser.driver.find_elements("css selector", "th")[:3]
        assert order() == ["a", "b", "c", "e", "d"]
        up.click()
        assert order() == ["a", "b", "e", "c", "d"] and up.get_attribute("aria-sort") == "descending"
        up.click()
        assert order() == ["e", "b", "a", "c", "d"]
        down.click()
        assert order() == ["a", "b", "c", "e", "d"] and not up.get_attribute("aria-sort")
        name.click()
        assert order() == ["a", "b", "c", "d", "e"]
        browser.read_logs()
    assert not browser.errors and not browser.unanswered


def test_the_quality_page_sorts_and_filters(tmp_path: Path) -> None:
    """Numbers by what is behind them, the largest first; slides without one last whichever way; a filter keeps the order."""
    rows = slides()
    rows[1] = rows[1] | {"tissue_share": 0.05}
    for folder in ("report", "tile"):
        (tmp_path / folder).mkdir()
    for facts in rows:
        Image.new("RGB", (8, 6)).save(tmp_path / "tile" / f"{facts['slide_id']}.png")
    page = tmp_path / "report" / "qc.html"
    page.write_text(qc_page(cohort_quality(rows)), encoding="utf-8")
    with open_browser(tmp_path / "profile") as browser:
        browser.driver.get(page.as_uri())

        def order() -> str:
            return browser.run(
                "return [...document.querySelectorAll('#slides tbody tr')].filter((row) => !row.hidden)"
                ".map((row) => row.cells[0].textContent.trim()).join('')"
            )

        heads = {head.text: head for head in browser.driver.find_elements("css selector", "#slides th")}
        assert order() == "EDFCAB" and browser.driver.find_element("id", "shown").text == "6 of 6"
        heads["Tissue %"].click()
        assert order() == "CABDEF" and heads["Tissue %"].get_attribute("aria-sort") == "descending"
        heads["Tissue %"].click()
        assert order() == "DBCAEF"
        heads["Slide"].click()
        assert order() == "ABCDEF" and not heads["Tissue %"].get_attribute("aria-sort")
        heads["Split"].click()
        heads["Split"].click()
        assert order() == "ACDEFB", "texts from z to a"
        browser.driver.find_element("id", "find").send_keys("pa")
        assert order() == "AD" and browser.driver.find_element("id", "shown").text == "2 of 6", "a patient"
        browser.read_logs()
    assert not browser.errors and not browser.unanswered


@pytest.mark.skipif(not REPORT.exists(), reason="results/ holds no report: run `make demo`")
def test_the_report(tmp_path: Path) -> None:
    """Every picture loads, every table opens and sorts, and nothing comes from a network."""
    opened = []
    with open_browser(tmp_path / "profile") as browser:
        browser.driver.get(REPORT.as_uri())
        browser.wait("window.results && document.querySelector('#app').innerText.includes('Tables')")
        for category in browser.run("return Object.keys(categories)"):
            browser.click("#app a", category)
            browser.wait("document.querySelector('#app tbody tr a[iconname=eye]')")
            for number in range(browser.run("return document.querySelectorAll('#app tbody tr').length")):
                browser.driver.find_elements("css selector", "#app tbody tr a[iconname=eye]")[number].click()
                last = opened[-1] if opened else ""
                browser.wait(f"app.state.resultPath && app.state.resultPath !== '{last}'")
                opened.append(browser.run("return app.state.resultPath"))
                if opened[-1].endswith(".png"):
                    browser.wait(
                        "[...document.querySelectorAll('#app img')].every((i) => i.complete && i.naturalWidth)"
                    )
                    assert browser.run("return document.querySelectorAll('#app img').length") == 2, (
                        "the logo and the picture"
                    )
                    continue
                browser.driver.switch_to.frame(browser.driver.find_element("css selector", "#app iframe"))
                browser.wait("document.querySelector('h1')")
                assert browser.run("return [...document.images].every((i) => i.complete && i.naturalWidth)")
                for table in browser.driver.find_elements("css selector", "table.sorts"):
                    head = table.find_elements("css selector", "thead th")[1]
                    browser.run("arguments[0].click()", head)
                    assert head.get_attribute("aria-sort"), opened[-1]
                    shown = browser.run(
                        "return [...arguments[0].tBodies[0].rows].map((row) => row.cells[1].dataset.v)"
                        ".filter((v) => v !== undefined && v !== '')",
                        table,
                    )
                    assert shown == sorted(shown, key=float, reverse=True), opened[-1]
                browser.driver.switch_to.default_content()
            browser.click("#app nav a", "Results")
        browser.read_logs()
        wanted = browser.run("return Object.keys(results)")
    assert sorted(opened) == sorted(wanted)
    assert sum(path.endswith(".html") for path in opened) > 10
    assert not browser.errors and not browser.unanswered
    assert not [address for address in browser.answers if address.startswith("http")]
