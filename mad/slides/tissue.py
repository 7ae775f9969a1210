"""Tissue against glass: Otsu's threshold on saturation, with a floor, specks and pinholes removed."""

from __future__ import annotations

import cv2
import numpy as np
from skimage.morphology import remove_small_holes, remove_small_objects


def tissue_mask(
    image: np.ndarray, *, mpp: float, min_saturation: float = 0.04, min_area_um2: float = 2000.0
) -> np.ndarray:
    """Boolean [h, w] mask of tissue in an RGB uint8 overview at `mpp` um/px.

    Saturation (of HSV, 0..1) is median-filtered over 5 pixels and thresholded by Otsu's method where that separates tissue
    from glass, that is where the pixels below are as pale as glass (mean saturation <= `min_saturation`); Otsu splits any
    histogram, and on a slide full of tissue, or of glass, it would cut that in two. There `min_saturation` is the
    threshold. Connected pieces, and holes, up to `min_area_um2` are dropped.
    """
    saturation = cv2.medianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1], 5)
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    below = saturation[saturation <= otsu]
    separates = below.size > 0 and below.mean() <= 255 * min_saturation
    mask = saturation > max(otsu if separates else 0, 255 * min_saturation)
    pixels = max(1, round(min_area_um2 / mpp**2))
    mask = remove_small_objects(mask, max_size=pixels)
    return remove_small_holes(mask, max_size=pixels)
