"""Stain jitter: another laboratory's dyes on the same tissue (after Tellez et al. 2018, IEEE TMI 37).

By Beer and Lambert's law the optical density of a pixel is the sum of its stains' densities. Ruifrok and Johnston (2001) give
the colour of haematoxylin, eosin and DAB; here, as usual for H&E, the third direction takes what the first two leave. With the
amounts c = od M^-1 of a pixel, M [3 stains, RGB] of unit rows, and a factor a_s and a shift b_s per view and stain s:

    c_s <- a_s c_s + b_s        od <- c M        a_s ~ U(1 - s, 1 + s), b_s ~ U(-s, s) SHIFT

which is one affine map of optical densities. Amounts below zero are kept: without jitter every colour stays what it is.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
SHIFT = 0.2  # optical density; stained nuclei have 0.5 to 1
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # haematoxylin, eosin, DAB in RGB
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)
STRIP = 32  # rows at a time: floats of a whole tile of 224 px fall out of the cache, which takes five times as long
UNMIXING = np.linalg.inv(STAINS)
LOG = np.log(np.maximum(np.arange(256), 0.5) / 255).astype(np.float32)  # of intensity; black stands for half a level


def jitter_stain(image: Image, strength: float, rng: np.random.Generator) -> Image:
    """The image [H, W, 3] with its stains scaled and shifted by random amounts of `strength`."""
    factors = rng.uniform(1 - strength, 1 + strength, size=3)
    shifts = rng.uniform(-strength, strength, size=3) * SHIFT
    return change_stains(image, factors, shifts)


def change_stains(image: Image, factors: npt.ArrayLike, shifts: npt.ArrayLike) -> Image:
    """The image [H, W, 3] with stain s multiplied by `factors[s]` and shifted by `shifts[s]`, an optical density (base 10)."""
    matrix = UNMIXING @ (np.asarray(factors)[:, None] * STAINS)  # [RGB, RGB], of row vectors
    offset = np.log(255) - np.log(10) * np.asarray(shifts) @ STAINS
    change = np.column_stack([matrix.T, offset]).astype(np.float32)
    changed = np.empty_like(image)
    for top in range(0, len(image), STRIP):
        log_intensity = cv2.LUT(image[top : top + STRIP], LOG)
        changed[top : top + STRIP] = cv2.convertScaleAbs(cv2.exp(cv2.transform(log_intensity, change)))
    return changed  # rounded, and clipped at white
