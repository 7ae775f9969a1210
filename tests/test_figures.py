"""Figures 3 and 4: what is painted where, and that every case gives a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from mad.reporting.figures import STYLE, _families, _marker, _scatter, figure3, paint_raster, save
from mad.reporting.map_figure import _test_border, figure4

CLASSES = ["Gray Matter", "White Matter"]
COLOURS = {"Gray Matter": "#ff0000", "White Matter": "#0000ff"}


def grid(
    labels: list[list[str | None]], column: str = "label", side: float = 448.3, origin: float = 100
) -> pd.DataFrame:
    """Tiles on a grid whose origins were rounded to whole pixels, as on slides that are not native."""
    lines = [
        (round(origin + x * side), round(origin + y * side), round(side), label)
        for y, row in enumerate(labels)
        for x, label in enumerate(row)
    ]
    return pd.DataFrame(lines, columns=["x", "y", "side", column])


def test_every_tile_is_painted_at_its_place() -> None:
    labels = [["Gray Matter", "White Matter", None], ["White Matter", None, "Gray Matter"]]
    image, extent = paint_raster(grid(labels), "label", COLOURS)
    assert image.shape == (2, 3, 4)
    for y, row in enumerate(labels):
        for x, label in enumerate(row):
            assert image[y, x].tolist() == ([*to_rgb(COLOURS[label]), 1] if label else [0, 0, 0, 0])
    assert extent == [100, round(100 + 2 * 448.3) + 448, round(100 + 448.3) + 448, 100]


def test_tiles_that_are_missing_stay_transparent() -> None:
    tiles = grid([["Gray Matter"] * 4] * 3).drop(index=5)
    image, _ = paint_raster(tiles, "label", COLOURS)
    assert image[1, 1, 3] == 0 and image[..., 3].sum() == 11


def coordinates(labelled: bool = True) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    lines = []
    for number in range(4):
        label = CLASSES[number % 2] if labelled else None
        lines.append((f"p{number}", None, "parent", label, *generator.normal(size=2)))
        lines += [(f"p{number}c{k}", f"p{number}", "child", label, *generator.normal(size=2)) for k in range(16)]
    return pd.DataFrame(lines, columns=["tile_id", "parent_id", "role", "label", "x", "y"])


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("num_panels", [1, 5])
def test_figure_3_has_a_panel_per_encoder(tmp_path: Path, num_panels: int) -> None:
    panels = [(f"encoder{n}", coordinates(labelled=n != 1), (0.5, 0.2)) for n in range(num_panels)]
    figure3(panels, classes=CLASSES, transition=(10, 40), path=tmp_path / "f.png")
    pixels = read(tmp_path / "f.png")
    assert ((pixels[..., 2] - pixels[..., 0]) > 80).any() and ((pixels[..., 0] - pixels[..., 2]) > 80).any()
    assert pixels.shape[1] > {1: 500, 5: 1800}[num_panels]


@pytest.mark.parametrize("labelled", [True, False])
def test_figure_3_shows_the_families_of_one_parent_per_class(tmp_path: Path, labelled: bool) -> None:
    """Of four parents in two classes two stand out, one where no tile has a class."""
    table = coordinates(labelled)
    assert _families(table, CLASSES) == (["p0", "p1"] if labelled else ["p0"])
    assert _families(table[table["label"] != CLASSES[0]], CLASSES) == (["p1"] if labelled else ["p0"])
    dark = []
    for families in ([], ["p0", "p1"]):
        with plt.rc_context(STYLE):
            figure, axis = plt.subplots(figsize=(3, 3))
            _scatter(axis, table, CLASSES, families)
            save(figure, tmp_path / "f.png")
        dark.append((read(tmp_path / "f.png").max(-1) < 120).sum())
    assert dark[1] > dark[0] + 1000


def test_no_two_classes_share_a_marker(tmp_path: Path) -> None:
    classes = [f"class {number}" for number in range(30)]
    assert len({_marker(name, classes) for name in [*classes, None]}) == 31
    labels = np.resize(classes, 68)
    figure3(
        [("mad", coordinates().assign(label=labels), (0.5, 0.2))],
        classes=classes,
        transition=(10, 40),
        path=tmp_path / "f.png",
    )
    assert (tmp_path / "f.png").exists()


@pytest.mark.parametrize("draw", ["figure3", "figure4"])
def test_a_figure_without_data_says_so(tmp_path: Path, draw: str) -> None:
    """A line of grey text, neither axes nor a legend."""
    if draw == "figure3":
        figure3([], classes=CLASSES, transition=(10, 40), path=tmp_path / "f.png")
    else:
        figure4([], ["mad"], colours=COLOURS, path=tmp_path / "f.png")
    pixels = read(tmp_path / "f.png")
    text = pixels.min(-1) < 200
    assert text.sum() > 500 and np.ptp(np.flatnonzero(text.any(1))) < 40 and (np.ptp(pixels, axis=-1) < 10).all()


def test_figure_4_paints_truth_and_maps_and_names_the_absent(tmp_path: Path) -> None:
    truth = grid([["Gray Matter", "White Matter"], ["Gray Matter", None]])
    painted = truth.assign(predicted=["White Matter"] * 4)
    row = {
        "slide_id": "S1",
        "magnification": 10.0,
        "mpp": 0.25,
        "truth": truth,
        "scores": {"mad": 0.5},
        "maps": {"mad": painted},
    }
    slide = {"thumbnail": np.full((20, 30, 3), (0, 200, 0), np.uint8), "extent": [0, 1200, 1000, 0]}
    rows = [row | slide, row | {"thumbnail": None, "extent": None, "magnification": 40.0}]
    figure4(rows, ["mad", "other"], colours=COLOURS, path=tmp_path / "f.png")
    pixels = np.asarray(Image.open(tmp_path / "f.png").convert("RGB"))
    shares = {
        name: (pixels == np.array(colour)).all(-1).mean()
        for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items()
    }
    assert shares["blue"] > 1.5 * shares["red"] > 0
    assert (pixels == (0, 200, 0)).all(-1).mean() > 0.01


def test_figure_4_of_many_encoders_with_long_names_stays_a_page_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No title or label is longer than its picture, every encoder has a picture."""
    titles: list[str] = []

    def look(figure: Any, path: Path) -> None:
        renderer = figure.canvas.get_renderer()
        for axis in figure.axes:
            box = axis.get_window_extent(renderer)
            titles.append(axis.get_title())
            assert axis.title.get_window_extent(renderer).width <= box.width
            assert axis.yaxis.label.get_window_extent(renderer).height <= box.height
        save(figure, path)

    monkeypatch.setattr("mad.reporting.map_figure.save", look)
    truth = grid([["Gray Matter", "White Matter"], ["Gray Matter", None]])
    names = [f"{'a-model-of-pathology-' * 5}{number}" for number in range(14)]
    row = {"slide_id": "S" * 100, "mpp": 0.25, "truth": truth, "scores": {}, "thumbnail": None, "extent": None}
    maps = {name: truth.assign(predicted="White Matter") for name in names}
    figure4([row | {"maps": maps, "magnification": 10.0}], names, colours=COLOURS, path=tmp_path / "f.png")
    assert read(tmp_path / "f.png").shape[1] < 4200
    assert len({title for title in titles if title}) == 16


def test_a_line_bounds_the_test_part() -> None:
    tiles = grid([["Gray Matter"] * 4] * 3, side=100, origin=50)
    assert _test_border(tiles) == [] and _test_border(tiles.assign(split="test")) == []
    split = ["train", None, "test", "test", "train", None, "test", "test", "train", None, "test", "train"]
    border = {tuple(sorted(segment)) for segment in _test_border(tiles.assign(split=split))}
    inside = {(place % 4, place // 4) for place, name in enumerate(split) if name == "test"}
    wanted = set()
    for x, y in inside:
        corners = [(50 + 100 * (x + dx), 50 + 100 * (y + dy)) for dx, dy in ((0, 0), (1, 0), (1, 1), (0, 1))]
        beyond = [(x, y - 1), (x + 1, y), (x, y + 1), (x - 1, y)]
        wanted |= {tuple(sorted((corners[n], corners[(n + 1) % 4]))) for n in range(4) if beyond[n] not in inside}
    assert border == wanted


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        figure3(
            [("mad", coordinates(), (0.5, 0.2))], classes=CLASSES, transition=(10, 40), path=tmp_path / f"{name}.png"
        )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
