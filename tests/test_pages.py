"""The pages in a real browser: nothing fails to load, nothing is logged as an error, and what is shown is where it belongs."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from browser import open_browser
from conftest import write_tiff
from PIL import Image
from test_tables import small_table
from test_viewer import predict

from mad.config import parse_config
from mad.files import read_parquet, write_parquet
from mad.reporting.overlay import class_colours
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
            "viewer.viewport.fitBounds(viewer.world.getItemAt(0).imageToViewportRectangle(at.x, at.y, wide, wide), true)",
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
