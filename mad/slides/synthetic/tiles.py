"""What the checks see of a written slide: tiles, their simple features, and the truth behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import fft

from mad.config.synthetic import SyntheticConfig
from mad.files import MadError, Pathlike
from mad.slides.synthetic.layout import CELL_PX, GLASS, layout

TILE_PX = 112
STEP = 4
"""A 10x tile has 4 x 4 children at 40x."""
RADII = np.array([1.5, 3, 4.5, 6.5, 9, 13, 18, 26, 37, 57])
"""Borders of the frequency bands, cycles per tile."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tiles:
    """Tiles of one slide at one magnification; n rows."""

    colour: Floats
    """[n, 6] mean and standard deviation of red, green, blue."""
    texture: Floats
    """[n, d] of `texture_features`."""
    label: NDArray[np.int64]
    """[n] the class that covers most of the tile, 4 = glass."""
    tissue: Floats
    """[n] share of tissue."""
    architecture: Floats
    """[n, 3] mean latents of the architecture."""
    cells: Floats
    """[n, 3] mean latents of the cells."""


@dataclass(frozen=True)
class SlideTiles:
    """The 10x tiles of a slide and their children."""

    parents: Tiles
    children: Tiles
    """Some children of each parent, `per_parent` of them, in the order of the parents."""
    child_colour: Floats
    """[parents, 16, 6] colour of every child."""


def read_tiles(config: SyntheticConfig, slide_id: str, folder: Pathlike, per_parent: int = 4) -> SlideTiles:
    """Tiles of 112 px of a written slide, whole parents only.

    Raises:
        MadError: the slide is not there, or is not of this configuration's size.
    """
    path = Path(folder) / f"{slide_id}.tiff"
    if not path.exists():
        raise MadError(f"{path}: no such slide; write the cohort before checking it")
    with tifffile.TiffFile(path) as tiff:
        fine, coarse = (tiff.pages[level].asarray() for level in (0, 1))
    if fine.shape[:2] != (config.height, config.width):
        raise MadError(
            f"{path}: {fine.shape[1]} x {fine.shape[0]} px, the config says {config.width} x {config.height}"
        )
    truth = layout(config, slide_id)
    rows, columns = coarse.shape[0] // TILE_PX, coarse.shape[1] // TILE_PX
    count = rows * columns
    parents = _grid(coarse, TILE_PX, rows, columns)
    children = _nest(_grid(fine, TILE_PX, rows * STEP, columns * STEP), rows, columns)
    chosen = np.random.default_rng(count).permuted(np.tile(np.arange(STEP**2), (count, 1)), axis=1)[:, :per_parent]

    def describe(values: NDArray, cells: int, nested: bool) -> Floats:
        """Mean over the grid cells of every tile."""
        if not nested:
            return _grid(values, cells, rows, columns).mean((1, 2))
        means = _nest(_grid(values, cells, rows * STEP, columns * STEP).mean((1, 2)), rows, columns)
        return np.take_along_axis(means, chosen.reshape(count, per_parent, *[1] * (means.ndim - 2)), 1).reshape(
            count * per_parent, *means.shape[2:]
        )

    def tiles(pixels: NDArray, side_px: int, nested: bool) -> Tiles:
        shares = describe(np.eye(GLASS + 1)[truth.classes], side_px // CELL_PX, nested)
        latents = [
            describe(np.moveaxis(maps, 0, -1), side_px // CELL_PX, nested) for maps in (truth.architecture, truth.cells)
        ]
        texture = np.concatenate([texture_features(part) for part in np.array_split(pixels, -(-len(pixels) // 64))])
        return Tiles(_colour(pixels), texture, shares.argmax(1), 1 - shares[:, GLASS], *latents)

    some = children[np.arange(count)[:, None], chosen].reshape(count * per_parent, TILE_PX, TILE_PX, 3)
    return SlideTiles(
        tiles(parents, TILE_PX * STEP, nested=False),
        tiles(some, TILE_PX, nested=True),
        np.stack([_colour(children[:, k]) for k in range(STEP**2)], 1),
    )


def texture_features(pixels: NDArray[np.uint8]) -> Floats:
    """Hand-made features of the texture of tiles [n, side, side, 3], nearly blind to colour and contrast. [n, 35]

    Of the standardised grey tile: the logarithm of its energy in nine bands of frequency, how much each band runs in one
    direction (length of the mean of exp(2i angle)), the same along the strongest common direction, and skewness and kurtosis
    of the tile and of its coarse half.
    """
    grey = -np.log((pixels.mean(-1, dtype=np.float32) + 1) / 256)
    grey -= grey.mean((1, 2), keepdims=True)
    grey /= grey.std((1, 2), keepdims=True) + 0.02
    side = grey.shape[1]
    window = np.hanning(side).astype(np.float32)
    spectrum = fft.rfft2(grey * window[:, None] * window[None])
    power = (spectrum.real**2 + spectrum.imag**2).reshape(len(grey), -1)
    fy, fx = np.fft.fftfreq(side)[:, None] * side, np.fft.rfftfreq(side)[None] * side
    band = np.digitize(np.hypot(fy, fx), RADII).ravel()
    member = np.stack([band == k for k in range(1, len(RADII))], 1).astype(np.float32)
    turn = np.exp(2j * np.arctan2(fy, np.broadcast_to(fx, (side, side // 2 + 1)))).ravel()[:, None]
    energy = power @ member + 1e-6
    direction = (power @ (member * turn.real) + 1j * (power @ (member * turn.imag))) / energy
    common = direction.sum(1, keepdims=True)
    aligned = (direction * np.conj(common) / (np.abs(common) + 1e-6)).real
    low = grey.reshape(len(grey), side // 4, 4, side // 4, 4).mean((2, 4))
    moments = []
    for values in (grey, low):
        z = (values - values.mean((1, 2), keepdims=True)) / (values.std((1, 2), keepdims=True) + 1e-3)
        square = z * z
        moments += [(square * z).mean((1, 2)), np.log1p((square * square).mean((1, 2)))]
    moments += [low.std((1, 2)), (grey > 1.5).mean((1, 2)), (grey > 3).mean((1, 2)), (grey < -1.5).mean((1, 2))]
    return np.concatenate([np.log(energy), np.abs(direction), aligned, np.stack(moments, 1)], 1).astype(np.float64)


def texture_encoder(tile_px: int) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """`texture_features` as an encoder, `spec: "python:mad.slides.synthetic.tiles:texture_encoder"`: nothing is learned, and what
    the synthetic slides hold is readable in it.

    Raises:
        MadError: the bands are of tiles of another side.
    """
    if tile_px != TILE_PX:
        raise MadError(f"texture_encoder: made for tiles of {TILE_PX} px, not {tile_px}; set tile.tile_px")
    return lambda tiles: texture_features(tiles).astype(np.float32)


def _colour(pixels: NDArray[np.uint8]) -> Floats:
    """Mean and standard deviation per channel of [n, h, w, 3]. [n, 6]"""
    return np.array([np.concatenate(cv2.meanStdDev(tile)).ravel() for tile in pixels])


def _grid(values: NDArray, side: int, rows: int, columns: int) -> NDArray:
    """Squares of a map [h, w, ...], row by row: [rows * columns, side, side, ...]"""
    cut = values[: rows * side, : columns * side]
    cut = cut.reshape(rows, side, columns, side, *values.shape[2:])
    return cut.swapaxes(1, 2).reshape(rows * columns, side, side, *values.shape[2:])


def _nest(values: NDArray, rows: int, columns: int) -> NDArray:
    """Squares of the finer grid, row by row, gathered under their parents: [rows * columns, 16, ...]"""
    rest = values.shape[1:]
    cut = values.reshape(rows, STEP, columns, STEP, *rest).swapaxes(1, 2)
    return cut.reshape(rows * columns, STEP**2, *rest)
