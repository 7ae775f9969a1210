"""Ink of felt pens: found in every colour, on glass and over tissue; never seen in H&E."""

from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import write_tiff

from mad.config import parse_config
from mad.config.synthetic import SyntheticConfig
from mad.files import read_json
from mad.slides.pen import pen_mask
from mad.slides.readers import open_slide
from mad.slides.sheet import SlideRow
from mad.slides.synthetic.layout import layout
from mad.slides.synthetic.render import render
from mad.slides.tissue import BLACK
from mad.stages import tile

INKS = {
    "blue": (25, 55, 165),
    "light blue": (40, 120, 200),
    "green": (15, 120, 65),
    "red": (195, 30, 45),
    "black": (35, 35, 40),
}
HAEMATOXYLIN, EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])  # Ruifrok & Johnston 2001


def glass() -> np.ndarray:
    image = np.full((300, 400, 3), 244.0) + np.random.default_rng(0).normal(0, 2, (300, 400, 3))
    return image.clip(0, 255).astype(np.uint8)


@cache
def tissue(slide_id: str = "S01") -> np.ndarray:
    """A slide of the synthetic cohort at 4 um/px."""
    pixels = render(SyntheticConfig(), slide_id, layout(SyntheticConfig(), slide_id))
    return cv2.resize(pixels, None, fx=1 / 16, fy=1 / 16, interpolation=cv2.INTER_AREA)


def drawn(image: np.ndarray, ink: tuple[int, int, int], opacity: float) -> tuple[np.ndarray, np.ndarray]:
    """A closed stroke 400 um wide with soft edges, and where it is."""
    h, w = image.shape[:2]
    points = np.array([[0.2 * w, 0.2 * h], [0.7 * w, 0.3 * h], [0.6 * w, 0.8 * h], [0.3 * w, 0.7 * h]])
    stroke = cv2.polylines(np.zeros((h, w), np.uint8), [points.astype(np.int32)], True, 1, 100)
    alpha = opacity * cv2.GaussianBlur(stroke.astype(np.float32), (0, 0), 2)[..., None]
    return (image * (1 - alpha) + np.array(ink) * alpha).astype(np.uint8), stroke > 0


@pytest.mark.parametrize("colour", INKS)
@pytest.mark.parametrize("ground", [glass, tissue])
def test_strokes_are_found_and_nothing_else(colour: str, ground: object) -> None:
    clean = ground()  # type: ignore[operator]
    for opacity in (1.0, 0.8):
        image, stroke = drawn(clean, INKS[colour], opacity)
        found = pen_mask(image, mpp=4)
        near = cv2.dilate(stroke.astype(np.uint8), np.ones((13, 13), np.uint8)) > 0
        assert found[stroke].mean() > 0.9 and not found[~near].any()


def test_the_synthetic_cohort_bears_no_ink() -> None:
    for slide_id in ("S01", "S05", "S09"):
        assert not pen_mask(tissue(slide_id), mpp=4).any()


def test_no_mixture_of_haematoxylin_and_eosin_is_ink() -> None:
    """Every amount of either stain, up to black."""
    amounts = np.stack(np.meshgrid(np.linspace(0, 2, 60), np.linspace(0, 2, 60)), axis=-1)
    density = amounts @ np.stack([HAEMATOXYLIN, EOSIN])
    patches = (245 * 10**-density).round().astype(np.uint8)
    image = cv2.resize(patches, None, fx=40, fy=40, interpolation=cv2.INTER_NEAREST)
    found = pen_mask(image, mpp=4)
    visible = image.max(axis=2) > BLACK
    assert not found[visible].any()


def test_blood_and_small_pigment_are_not_ink() -> None:
    image = glass()
    image[50:150, 50:150] = (200, 60, 80)
    for y in range(160, 280, 12):
        for x in range(60, 340, 12):
            image[y : y + 4, x : x + 4] = (60, 50, 50)  # specks of 16 um
    assert not pen_mask(image, mpp=4).any()


def test_black_beyond_the_scan_is_not_ink() -> None:
    image = glass()
    image[:80], image[:, 300:] = 0, 0
    assert not pen_mask(image, mpp=4).any()
    image, stroke = drawn(glass(), (0, 0, 0), 1.0)
    assert pen_mask(image, mpp=4)[stroke].mean() > 0.9


@pytest.mark.parametrize("mpp", [2.0, 8.0, 32.0])
def test_the_overview_may_have_any_resolution(mpp: float) -> None:
    image, stroke = drawn(glass(), INKS["green"], 0.9)
    size = (round(400 * 4 / mpp), round(300 * 4 / mpp))
    found = pen_mask(cv2.resize(image, size, interpolation=cv2.INTER_AREA), mpp=mpp)
    wanted = cv2.resize(stroke.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    assert found.shape == wanted.shape
    assert (found & wanted).sum() / (found | wanted).sum() > 0.75


def test_real_he_bears_no_ink(real_slides: Path) -> None:
    for path in sorted(real_slides.glob("*.svs")):
        with open_slide(path) as opened:
            mpp = float(opened.properties["openslide.mpp-x"])
            _, _, width, height = opened.bounds
            image = opened.overview(4 / mpp, round(height * mpp / 4), round(width * mpp / 4))
        assert pen_mask(image, mpp=4).mean() < 0.001


def test_the_tile_table_tells_the_ink_and_the_mask_leaves_it_out_on_demand(tmp_path: Path) -> None:
    """Two coarsest tiles, the left one tissue, the right one half under ink."""
    pixels = np.full((1792, 3584, 3), 244, np.uint8)
    pixels[:, :1792], pixels[:, 1792:2688] = (205, 130, 190), INKS["blue"]
    write_tiff(tmp_path / "S01.tiff", [pixels], mpp=0.25)
    row = SlideRow(slide_id="S01", path=str(tmp_path / "S01.tiff"), patient_id="P1")
    for exclude, wanted in ((False, ["ok", "ok"]), (True, ["ok", "blank"])):
        settings = {"tile_px": 112, "tissue": {"exclude_pen": exclude}}
        tile.run(parse_config({"results": str(tmp_path), "tile": settings}), row)
        table = pd.read_parquet(tmp_path / "tile" / "S01.parquet")
        coarsest = table[table["magnification"] == 2.5]
        assert coarsest["pen"].tolist() == pytest.approx([0, 0.5], abs=0.02) and table["pen"].dtype == np.float32
        assert coarsest["status"].tolist() == wanted
        assert read_json(tmp_path / "tile" / "S01.json")["pen_share"] == pytest.approx(1 / 3, abs=0.02)
