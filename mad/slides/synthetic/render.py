"""From architecture and cells to a stained, scanned slide: haematoxylin and eosin in optical density, then the scanner's blur.

Full-size maps are made in horizontal strips, so that no more than the picture itself and two maps are ever held.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mad.config.synthetic import SyntheticConfig
from mad.slides.synthetic.architecture import draw_architecture
from mad.slides.synthetic.cells import Fibrils, draw_nuclei, make_fibrils, normalise_nuclei
from mad.slides.synthetic.cohort import SCANNERS, scanner, slide_index
from mad.slides.synthetic.fields import Map
from mad.slides.synthetic.layout import CELL_PX, MPP, Layout, stream

STRIP_PX = 128
HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.12, 0.95, 0.28)
"""Absorption per channel (red, green, blue) of the two stains, after Ruifrok and Johnston (2001), eosin a little redder."""


@dataclass(frozen=True)
class Stain:
    """How one patient's slide was stained and scanned."""

    haematoxylin: NDArray[np.float32]
    eosin: NDArray[np.float32]
    density: tuple[float, float]
    """Mean optical density of the two in tissue."""
    white: NDArray[np.float32]
    """Grey values of glass."""
    blur_px: float
    """Standard deviation of the scanner's point spread, level-0 px."""


def draw_stain(config: SyntheticConfig, slide_id: str) -> Stain:
    """The stain and scanner of a slide: a small spread between patients, a blur of each scanner's own."""
    rng = stream(config, slide_id, "stain")

    def vector(absorption: tuple[float, ...]) -> NDArray[np.float32]:
        drawn = np.array(absorption) + rng.normal(0, 0.012, 3)
        return (drawn / np.linalg.norm(drawn)).astype(np.float32)

    haematoxylin, eosin = vector(HAEMATOXYLIN), vector(EOSIN)
    density = (0.30 * rng.uniform(0.95, 1.05), 0.42 * rng.uniform(0.95, 1.05))
    white = 255 * (rng.uniform(0.955, 0.975) + rng.uniform(-0.006, 0.006, 3))
    sharp = SCANNERS.index(scanner(slide_index(slide_id))) == 0
    return Stain(haematoxylin, eosin, density, white.astype(np.float32), rng.uniform(0.6, 0.7) + (0 if sharp else 0.12))


def render(config: SyntheticConfig, slide_id: str, layout: Layout) -> NDArray[np.uint8]:
    """The pixels of a slide at 40x, [height, width, 3] RGB."""
    stain = draw_stain(config, slide_id)
    architecture = draw_architecture(layout, stream(config, slide_id, "architecture"))
    nuclei = draw_nuclei(layout, stream(config, slide_id, "nuclei"))
    fine_nuclei, chromatin = normalise_nuclei(nuclei, layout)
    fibrils = make_fibrils(layout, stream(config, slide_id, "fibrils"), stain.blur_px)
    # the tissue's edge: the grid's stairs smoothed, then sharpened; half the stain lies on the annotated border
    tissue, grain = np.asarray(cv2.GaussianBlur(layout.tissue, (0, 0), 0.8), np.float32), layout.cells[2]
    picture = np.empty((*nuclei.shape, 3), np.uint8)
    for top in range(0, nuclei.shape[0], STRIP_PX):
        rows = slice(top, min(top + STRIP_PX, nuclei.shape[0]))
        here = _Strip(rows, nuclei.shape[1])
        fibre = _blend(fibrils, here)
        eosin = 1 + 0.27 * here.enlarge(architecture) + 0.42 * fibre
        _stain_plaques(eosin, layout, here)
        fine = fine_nuclei[rows] * here.enlarge(chromatin.gain)
        fine += (nuclei[rows] > 60) * here.tile(fibrils.chromatin) * here.enlarge(0.2 + 2.0 * grain)
        haematoxylin = 1 + 0.48 * here.enlarge(chromatin.coarse) + 0.42 * fine + 0.10 * fibre
        edge = np.clip(3 * here.enlarge(tissue) - 1, 0, 1)
        here.absorb(picture, stain, edge, haematoxylin, eosin)
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), stain.blur_px), np.uint8)


@dataclass(frozen=True)
class _Strip:
    """Some rows of the slide, and how maps of coarser grids and periodic textures are laid on them."""

    rows: slice
    width: int

    def enlarge(self, values: Map) -> Map:
        """The part of a map of the whole slide that lies on this strip, bilinear. [rows, width]"""
        step = self.width // values.shape[1]
        if step == 1:
            return values[self.rows]
        half = 0.5 / step - 0.5
        warp = np.array([[1 / step, 0, half], [0, 1 / step, self.rows.start / step + half]], np.float32)
        size = (self.width, self.rows.stop - self.rows.start)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return np.asarray(cv2.warpAffine(values, warp, size, flags=flags, borderMode=cv2.BORDER_REPLICATE), np.float32)

    def tile(self, texture: Map) -> Map:
        """A periodic texture, repeated over this strip. [rows, width]"""
        side = texture.shape[0]
        band = np.take(texture, np.arange(self.rows.start, self.rows.stop), axis=0, mode="wrap")
        return np.tile(band, (1, -(-self.width // side)))[:, : self.width]

    def absorb(self, picture: NDArray[np.uint8], stain: Stain, tissue: Map, haematoxylin: Map, eosin: Map) -> None:
        """Beer and Lambert: light left by the two stains, where there is tissue. Written into `picture`."""
        haematoxylin = np.maximum(haematoxylin * stain.density[0], 0.02) * tissue
        eosin = np.maximum(eosin * stain.density[1], 0.02) * tissue
        for channel in range(3):
            light = np.exp(-(haematoxylin * stain.haematoxylin[channel] + eosin * stain.eosin[channel]))
            picture[self.rows, :, channel] = light * stain.white[channel] + 0.5


def _blend(fibrils: Fibrils, strip: _Strip) -> Map:
    """The fibrils on a strip, variance 1. [rows, width]"""
    top, bottom = strip.rows.start // CELL_PX, -(-strip.rows.stop // CELL_PX)
    total = np.zeros((strip.rows.stop - strip.rows.start, strip.width), np.float32)
    for key, weight in fibrils.weights.items():
        if weight[max(0, top - 1) : bottom + 1].max() > 0.01:
            total += strip.enlarge(weight) * strip.tile(fibrils.banks[key])
    return total


def _stain_plaques(eosin: Map, layout: Layout, strip: _Strip) -> None:
    """Dense eosinophilic cores with a fibrillar halo. In place."""
    for x_um, y_um, radius_um in layout.plaques:
        x, y, radius = x_um / MPP, y_um / MPP - strip.rows.start, radius_um / MPP
        reach = 2.2 * radius
        top, bottom = max(0, int(y - reach)), min(eosin.shape[0], int(y + reach) + 1)
        left, right = max(0, int(x - reach)), min(eosin.shape[1], int(x + reach) + 1)
        if top >= bottom or left >= right:
            continue
        dy, dx = np.mgrid[top:bottom, left:right].astype(np.float32) - np.array([[[y]], [[x]]], np.float32)
        far, turn = np.hypot(dx, dy) / radius, np.arctan2(dy, dx)
        core = 1 / (1 + np.exp((far - 0.6) * 18))
        spikes = 0.5 + 0.5 * np.sin(13 * turn + 4 * np.sin(3 * turn + radius))
        halo = np.exp(-0.5 * ((far - 0.95) / 0.35) ** 2) * spikes
        eosin[top:bottom, left:right] += 1.1 * core + 0.7 * halo
