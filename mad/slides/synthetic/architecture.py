"""Architecture: what 2.5x and 10x show of a tissue. Texture period, fibre direction and order, vessels; drawn at 1 um per pixel."""

from __future__ import annotations

import cv2
import numpy as np

from mad.slides.synthetic.fields import Map, band_pass, blend_weights, resize, standardise_locally
from mad.slides.synthetic.layout import CELL_UM, Layout

PERIODS_UM = (13.0, 18.4, 26.0, 36.8, 52.0)
PATCH_PERIOD_UM = 64.0
BANK_UM = 864
"""Side of the periodic textures: no multiple of a tile, so that no two tiles bear the same piece of one."""
# per class (meninges, superficial, gray, white): the period runs from the first to the second with the latent, as do the others
PERIOD_RANGE = ((27.0, 48.0), (13.5, 21.0), (27.0, 48.0), (13.5, 21.0))
ORDER_RANGE = ((0.4, 1.0), (0.0, 0.4), (0.0, 0.4), (0.4, 1.0))
TANGENTIAL = (1.0, 1.0, 0.0, 0.0)
"""1: fibres run along the surface, 0: across the layers."""
VESSELS_PER_MM2 = (60.0, 35.0, 90.0, 50.0)
MEAN_UM, SPREAD_UM = 24.0, 40.0
"""Reach of the local normalisation of mean and of deviation: within a 10x tile of the demo, whose side is 112 um."""
CLIP = 2.5


def span(layout: Layout, latent: Map, ranges: tuple[tuple[float, float], ...], geometric: bool = False) -> Map:
    """A latent in [0, 1] laid on each class's range, linearly or in ratios. [height / 16, width / 16]"""
    low, high = (layout.pick(tuple(r[side] for r in ranges), glass=ranges[0][side]) for side in (0, 1))
    return low * (high / low) ** latent if geometric else low + (high - low) * latent


def directions(layout: Layout, order: Map) -> dict[str, Map]:
    """Shares of texture without direction, along the surface and across the layers."""
    tangential = layout.pick(TANGENTIAL)
    return {"none": 1 - order, "along": order * tangential, "across": order * (1 - tangential)}


def draw_architecture(layout: Layout, rng: np.random.Generator) -> Map:
    """The architecture of a slide at 1 um per pixel: zero mean, unit variance, both locally. [height / 4, width / 4]"""
    coarse = layout.classes.shape
    shape = (coarse[0] * 4, coarse[1] * 4)
    period, order, grain = layout.architecture
    weights = blend_weights(
        span(layout, period, PERIOD_RANGE, geometric=True),
        directions(layout, span(layout, order, ORDER_RANGE)),
        PERIODS_UM,
    )
    along, depth = (resize(place, shape) % BANK_UM for place in (layout.along_um, layout.depth_um))
    angles = {"none": None, "along": 0.0, "across": np.pi / 2}

    def bent(texture: Map) -> Map:
        """A periodic texture laid along the layers."""
        return np.asarray(cv2.remap(texture, along, depth, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP))

    texture = np.zeros(shape, np.float32)
    for (period_um, kind), weight in weights.items():
        texture += resize(weight, shape) * bent(band_pass(rng, BANK_UM, period_um, angles[kind]))
    # the third latent adds patches, too wide to be seen at 40x
    texture += resize(1.0 * grain, shape) * bent(band_pass(rng, BANK_UM, PATCH_PERIOD_UM))
    band = resize(layout.band, shape)
    weave = sum(bent(band_pass(rng, BANK_UM, 22.0, angle)) for angle in (np.pi / 4, 3 * np.pi / 4)) / np.sqrt(2)
    texture = (texture * (1 - band) + weave * band) / np.sqrt((1 - band) ** 2 + band**2)
    _draw_vessels(texture, layout, rng)
    return np.clip(
        standardise_locally(texture, layout.tissue, MEAN_UM / CELL_UM, SPREAD_UM / CELL_UM, 0.1), -CLIP, CLIP
    )


def _draw_vessels(texture: Map, layout: Layout, rng: np.random.Generator) -> None:
    """Small vessels, a dark wall around a pale lumen, as dense as the class has them. In place."""
    density = layout.pick(VESSELS_PER_MM2)
    height, width = texture.shape
    most = max(VESSELS_PER_MM2)
    count = rng.poisson(height * width * 1e-6 * most)
    for x, y, chance in zip(
        rng.uniform(0, width, count), rng.uniform(0, height, count), rng.random(count), strict=True
    ):
        radius, stretch, turn = rng.uniform(3.5, 6), rng.uniform(1, 1.6), rng.uniform(0, 180)
        if chance * most >= density[int(y / 4), int(x / 4)]:
            continue
        for size, value in ((radius, 2.0), (radius - 1.4, -2.2)):
            axes = (int(size * stretch * 8), int(size * 8))
            cv2.ellipse(texture, (int(x * 8), int(y * 8)), axes, turn, 0, 360, value, -1, cv2.LINE_8, 3)
