"""The tissue mask on the cases where thresholds go wrong, under every method."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mad.config.model import TissueConfig
from mad.slides.readers import open_slide
from mad.slides.tissue import tissue_mask, unscanned

METHODS = ["otsu", "saturation", "density", "texture"]
GLASS, TISSUE = (244, 243, 245), (205, 130, 190)


def mask_of(image: np.ndarray, method: str = "otsu", **options: float) -> np.ndarray:
    return tissue_mask(image, mpp=4, options=TissueConfig.model_validate({"method": method, **options}))


def noisy(image: np.ndarray, sigma: float = 3) -> np.ndarray:
    return (image + np.random.default_rng(0).normal(0, sigma, image.shape)).clip(0, 255).astype(np.uint8)


def slide(share: float, colour: tuple[int, ...] = TISSUE, *, grain: float = 0, side: int = 200) -> np.ndarray:
    """Glass, and from the left a share of tissue whose brightness varies by `grain` over some 8 um."""
    image = np.tile(np.array(GLASS, float), (side, side, 1))
    spots = cv2.GaussianBlur(np.random.default_rng(1).normal(0, 1, (side, side)), (0, 0), 1.5)
    edge = int(side * share)
    image[:, :edge] = colour + (grain * spots / spots.std())[:, :edge, None]
    return noisy(image)


@pytest.mark.parametrize("method", METHODS)
def test_tissue_is_told_from_glass(method: str) -> None:
    for share in (0.05, 0.5, 0.85 if method == "texture" else 0.95):  # texture closes gaps, that to the border too
        mask = mask_of(slide(share, grain=15), method)
        edge = int(200 * share)
        slack = 8 if method == "texture" else 3
        assert mask[:, : edge - slack].all() and not mask[:, edge + slack :].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_blank_slide_stays_blank_and_a_full_one_full(method: str) -> None:
    assert not mask_of(slide(0), method).any()
    assert mask_of(slide(1, grain=15), method).all()
    two_tissues = slide(1, grain=15)
    two_tissues[:100] = noisy(
        slide(1, (150, 60, 130), grain=15)[:100]
    )  # Otsu alone would take the paler half for glass
    assert mask_of(two_tissues, method).all()


@pytest.mark.parametrize("method", METHODS)
def test_black_around_the_scan_is_no_tissue(method: str) -> None:
    """Near-black noise has any hue; the mixed pixels at its edge are grey, whatever the slide holds."""
    for share in (0, 0.5):
        image = slide(share, grain=15, side=240)
        framed = image.copy()
        framed[:60], framed[:, 180:] = 0, 0
        framed = cv2.GaussianBlur(framed, (0, 0), 0.8)
        dark = framed.max(axis=2) < 60
        framed[dark] = np.random.default_rng(2).integers(0, 25, (int(dark.sum()), 3))
        mask = mask_of(framed, method)
        assert not mask[:60].any() and not mask[:, 180:].any()
        inside = mask[70:, :170]
        assert (inside != mask_of(image, method)[70:, :170]).mean() < 0.02
    assert not mask_of(np.zeros((50, 60, 3), np.uint8), method).any()


@pytest.mark.parametrize("method", METHODS)
def test_jpeg_ringing_is_no_tissue(method: str) -> None:
    _, data = cv2.imencode(".jpg", slide(0.5, (150, 60, 130), grain=15), [cv2.IMWRITE_JPEG_QUALITY, 30])
    mask = mask_of(cv2.imdecode(data, cv2.IMREAD_COLOR), method)
    assert not mask[:, 112:].any() and mask[:, :88].all()


def test_density_finds_grey_tissue_that_has_no_saturation() -> None:
    """Haematoxylin alone, pale: 1 % saturated, less than the floor."""
    image = slide(0.5, (206, 207, 209))
    assert not mask_of(image, "otsu").any() and not mask_of(image, "saturation").any()
    mask = mask_of(image, "density")
    assert mask[:, :97].all() and not mask[:, 103:].any()
    assert not mask_of(image, "density", min_density=0.2).any()


def test_texture_finds_tissue_as_pale_as_glass() -> None:
    """Fat: thin walls around cells of 80 um that are empty, and nowhere much darker than glass."""
    image = np.tile(np.array(GLASS, float), (200, 200, 1))
    walls = np.zeros((200, 200), np.uint8)
    for y in range(0, 100, 20):
        for x in range(0, 100, 20):
            cv2.rectangle(walls, (x, y), (x + 20, y + 20), 1, 1)
    image[walls > 0] = (226, 224, 227)
    image = noisy(image, 1)
    assert not mask_of(image, "otsu").any()
    assert mask_of(image, "density")[5:95, 5:95].mean() < 0.5
    mask = mask_of(image, "texture")
    assert mask[5:95, 5:95].all() and not mask[115:].any() and not mask[:, 115:].any()


def test_a_fixed_threshold_is_the_same_on_every_slide() -> None:
    """Beside dark tissue Otsu drops pale tissue; the fixed threshold keeps it."""
    image = slide(0.5, (160, 40, 120))
    image[:, 60:100] = noisy(np.tile(np.array((240, 222, 236), float), (200, 40, 1)))
    assert not mask_of(image, "otsu")[:, 65:].any()
    assert mask_of(image, "saturation")[:, :95].all()
    assert not mask_of(image, "saturation", min_saturation=0.3)[:, 65:].any()


def test_specks_and_pinholes_go() -> None:
    image = slide(0.5)
    image[50:54, 150:154] = TISSUE  # 256 um²
    image[50:54, 50:54] = GLASS
    mask = mask_of(image, min_area_um2=2000)
    assert not mask[40:60, 140:160].any() and mask[40:60, 40:60].all()
    assert mask_of(image, min_area_um2=0)[51:53, 151:153].any()


def test_dark_tissue_is_scanned() -> None:
    image = slide(0.5, (70, 35, 60))
    assert not unscanned(image, mpp=4).any()


def test_methods_agree_on_real_he(real_slides: Path) -> None:
    """On well-stained H&E the methods that threshold colour find the same tissue."""
    for path in sorted(real_slides.glob("*40x.svs")):
        with open_slide(path) as opened:
            _, _, width, height = opened.bounds
            image = opened.overview(16, height // 16, width // 16)
        default = mask_of(image)
        assert 0.5 < default.mean() < 0.8
        both = default & mask_of(image, "density")
        assert both.sum() / (default | mask_of(image, "density")).sum() > 0.9
        assert (default & ~mask_of(image, "texture")).sum() < 0.03 * default.sum()
