"""The truth behind a synthetic slide: which tissue lies where, the latents that shape it, plaques and the distinct band.

Everything that varies slowly lives on a grid of 16 level-0 pixels (4 um). Brain is laid in curved layers by depth below a gyrated
surface: glass, leptomeninges, superficial cortex, gray matter, white matter. Within every class smooth latents drive
architecture (seen at 2.5x and 10x) and cells (seen at 40x) together; in the decoupled cohort the cells' latents are drawn anew.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr, ndtri

from mad.config.synthetic import SyntheticConfig
from mad.files import MadError
from mad.slides.synthetic.cohort import is_positive, slide_index
from mad.slides.synthetic.fields import Map, gaussian_field, uniform_field
from mad.slides.synthetic.targets import TARGETS, draw_target

CLASSES = ("Leptomeninges", "Superficial Cortex", "Gray Matter", "White Matter")
MENINGES, SUPERFICIAL, GRAY, WHITE, GLASS = range(5)
MPP = 0.25
CELL_PX = 16
CELL_UM = CELL_PX * MPP
LATENTS = ("period", "order", "grain")
LATENT_SIGMA_UM = 70.0
SHARES = (0.185, 0.18, 0.195, 0.215, 0.225)
"""Area of glass and of the four classes, surface to depth."""
SHIFT = 1.0
"""By how many of its standard deviations within a slide a latent moves with one unit of a target's score."""
PLAQUES_PER_SITE = 3
BAND_RADIUS_UM = 85.0


@dataclass(frozen=True)
class Layout:
    """Maps on the grid of 16 level-0 px, [height / 16, width / 16]; coordinates in micrometres from the top left corner."""

    classes: NDArray[np.int8]
    """0-3 as in `CLASSES`, 4 = glass."""
    depth_um: Map
    """Coordinate across the layers; differences follow the tissue's normal."""
    along_um: Map
    """Coordinate along the layers."""
    tangent: float
    """Mean direction of the surface, radians from x."""
    architecture: Map
    """[3, height / 16, width / 16], the latents of `LATENTS` in [0, 1] that drive the architecture."""
    cells: Map
    """[3, ...], those that drive the cells; the same array content unless the cohort is decoupled."""
    band: Map
    """Share of the distinct architecture, 0-1."""
    plaques: NDArray[np.float32]
    """[n, 3]: x, y, radius of each plaque in um."""

    @property
    def tissue(self) -> Map:
        """1 on tissue, 0 on glass."""
        return (self.classes != GLASS).astype(np.float32)

    def pick(self, per_class: tuple[float, ...], glass: float = 0.0) -> Map:
        """A map of one number per class. [height / 16, width / 16]"""
        return np.array([*per_class, glass], np.float32)[self.classes]


def stream(config: SyntheticConfig, slide_id: str, purpose: str) -> np.random.Generator:
    """The random stream of one purpose: what one part draws never moves what another draws."""
    return np.random.default_rng([config.seed, slide_index(slide_id), zlib.crc32(purpose.encode())])


def layout(config: SyntheticConfig, slide_id: str) -> Layout:
    """The layout of a slide, the same on every call.

    Raises:
        MadError: the cohort has no such slide.
    """
    try:
        index = slide_index(slide_id)
    except ValueError as error:
        raise MadError(str(error)) from None
    if index >= config.patients:
        raise MadError(f"{slide_id}: the synthetic cohort has {config.patients} slides; raise synthetic.patients")
    shape = (config.height // CELL_PX, config.width // CELL_PX)
    rng = stream(config, slide_id, "layers")
    depth, along, tangent = _coordinates(rng, shape)
    classes = _layers(rng, depth)
    _cut_gaps(rng, classes, tangent)
    band, plaques = _lesions(stream(config, slide_id, "lesions"), classes, is_positive(index))
    architecture = _latents(config, slide_id, "latents", shape)
    cells = _latents(config, slide_id, "latents of cells" if config.decoupled else "latents", shape)
    if config.targets:
        _bear_targets(config, slide_id, architecture, cells)
    return Layout(
        classes=classes,
        depth_um=depth,
        along_um=along,
        tangent=tangent,
        architecture=architecture,
        cells=cells,
        band=band,
        plaques=plaques,
    )


def _latents(config: SyntheticConfig, slide_id: str, purpose: str, shape: tuple[int, int]) -> Map:
    rng = stream(config, slide_id, purpose)
    return np.stack([uniform_field(rng, shape, LATENT_SIGMA_UM / CELL_UM) for _ in LATENTS])


def _bear_targets(config: SyntheticConfig, slide_id: str, architecture: Map, cells: Map) -> None:
    """Move the latents of a slide by the scores of its targets (`targets.draw_target`). In place."""
    index = slide_index(slide_id)
    score = {target: draw_target(config, index, target)[1] for target in TARGETS}
    normal = {name: ndtri(np.clip(latents, 1e-6, 1 - 1e-6)) for name, latents in (("a", architecture), ("c", cells))}
    cells[1] = ndtr(normal["c"][1] + SHIFT * score["ordered_fibrils"])
    architecture[2] = ndtr(normal["a"][2] + SHIFT * score["patchy_texture"])
    follow = np.tanh(score["scales_agree"])
    own = gaussian_field(stream(config, slide_id, "own period"), cells.shape[1:], LATENT_SIGMA_UM / CELL_UM)
    cells[0] = ndtr(follow * normal["a"][0] + np.sqrt(1 - follow**2) * own)


def _coordinates(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Map, Map, float]:
    """Depth below a gyrated surface and place along it, um, and the direction of the surface, radians."""
    rows, columns = (np.arange(n, dtype=np.float32) * CELL_UM for n in shape)
    x, y = np.meshgrid(columns - columns.mean(), rows - rows.mean())
    normal = rng.uniform(0, 2 * np.pi)
    across = np.cos(normal) * x + np.sin(normal) * y
    along = np.cos(normal) * y - np.sin(normal) * x
    extent = float(np.hypot(x.max(), y.max()))
    surface = np.zeros_like(x)
    for amplitude, length in ((0.06, 1.1), (0.035, 0.5)):
        wave = rng.uniform(0.8, 1.2) * length * extent
        surface += amplitude * extent * np.sin(2 * np.pi * (along / wave + rng.random()))
    place = rng.uniform(-0.35, 0.35) * extent
    sulcus = np.exp(-0.5 * ((along - place) / (0.1 * extent)) ** 2)
    surface += rng.uniform(0.12, 0.2) * extent * sulcus
    top, middle = np.quantile(across, [SHARES[0], 0.5])
    # folds flatten with depth, slowly enough that depth keeps rising along the normal
    fade = expit((middle - across) / (0.5 * (middle - top)))
    depth = across - surface * (0.25 + 0.75 * fade)
    depth += 5 * gaussian_field(rng, shape, 40 / CELL_UM)
    return depth.astype(np.float32), along.astype(np.float32), float(normal + np.pi / 2)


def _layers(rng: np.random.Generator, depth: Map) -> NDArray[np.int8]:
    """Classes by rank of depth: the shares hold on every slide, up to a small jitter."""
    shares = np.array(SHARES) * rng.uniform(0.94, 1.06, len(SHARES))
    cuts = np.quantile(depth, np.cumsum(shares / shares.sum())[:-1])
    return np.array([GLASS, MENINGES, SUPERFICIAL, GRAY, WHITE], np.int8)[np.digitize(depth, cuts)]


def _cut_gaps(rng: np.random.Generator, classes: NDArray[np.int8], tangent: float) -> None:
    """Tears along or across the layers and cut vessels become glass, three and four per mm2 of slide. In place."""
    height, width = classes.shape
    area_mm2 = height * width * (CELL_UM / 1000) ** 2
    gap = np.zeros(classes.shape, np.uint8)
    for _ in range(max(1, round(3 * area_mm2))):
        where = (int(rng.uniform(0.05, 0.95) * width), int(rng.uniform(0.05, 0.95) * height))
        axes = (int(rng.uniform(12, 24)), int(rng.uniform(2, 4)))
        turn = np.degrees(tangent) + 90 * int(rng.integers(2)) + rng.normal(0, 10)
        cv2.ellipse(gap, where, axes, turn, 0, 360, 1, -1)
    for _ in range(max(1, round(4 * area_mm2))):
        where = (int(rng.uniform(0.03, 0.97) * width), int(rng.uniform(0.03, 0.97) * height))
        radius = rng.uniform(3.5, 6.5)
        cv2.ellipse(gap, where, (int(radius * rng.uniform(1, 1.5)), int(radius)), rng.uniform(0, 180), 0, 360, 1, -1)
    classes[gap > 0] = GLASS


def _lesions(rng: np.random.Generator, classes: NDArray[np.int8], positive: bool) -> tuple[Map, NDArray[np.float32]]:
    """The band of distinct architecture and the plaques.

    Four places of one size are drawn in the cortex, as far from one another as can be. Two bear the distinct architecture; the
    plaques lie in the same two on a positive slide, in the other two on a negative one. Neither counts nor areas differ.
    """
    height, width = classes.shape
    radius = min(BAND_RADIUS_UM, 0.09 * min(height, width) * CELL_UM)
    cortex = np.isin(classes, (SUPERFICIAL, GRAY)).astype(np.uint8)
    inside = cv2.distanceTransform(np.pad(cortex, 1), cv2.DIST_L2, 5)[1:-1, 1:-1] * CELL_UM
    ys, xs = np.nonzero(inside >= min(0.6 * radius, 0.95 * inside.max()))
    points = np.stack([xs, ys], 1)[rng.permutation(len(xs))[:4000]].astype(np.float32) * CELL_UM + CELL_UM / 2
    chosen = [points[0]]
    for _ in range(3):
        distance = np.min([np.hypot(*(points - site).T) for site in chosen], axis=0)
        # any of the farther places, not the farthest: places shall not crowd at the border
        far = np.flatnonzero(distance >= min(3.2 * radius, 0.9 * distance.max()))
        chosen.append(points[rng.choice(far)])
    sites = np.array(chosen)[rng.permutation(4)]
    y, x = np.mgrid[:height, :width].astype(np.float32) * CELL_UM + CELL_UM / 2
    wobble = 1 + 0.12 * gaussian_field(rng, classes.shape, 30 / CELL_UM)
    band = np.zeros(classes.shape, np.float32)
    for site in sites[:2]:
        distance = np.hypot(x - site[0], y - site[1]) * wobble
        band = np.maximum(band, expit((radius - distance) / 4))
    plaques = []
    for site in sites[:2] if positive else sites[2:]:
        first = rng.uniform(0, 2 * np.pi)
        for spoke in range(PLAQUES_PER_SITE):
            turn, away = first + 2 * np.pi * spoke / PLAQUES_PER_SITE, rng.uniform(0.3, 0.6) * radius
            size = rng.uniform(6.5, 9)
            plaques.append((site[0] + away * np.cos(turn), site[1] + away * np.sin(turn), size))
    return band.astype(np.float32), np.array(plaques, np.float32)
