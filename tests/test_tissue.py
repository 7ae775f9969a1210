"""The tissue mask on the cases where thresholds go wrong."""

import numpy as np

from mad.slides.tissue import tissue_mask

GLASS, TISSUE = (244, 243, 245), (205, 130, 190)


def slide(share: float) -> np.ndarray:
    image = np.tile(np.array(GLASS, float), (200, 200, 1))
    image[:, : int(200 * share)] = TISSUE
    return (image + np.random.default_rng(0).normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)


def test_tissue_is_told_from_glass() -> None:
    for share in (0.05, 0.5, 0.95):
        mask = tissue_mask(slide(share), mpp=4)
        edge = int(200 * share)
        assert mask[:, : edge - 3].all() and not mask[:, edge + 3 :].any()


def test_a_blank_slide_stays_blank_and_a_full_one_full() -> None:
    assert not tissue_mask(slide(0), mpp=4).any()
    assert tissue_mask(slide(1), mpp=4).all()
    two_tissues = slide(1)
    two_tissues[:100] = (150, 60, 130)  # Otsu alone would take the paler half for glass
    assert tissue_mask(two_tissues, mpp=4).all()


def test_specks_and_pinholes_go() -> None:
    image = slide(0.5)
    image[50:54, 150:154] = TISSUE  # 256 um²
    image[50:54, 50:54] = GLASS
    mask = tissue_mask(image, mpp=4, min_area_um2=2000)
    assert not mask[40:60, 140:160].any() and mask[40:60, 40:60].all()
    assert tissue_mask(image, mpp=4, min_area_um2=0)[51:53, 151:153].any()
