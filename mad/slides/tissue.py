"""Tissue against glass in an overview: four ways to tell them apart, black scanner background, specks and pinholes.

- `otsu` (the default): Otsu's threshold on the saturation of HSV, with a floor. For H&E and other colourful stains.
- `saturation`: a fixed threshold on it. For cohorts where every slide must be cut at the same value.
- `density`: Otsu's threshold on optical density, with a floor. For pale and grey stains: haematoxylin alone, weak IHC.
- `texture`: local contrast. For unstained tissue and fat, whose mean is that of glass.

Where no light came through (beyond the scanned area many scanners write black) nothing is tissue, whatever the method:
hue and saturation of near-black noise are arbitrary.
"""

from __future__ import annotations

import cv2
import numpy as np
from skimage.morphology import remove_small_holes, remove_small_objects

from mad.config.model import TissueConfig

BLACK = 30
"""Brightest channel of a pixel that no light came through; scanners write 0, JPEG and noise lift it a little."""
MARGIN_UM = 16.0
"""Around black areas: there the overview's pixels mix black with glass into grey."""
CONTRAST_UM, JOIN_UM = 40.0, 60.0
"""`texture`: side of the window, and the gaps that are closed: fat cells are 50-100 um wide and empty within."""


def tissue_mask(image: np.ndarray, *, mpp: float, options: TissueConfig) -> np.ndarray:
    """Boolean [h, w] mask of tissue in an RGB uint8 overview at `mpp` um/px, by `options.method`.

    Connected pieces, and holes, up to `options.min_area_um2` are dropped.
    """
    scanned = ~unscanned(image, mpp=mpp)
    if options.method == "density":
        mask = _density(image, scanned, options.min_density)
    elif options.method == "texture":
        mask = _texture(image, scanned, options.min_contrast, mpp)
    else:
        mask = _saturation(image, scanned, options.min_saturation, fixed=options.method == "saturation")
    pixels = max(1, round(options.min_area_um2 / mpp**2))
    mask = remove_small_objects(mask & scanned, max_size=pixels)
    return remove_small_holes(mask, max_size=pixels)


def unscanned(image: np.ndarray, *, mpp: float) -> np.ndarray:
    """Boolean [h, w]: near-black pixels, and `MARGIN_UM` around them."""
    black = (cv2.medianBlur(image, 5).max(axis=2) <= BLACK).astype(np.uint8)
    return cv2.dilate(black, _disc(MARGIN_UM / mpp)).astype(bool) if black.any() else black.astype(bool)


def _saturation(image: np.ndarray, scanned: np.ndarray, floor: float, *, fixed: bool) -> np.ndarray:
    """Saturation (of HSV, 0..1), median-filtered over 5 pixels, above Otsu's threshold or, `fixed`, above `floor`."""
    saturation = cv2.medianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1], 5)
    return saturation > (255 * floor if fixed else _otsu(saturation[scanned], 255 * floor))


def _density(image: np.ndarray, scanned: np.ndarray, floor: float) -> np.ndarray:
    """Mean optical density of the three channels, -log10(I / I0), above Otsu's threshold.

    I0, the glass, is each channel's 99th percentile, held to 220..255: on a slide full of tissue no pixel is glass.
    """
    smooth = cv2.medianBlur(image, 5)
    density = np.zeros(image.shape[:2], np.float32)
    for channel in range(3):
        values = smooth[..., channel]
        white = np.clip(np.percentile(values[scanned], 99), 220, 255) if scanned.any() else 255.0
        curve = np.log10(white / np.maximum(np.arange(256), 1)).clip(0).astype(np.float32)
        density += cv2.LUT(values, curve) / 3
    levels = np.minimum(density * 255, 255).astype(np.uint8)  # in steps of .004; whatever is denser than 1 is tissue
    return levels > _otsu(levels[scanned], 255 * floor)


def _texture(image: np.ndarray, scanned: np.ndarray, floor: float, mpp: float) -> np.ndarray:
    """Standard deviation of brightness (0..1) over `CONTRAST_UM` of the scanned pixels, above `floor`; gaps joined."""
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (3, 3), 0).astype(np.float32) / 255
    weight = scanned.astype(np.float32)
    side = max(3, round(CONTRAST_UM / mpp) | 1)
    total, first, second = (
        cv2.blur(values, (side, side), borderType=cv2.BORDER_REFLECT)
        for values in (weight, weight * grey, weight * grey**2)
    )
    total = np.maximum(total, 1e-6)
    variance = np.maximum(second / total - (first / total) ** 2, 0)
    busy = (np.sqrt(variance) > floor).astype(np.uint8)
    joined = cv2.morphologyEx(busy, cv2.MORPH_CLOSE, _disc(JOIN_UM / mpp / 2))
    return cv2.erode(joined, _disc(CONTRAST_UM / mpp / 2)).astype(bool)  # the window reaches that far beyond an edge


def _otsu(values: np.ndarray, floor: float) -> float:
    """Otsu's threshold on uint8 values where it separates tissue from glass, at least `floor`.

    Otsu splits any histogram: on a slide full of tissue, or of glass, it would cut that in two. It separates where the values
    below it are glass, that is where their mean is <= `floor`; elsewhere `floor` is the threshold.
    """
    if not values.size:
        return floor
    otsu, _ = cv2.threshold(values, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    below = values[values <= otsu]
    return max(otsu, floor) if below.size and below.mean() <= floor else floor


def _disc(radius: float) -> np.ndarray:
    """A structuring element [2 r + 1, 2 r + 1]."""
    side = 2 * max(1, round(radius)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
