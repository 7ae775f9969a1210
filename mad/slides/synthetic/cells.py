"""Cells: what 40x shows of a tissue. Nuclei as each class has them, and the fibrils between them; drawn at 0.25 um per pixel."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mad.slides.synthetic.architecture import MEAN_UM, SPREAD_UM, TANGENTIAL, directions, span
from mad.slides.synthetic.fields import Map, band_pass, blend_weights, resize, standardise_locally, without_area_mean
from mad.slides.synthetic.layout import CELL_PX, CELL_UM, GLASS, MPP, Layout

FIBRIL_PERIODS_PX = (4.2, 6.2, 9.2)
FIBRIL_BANK_PX = 864
FIBRIL_PERIOD_RANGE = ((5.0, 6.8), (5.0, 6.8), (4.2, 5.4), (6.8, 9.2))
FIBRIL_ORDER_RANGE = ((0.5, 1.0), (0.0, 0.45), (0.0, 0.45), (0.5, 1.0))
INK = 150
"""Grey value of a plain nucleus in the drawing."""


@dataclass(frozen=True)
class Nuclei:
    """The nuclei of one class."""

    area_um2: float
    """Tissue per nucleus that is placed; followers come on top."""
    diameter_um: float
    elongation: tuple[float, float]
    vesicular: float = 0.1
    """0: solid. 1: a pale nucleus with a rim and a nucleolus."""
    aligned: bool = False
    """Long axis along the fibres rather than any way."""
    soma_um: float = 0.0
    """Diameter of the cell body; 0: none is seen."""
    satellites: float = 0.0
    """Chance of a small round nucleus at its side."""
    row: int = 0
    """Most nuclei that follow it in a row along the fibres."""


NUCLEI = (
    Nuclei(700, 6.0, (2.0, 3.4), aligned=True),
    Nuclei(800, 5.8, (1.0, 1.5)),
    Nuclei(1000, 7.6, (1.0, 1.3), vesicular=0.5, soma_um=12.0, satellites=0.5),
    Nuclei(1800, 6.0, (1.0, 1.25), row=3),
)


def draw_nuclei(layout: Layout, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The nuclei of a slide, `INK` where a plain one lies, 0 outside. [height, width] level-0 px"""
    height, width = (n * CELL_PX for n in layout.classes.shape)
    drawing = np.zeros((height, width), np.uint8)
    least = min(kind.area_um2 for kind in NUCLEI)
    count = int(height * width * MPP**2 / least)
    places = np.stack([rng.uniform(0, width - 1, count), rng.uniform(0, height - 1, count)], 1)
    chance = rng.random(count)
    for (x, y), draw in zip(places, chance, strict=True):
        tissue = int(layout.classes[int(y / CELL_PX), int(x / CELL_PX)])
        if tissue == GLASS or draw * NUCLEI[tissue].area_um2 > least:
            continue
        _draw_cell(drawing, layout, tissue, x, y, rng)
    # soft borders: chromatin thins out towards the membrane, and sections have a thickness
    return np.asarray(cv2.GaussianBlur(drawing, (0, 0), 1.3), np.uint8)


def _draw_cell(
    drawing: NDArray[np.uint8], layout: Layout, tissue: int, x: float, y: float, rng: np.random.Generator
) -> None:
    """One nucleus with its cell body, satellites and followers. In place."""
    kind = NUCLEI[tissue]
    fibres = fibre_angle(layout, tissue) + rng.normal(0, 0.2)
    turn = fibres if kind.aligned else rng.uniform(0, np.pi)
    diameter, elongation = kind.diameter_um * rng.uniform(0.88, 1.12), rng.uniform(*kind.elongation)
    if kind.soma_um:
        # a rounded pyramid, its apical dendrite across the layers
        size, tip = kind.soma_um / MPP / 2 * rng.uniform(0.85, 1.15), fibres + np.pi * int(rng.integers(2))
        turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        reach = size * (0.85 + 0.5 * np.exp(-0.5 * (np.abs(turns - np.pi) / 0.35) ** 2) + 0.12 * np.cos(3 * turns))
        outline = np.stack([x + reach * np.cos(turns + tip), y + reach * np.sin(turns + tip)], 1)
        cv2.fillPoly(drawing, [(outline * 16).astype(np.int32)], int(0.3 * INK), cv2.LINE_AA, 4)
    _draw_nucleus(drawing, x, y, diameter, elongation, turn, kind.vesicular)
    if rng.random() < kind.satellites:
        side = rng.uniform(0, 2 * np.pi)
        _draw_nucleus(drawing, x + 36 * np.cos(side), y + 36 * np.sin(side), 5.2, 1.1, 0, 0.0)
    for step in range(1, 1 + int(rng.integers(0, kind.row + 1))):
        away = 32 * step
        _draw_nucleus(drawing, x + away * np.cos(fibres), y + away * np.sin(fibres), diameter, elongation, turn, 0.1)


def _draw_nucleus(
    drawing: NDArray[np.uint8], x: float, y: float, diameter_um: float, elongation: float, turn: float, vesicular: float
) -> None:
    """A bean of an ellipse; the more vesicular, the paler inside and the darker at rim and nucleolus. In place."""
    centre = (int(x * 16), int(y * 16))
    radius = diameter_um / MPP / 2
    turns = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    dent = 1 + 0.07 * np.sin(2 * turns + x) + 0.05 * np.sin(3 * turns + y)
    long, short = (
        radius * np.sqrt(elongation) * dent * np.cos(turns),
        radius / np.sqrt(elongation) * dent * np.sin(turns),
    )
    outline = np.stack([long * np.cos(turn) - short * np.sin(turn), long * np.sin(turn) + short * np.cos(turn)], 1)

    def ellipse(scale: float, value: float) -> None:
        points = ((outline * scale + (x, y)) * 16).astype(np.int32)
        cv2.fillPoly(drawing, [points], min(255, int(value)), cv2.LINE_AA, 4)

    ellipse(1.0, INK * (1 + 0.5 * vesicular))
    if vesicular > 0.3:
        ellipse(0.78, INK * (1 - 0.6 * vesicular))
        cv2.circle(drawing, centre, int(radius * 0.24 * 16), int(1.4 * INK), -1, cv2.LINE_AA, 4)


def fibre_angle(layout: Layout, tissue: int) -> float:
    """Mean direction of the fibres of a class, radians from x."""
    return layout.tangent if TANGENTIAL[tissue] else layout.tangent + np.pi / 2


@dataclass(frozen=True)
class Chromatin:
    """Nuclei prepared for the stain: local mean 0 and local variance 1, what 10x shows apart from what only 40x shows."""

    coarse: Map
    """[height / 4, width / 4]"""
    gain: Map
    """[height / 16, width / 16], 1 / local deviation of the fine part."""


def normalise_nuclei(nuclei: NDArray[np.uint8], layout: Layout) -> tuple[Map, Chromatin]:
    """The fine part of the nuclei [height, width], and their coarse part with the gain that levels the fine one."""
    height, width = nuclei.shape
    average = resize(nuclei, (height // 4, width // 4)) / np.float32(INK)
    sigma = SPREAD_UM / CELL_UM
    coarse = np.clip(standardise_locally(average, layout.tissue, MEAN_UM / CELL_UM, sigma, 0.06), -1.5, 5)
    fine: Map = nuclei.astype(np.float32) / np.float32(INK) - resize(average, (height, width))
    energy = resize(fine**2, layout.classes.shape) * layout.tissue
    weight = cv2.GaussianBlur(layout.tissue, (0, 0), sigma) + 1e-3
    gain = 1 / np.sqrt(cv2.GaussianBlur(energy, (0, 0), sigma) / weight + 0.03**2)
    return fine, Chromatin(coarse, np.asarray(gain, np.float32))


@dataclass(frozen=True)
class Fibrils:
    """Fibrils as a blend of periodic textures [864, 864]; what a 4 x 4 area average would show of them is removed."""

    weights: dict[tuple[float, str], Map]
    banks: dict[tuple[float, str], Map]
    chromatin: Map
    """The grain of nuclei, [864, 864]."""


def make_fibrils(layout: Layout, rng: np.random.Generator, blur_px: float) -> Fibrils:
    """The textures of a slide and the weights by which the latents of its cells blend them.

    What the scanner's blur will take from each period, a factor exp(-2 (pi blur / period)^2), is given beforehand: else the
    contrast of a tile, and so its colour, would tell the period.
    """
    period, order, _ = layout.cells
    weights = blend_weights(
        span(layout, period, FIBRIL_PERIOD_RANGE, geometric=True),
        directions(layout, span(layout, order, FIBRIL_ORDER_RANGE)),
        FIBRIL_PERIODS_PX,
    )
    angles = {"none": None, "along": layout.tangent, "across": layout.tangent + np.pi / 2}
    banks = {}
    for size, kind in ((size, kind) for size in FIBRIL_PERIODS_PX for kind in angles):
        texture = without_area_mean(band_pass(rng, FIBRIL_BANK_PX, size, angles[kind]))
        if (size, kind) in weights:
            banks[size, kind] = (texture * np.exp(2 * (np.pi * blur_px / size) ** 2)).astype(np.float32)
    chromatin = without_area_mean(band_pass(rng, FIBRIL_BANK_PX, 4.2))
    return Fibrils(weights, banks, chromatin)
