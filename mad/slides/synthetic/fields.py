"""Random fields and textures: the mathematics the synthetic slides are made of. Pure functions of a generator."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.special import ndtr

Map = NDArray[np.float32]


def gaussian_field(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> Map:
    """A smooth Gaussian field of mean 0 and variance 1, correlated over about `sigma` pixels. [shape]"""
    margin = int(4 * sigma) + 1
    noise = rng.standard_normal((shape[0] + 2 * margin, shape[1] + 2 * margin), dtype=np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), sigma)[margin:-margin, margin:-margin]
    # white noise blurred with a Gaussian of this sigma has standard deviation 1 / (2 sigma sqrt(pi))
    return np.asarray(smooth * (2 * sigma * np.sqrt(np.pi)), np.float32)


def uniform_field(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> Map:
    """A smooth field whose values are uniform on [0, 1] at every place. [shape]"""
    return np.asarray(ndtr(gaussian_field(rng, shape, sigma)), np.float32)


def band_pass(rng: np.random.Generator, side: int, period: float, angle: float | None = None) -> Map:
    """Periodic noise of one spatial period in pixels and variance 1; with `angle` (radians from x) its stripes run along it.

    The band is log-Gaussian of .28 octaves, the spread of stripes .22 rad. [side, side]
    """
    spectrum = fft.rfft2(rng.standard_normal((side, side), dtype=np.float32))
    fy = fft.fftfreq(side).astype(np.float32)[:, None]
    fx = fft.rfftfreq(side).astype(np.float32)[None]
    radius = np.hypot(fx, fy) + 1e-9
    gain = np.exp(-0.5 * (np.log2(radius * period) / 0.28) ** 2)
    if angle is not None:
        along = np.cos(angle) * fx + np.sin(angle) * fy
        across = np.cos(angle) * fy - np.sin(angle) * fx
        gain = gain * np.exp(-0.5 * (np.arctan2(along, np.abs(across)) / 0.22) ** 2)
    texture = fft.irfft2(spectrum * gain, s=(side, side))
    return np.asarray(texture / texture.std(), np.float32)


def without_area_mean(texture: Map, factor: int = 4, rounds: int = 4) -> Map:
    """A periodic texture less what an area average over `factor` pixels would still show of it, at variance 1.

    One round subtracts the enlarged average; what interpolation leaves is subtracted again.
    """
    margin, side = 4 * factor, texture.shape[0]
    wide = np.pad(texture, margin, mode="wrap")
    small = (wide.shape[1] // factor, wide.shape[0] // factor)
    for _ in range(rounds):
        mean = cv2.resize(wide, small, interpolation=cv2.INTER_AREA)
        wide = wide - cv2.resize(mean, wide.shape[::-1], interpolation=cv2.INTER_CUBIC)
    core = wide[margin : margin + side, margin : margin + side]
    return np.asarray(core / core.std(), np.float32)


def blend_weights(period: Map, direction: dict[str, Map], periods: tuple[float, ...]) -> dict[tuple[float, str], Map]:
    """Weights by which banks of textures make a wanted period (interpolated in its logarithm) and direction at every place.

    Args:
        period: wanted period, in the unit of `periods` (rising, equal ratios).
        direction: share of each kind of texture, e.g. isotropic and along an angle.

    Returns:
        (period, kind) -> weight; their squares sum to 1, so the blend keeps variance 1. Weights that vanish are left out.
    """
    ratio = np.log(periods[-1] / periods[0]) / (len(periods) - 1)
    position = np.clip(np.log(period / periods[0]) / ratio, 0, len(periods) - 1)
    raw = {
        (value, kind): np.maximum(0, 1 - np.abs(position - step)) * share
        for step, value in enumerate(periods)
        for kind, share in direction.items()
    }
    norm = np.sqrt(sum(weight**2 for weight in raw.values())) + 1e-6
    return {key: (weight / norm).astype(np.float32) for key, weight in raw.items() if weight.max() > 0}


def resize(values: NDArray[Any], shape: tuple[int, int]) -> Map:
    """`values` on another grid over the same area: area average where it shrinks, bilinear where it grows. [shape]"""
    shrinks = shape[0] < values.shape[0]
    mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(values, shape[::-1], interpolation=mode), np.float32)


def standardise_locally(values: Map, mask: Map, mean_sigma: float, spread_sigma: float, floor: float) -> Map:
    """`values` less their local mean, over their local standard deviation (never under `floor`), within `mask`.

    Both are weighted by Gaussians whose sigmas are in pixels of the mask's own, coarser grid. [values.shape]
    """
    fine_mask = resize(mask, values.shape)

    def local_mean(x: Map, sigma: float) -> Map:
        """[mask.shape]"""
        weight = cv2.GaussianBlur(mask, (0, 0), sigma) + 1e-3
        return np.asarray(cv2.GaussianBlur(resize(x * fine_mask, mask.shape), (0, 0), sigma) / weight, np.float32)

    centred = values - resize(local_mean(values, mean_sigma), values.shape)
    spread = np.sqrt(local_mean(centred**2, spread_sigma) + floor**2)
    return np.asarray(centred / resize(spread, values.shape), np.float32)
