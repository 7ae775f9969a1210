"""Colour profiles: what a slide's ICC profile is called, and its pixels turned to sRGB by it."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

from mad.files import MadError


def describe_profile(profile: bytes) -> str:
    """What a profile calls itself."""
    try:
        return ImageCms.getProfileDescription(_parse(profile)).strip() or "unnamed profile"
    except (ImageCms.PyCMSError, OSError):
        return "damaged profile"


def to_srgb(profile: bytes, slide: str) -> Callable[[np.ndarray], np.ndarray]:
    """The transform of RGB uint8 pixels [height, width, 3] from a slide's profile to sRGB.

    Relative colorimetric: colours inside sRGB keep their measured value, relative to the slide's white. The transform is
    built once; `benchmarks/readers.py` shows what applying it costs.

    Raises:
        MadError: the profile is damaged, or none of an RGB image.
    """
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    try:
        transform = ImageCms.buildTransform(_parse(profile), ImageCms.createProfile("sRGB"), "RGB", "RGB", intent)
    except (ImageCms.PyCMSError, OSError) as error:
        raise MadError(
            f"{slide}: its ICC profile ({len(profile)} bytes) cannot be applied ({error}); "
            "set tile.icc: keep to take the pixels as they are stored"
        ) from None

    def apply(pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(pixels)
        ImageCms.applyTransform(image, transform, inPlace=True)
        return np.array(image)  # a copy that may be written to

    return apply


def _parse(profile: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile))
