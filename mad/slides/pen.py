"""Ink of felt pens on the glass or over tissue: blue, green, red and black, told from H&E by what it absorbs.

In optical density haematoxylin and eosin both absorb green most (Ruifrok & Johnston 2001: H .65 .70 .29, E .07 .99 .11 in
red, green, blue), and so does every mixture of them. Blue and green ink absorb red more than green; red ink absorbs blue
nearly as strongly as green and red hardly; black ink absorbs all alike. A stroke is wide (a felt pen's is .3-1 mm), so ink is
looked for at 16 um/px, where single cells, capillaries and pigment are averaged away, and small pieces are dropped.

Not for stains that absorb red most themselves (Luxol fast blue, Alcian blue, Giemsa): there tissue looks like blue ink.
Violet ink has the colour of haematoxylin and is not found.
"""

from __future__ import annotations

import cv2
import numpy as np
from skimage.measure import label
from skimage.morphology import remove_small_objects

from mad.slides.tissue import BLACK

WORKING_UM = 16.0
MIN_AREA_UM2 = 20_000.0
WHITE = 245.0
"""Glass. Scanners differ by +-10, that is .02 in density, far below the thresholds."""


def pen_mask(image: np.ndarray, *, mpp: float) -> np.ndarray:
    """Boolean [h, w] mask of ink in an RGB uint8 overview at `mpp` um/px.

    Each kind of ink has a strict rule, for sure ink, and a lenient one; a piece that is lenient throughout and strict
    somewhere is ink. Near-black pieces that touch the picture's border are the scanner's background, not ink.
    """
    factor = min(1.0, mpp / WORKING_UM)
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    red, green, blue = np.moveaxis(np.log10(WHITE / np.maximum(small, 1)).clip(0), 2, 0)
    least = np.minimum(np.minimum(red, green), blue)
    most = np.maximum(np.maximum(red, green), blue)
    ink = _grown(  # blue and green
        (red - green > 0.08) & (red > 1.2 * green),
        (red - green > 0.04) & (red > 1.08 * green),
    )
    strong = np.where(red < 0.4 * green, blue - red, 0)  # over tissue, whose own green hides the ratio
    ink |= _grown(  # red; blood reaches blue = .8 green, blue - red = .40
        ((blue > 0.85 * green) & (green > 0.25) & (red < 0.3 * green)) | (strong > 0.42),
        ((blue > 0.72 * green) & (green > 0.2) & (red < 0.4 * green)) | (strong > 0.3),
    )
    scanned = ~_background(small)
    ink |= _grown(  # black
        (least > 0.3) & (most - least < 0.12 * most) & scanned,
        (least > 0.2) & (most - least < 0.25 * most) & scanned,
    )
    um = max(mpp, WORKING_UM)
    ink = remove_small_objects(ink, max_size=max(1, round(MIN_AREA_UM2 / um**2)))
    return cv2.resize(ink.astype(np.uint8), image.shape[1::-1], interpolation=cv2.INTER_NEAREST).astype(bool)


def _grown(strict: np.ndarray, lenient: np.ndarray) -> np.ndarray:
    """The connected pieces of `lenient` that hold a pixel of `strict`."""
    pieces = label(lenient | strict, connectivity=2)
    sure = np.unique(pieces[strict])
    return np.isin(pieces, sure[sure > 0])


def _background(image: np.ndarray) -> np.ndarray:
    """Near-black pieces that touch the border, and the mixed pixels around them."""
    pieces = label(image.max(axis=2) <= BLACK, connectivity=2)
    rim = np.unique(np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]]))
    outside = np.isin(pieces, rim[rim > 0]).astype(np.uint8)
    return cv2.dilate(outside, np.ones((5, 5), np.uint8)).astype(bool)
