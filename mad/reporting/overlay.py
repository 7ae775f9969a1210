"""A picture of one slide as the pipeline sees it: thumbnail, tissue, ink, coarsest grid, class colours, a scale bar.

Whatever explains the picture stands in a band above it, never over tissue. Lines are dark with a white casing: they show on
glass and on the darkest stain.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mad.config.model import LabelConfig
from mad.files import Pathlike, atomic_path
from mad.tiles.pyramid import Grid

PALETTE = ["#0072b2", "#e69f00", "#009e73", "#f0e442", "#c4c4c4", "#56b4e9", "#332288", "#882255", "#cc79a7", "#d55e00"]
"""Okabe and Ito's colours, which the colour-blind tell apart, and two of Tol's; those that H&E hides come late. Grey is where
Background stands by default: lighter than theirs, which in deuteranopia is close to their green."""
TISSUE, INK, GRID = (0, 0, 0), (213, 94, 0), (40, 60, 110)
MAX_SIDE, MIN_WIDTH = 1600, 560
LINE, TEXT = 26, 16
SHADES = 30


def class_colours(label: LabelConfig) -> dict[str, str]:
    """`#rrggbb` per class, in class order and all different: the configured colour, else the one that the default palette has in
    this place, or where that is taken the next free one, then darker ones."""
    taken = {colour.lower() for colour in label.colours.values()}
    found: dict[str, str] = {}
    for number, name in enumerate(label.classes):
        choices = [label.colours[name]] if name in label.colours else [PALETTE[number % len(PALETTE)], *_shades()]
        found[name] = next((colour for colour in choices if colour not in taken), choices[0])
        taken.add(found[name])
    return found


def _shades() -> list[str]:
    """The palette, then all of it a step darker, and so on: more colours than there can be classes."""
    return [
        "#" + "".join(f"{part * (SHADES - step) // SHADES:02x}" for part in rgb(colour))
        for step in range(SHADES)
        for colour in PALETTE
    ]


def rgb(colour: str) -> tuple[int, int, int]:
    """`#rrggbb` as three bytes."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def write_overlay(
    path: Pathlike,
    overview: np.ndarray,
    *,
    title: str,
    mpp: float | None = None,
    tissue: np.ndarray | None = None,
    pen: np.ndarray | None = None,
    raster: np.ndarray | None = None,
    grid: Grid | None = None,
    label: LabelConfig | None = None,
) -> None:
    """Write the picture as PNG, at most `MAX_SIDE` px wide or high (without its band).

    Args:
        overview: RGB thumbnail [h, w, 3] over the whole grid.
        mpp: um/px of the overview, for the scale bar.
        tissue: boolean mask [h, w], outlined.
        pen: boolean mask of ink [h, w], outlined.
        raster: class per cell (any multiple of the thumbnail's size), tinted in the class colours, background left plain.
        grid: its coarsest tiles are drawn as lines.
    """
    factor = min(3.0, MAX_SIDE / max(overview.shape[:2]))
    size = (max(1, round(overview.shape[1] * factor)), max(1, round(overview.shape[0] * factor)))
    image = cv2.resize(overview, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    legend: list[tuple[str, tuple[int, int, int]]] = []
    if raster is not None and label is not None:
        small = cv2.resize(raster, size, interpolation=cv2.INTER_NEAREST)
        for number, (name, colour) in enumerate(class_colours(label).items()):
            where = small == number
            if name != label.background and where.any():
                image[where] = (0.75 * image[where] + 0.25 * np.array(rgb(colour))).astype(np.uint8)
                _outline(image, where, rgb(colour), 2)
                legend.append((name, rgb(colour)))
    if grid is not None:
        _draw_grid(image, grid)
        legend.append((f"{grid.ladder.magnifications[0]:g}x tiles", GRID))
    for name, mask, paint in (("tissue", tissue, TISSUE), ("pen", pen, INK)):
        if mask is not None and mask.any():
            small = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            _outline(image, small, paint, 1 if name == "tissue" else 3)
            legend.append((name, paint))
    picture = _framed(image, title, legend, None if mpp is None else mpp / factor)
    with atomic_path(path) as temporary:
        picture.save(temporary, compress_level=3)


def _outline(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], width: int) -> None:
    """Draw the mask's borders, in a white casing."""
    lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(image, lines, -1, (255, 255, 255), width + 2, cv2.LINE_AA)
    cv2.drawContours(image, lines, -1, colour, width, cv2.LINE_AA)


def _draw_grid(image: np.ndarray, grid: Grid) -> None:
    """Half-transparent lines between the coarsest tiles, none along the picture's border."""
    rows, columns = grid.shape
    lines = np.zeros(image.shape[:2], np.uint8)
    for row in range(1, rows):
        cv2.line(lines, (0, y := round(row * image.shape[0] / rows)), (image.shape[1], y), 1, 1)
    for column in range(1, columns):
        cv2.line(lines, (x := round(column * image.shape[1] / columns), 0), (x, image.shape[0]), 1, 1)
    where = lines > 0
    image[where] = (0.4 * image[where] + 0.6 * np.array(GRID)).astype(np.uint8)


def _framed(
    image: np.ndarray, title: str, legend: list[tuple[str, tuple[int, int, int]]], mpp: float | None
) -> Image.Image:
    """The picture under a band with title, legend and scale bar; narrow pictures are widened with white."""
    font = ImageFont.load_default(TEXT)
    width = max(image.shape[1], MIN_WIDTH)
    places, x, y = [], 8, LINE
    for name, _ in legend:
        wide = 30 + round(font.getlength(name)) + 16
        if x > 8 and x + wide > width:
            x, y = 8, y + LINE
        places.append((x, y))
        x += wide
    height = (y + LINE if legend else LINE) + 6
    picture = Image.new("RGB", (width, height + image.shape[0]), "white")
    picture.paste(Image.fromarray(image), (0, height))
    draw = ImageDraw.Draw(picture)
    bar = _scale_bar(image.shape[1] * mpp) if mpp else None
    if bar and mpp:
        text, length = (f"{bar / 1000:g} mm" if bar >= 1000 else f"{bar:g} um"), bar / mpp
        right = width - 12
        draw.line([(right - length, 20), (right, 20)], fill="black", width=4)
        draw.text((right - length - 8 - font.getlength(text), 4), text, fill="black", font=font)
    draw.text((8, 4), title, fill="black", font=font)
    for (name, paint), (left, top) in zip(legend, places, strict=True):
        draw.rectangle([left, top + 6, left + 20, top + 20], fill=paint)
        draw.text((left + 28, top + 3), name, fill="black", font=font)
    return picture


def _scale_bar(width_um: float) -> float:
    """The longest of 1, 2, 5, 10, 20, 50 … um that is at most a fifth of the picture's width."""
    unit = 10 ** np.floor(np.log10(max(width_um / 5, 1)))
    return float(unit * max(step for step in (1, 2, 5) if step * unit <= max(width_um / 5, 1)))
