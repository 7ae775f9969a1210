"""The picture of the scale matrix: every number in its cell, one colour scale, legible at its own size."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from mad.reporting.from_json import Reports
from mad.reporting.scale_figure import draw_matrices, scale_figure

LADDER = ["2.5x", "5x", "10x", "20x", "40x"]


def matrix_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.05, 0.95, (size, size))


def panels_of(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_title()]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("num_encoders", [1, 2, 3, 4, 6, 8])
def test_it_is_legible_on_a_printed_page(num_encoders: int, size: int) -> None:
    """No text under 7 points on 7.2 inches; numbers inside their cells; nothing over anything else or cut off."""
    panels = {f"an-encoder-of-a-long-name-{n}": matrix_of(size, n) for n in range(num_encoders)}
    names = LADDER[:size]
    figure = draw_matrices(panels, names, dict.fromkeys(names, 0.111))
    assert figure.get_size_inches()[0] <= 7.2 and len(panels_of(figure)) == num_encoders
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [text for text in figure.findobj(plt.Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 7
    frame = figure.bbox.padded(1)
    boxes = [text.get_window_extent(renderer) for axis in panels_of(figure) for text in [axis.title, *axis.texts]]
    boxes += [text.get_window_extent(renderer) for text in figure.texts]
    for axis in panels_of(figure):
        boxes += [label.get_window_extent(renderer) for label in (*axis.get_xticklabels(), *axis.get_yticklabels())]
        cell = axis.bbox.width / size
        for text in axis.texts:
            box, (column, row) = text.get_window_extent(renderer), text.get_position()
            left, top = axis.transData.transform((column - 0.5, row - 0.5))
            assert box.x0 > left and box.x1 < left + cell and box.y1 < top and box.y0 > top - cell
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    plt.close(figure)


def contrast(ink: str, colour: tuple[float, ...]) -> float:
    light = []
    for parts in (to_rgb(ink), colour[:3]):
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        light.append(float(np.dot(linear, (0.2126, 0.7152, 0.0722))) + 0.05)
    return max(light) / min(light)


def test_rows_are_trained_on_and_columns_tested_on_under_one_colour_scale() -> None:
    panels = {"a": np.array([[0.91, 0.12], [0.34, 0.56]]), "b": np.array([[0.5, np.nan], [0.61, 0.7]])}
    figure = draw_matrices(panels, ["10x", "40x"], {"10x": 0.2, "40x": None})
    images = [axis.images[0] for axis in panels_of(figure)]
    assert {image.get_clim() for image in images} == {(0.1, 1.0)}
    for axis, matrix in zip(panels_of(figure), panels.values(), strict=True):
        assert axis.get_xlabel() == "tested on"
        assert [label.get_text() for label in axis.get_yticklabels()] == ["10x", "40x"]
        written = {text.get_position()[::-1]: text for text in axis.texts}
        for place, value in np.ndenumerate(matrix):
            assert written[place].get_text() == ("–" if np.isnan(value) else f"{value:.2f}")
            image = axis.images[0]
            assert contrast(written[place].get_color(), image.cmap(image.norm(value))) > 4.5
        assert len(axis.patches) == 4, "two frames on the diagonal, white and black"
    assert panels_of(figure)[0].get_ylabel() == "trained on" and not panels_of(figure)[1].get_ylabel()
    assert [text.get_text() for text in figure.texts] == [
        "Chance, by the magnification tested on: 10x\N{NO-BREAK SPACE}0.20"
    ]
    plt.close(figure)


def reports() -> Reports:
    transfer = {"status": "ok", "matrix": {"40x": {"40x": 0.8, "10x": 0.3}, "10x": {"10x": 0.6, "40x": None}}}
    return {"a": {"transfer": transfer}, "b": {"transfer": {"status": "absent"}}, "c": {}}


def test_the_figure_is_of_what_the_json_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        "mad.reporting.scale_figure.draw_matrices", lambda *told: drawn.append(told) or draw_matrices(*told)
    )
    scale_figure(reports(), tmp_path / "a.png")
    ((panels, names, chance),) = drawn
    assert names == ["10x", "40x"] and list(panels) == ["a"] and chance == {}
    assert np.array_equal(panels["a"], [[0.6, np.nan], [0.3, 0.8]], equal_nan=True)
    scale_figure(reports(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_a_number_it_says_so(tmp_path: Path) -> None:
    empty = reports()
    empty["a"]["transfer"]["matrix"] = {"10x": {"10x": None}}
    for found in ({}, {"c": {}}, empty):
        scale_figure(found, tmp_path / "f.png")
        pixels = np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).astype(int)
        assert pixels.shape[0] == 200 and (np.ptp(pixels, axis=-1) < 10).all(), "a line of grey text"
