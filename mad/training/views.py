"""From decoded tiles to augmented views, on uint8 arrays [H, W, 3]; every function draws from the generator it is given.

Under `mad` a pair sample gives the teacher two views of the parent and the student one view of each drawn child (MAD paper,
Table 1): photometric changes, flips and right angles only, so parents are never cropped or rescaled and children keep their
native resolution (those of `enlarged_cell`, a control, have none). Standalone tiles, and every tile under `dinov2`, give
standard multi-crop views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mad.config.views import PhotometricConfig, ViewsConfig
from mad.training.stain import Image, jitter_stain

Pixels = TypeVar("Pixels", bound=npt.NDArray[Any])
LUMA = np.array([0.299, 0.587, 0.114])
RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)
GREY = np.outer(np.ones(3), LUMA)
COSINE, SINE = (YIQ_TO_RGB @ part @ RGB_TO_YIQ for part in (np.diag([0, 1, 1]), [[0, 0, 0], [0, 0, -1], [0, 1, 0]]))
HUE_BASIS = np.stack([GREY, COSINE, SINE]).reshape(3, 9)  # a turn of the hue is GREY + cos COSINE + sin SINE
JITTER = (0.4, 0.4, 0.2)  # of brightness, contrast and saturation at strength 1
BLUR_SIGMA = (0.1, 2.0)  # pixels, where tiles have 224 (DINOv2, for global and local views alike); scaled with the tile
FEW_WEIGHTS = 7
ASPECTS = (math.log(3 / 4), math.log(4 / 3))
FIRST_GLOBAL, OTHER_GLOBAL, LOCAL = 0, 1, 2


class Views(NamedTuple):
    """The views of one sample (or of one tile of it): copied once, when a batch is put together.

    `teacher` and `student` are images [P, P, 3], `student` None where the student's full-size views are the teacher's own;
    `local` are images [p, p, 3], none for pairs. `tiles` names the tiles that were read. `masks` [T, N] tells the patches of
    the teacher's views that are hidden where the student sees them too; None where nothing is ever masked. `features` [K, D] are
    stored embeddings that stand in for the teacher's views. `cells` [T, S, N]: of a pair, the share that each child has in the
    tokens of each view of its parent; None where children answer to the whole of it.
    """

    kind: str
    teacher: list[Image]
    student: list[Image] | None
    local: list[Image]
    tiles: tuple[str, ...]
    masks: npt.NDArray[np.bool_] | None = None
    features: npt.NDArray[np.float32] | None = None
    cells: npt.NDArray[np.float32] | None = None


def pair_views(
    parent: Image,
    children: list[Image],
    config: PhotometricConfig,
    rng: np.random.Generator,
    tiles: tuple[str, ...],
    cells: Sequence[npt.NDArray[np.float32]] = (),
) -> Views:
    """MAD's views: 2 of the parent for the teacher, 1 of each child for the student (6 with 4 children).

    `cells` [rows, columns] of each child, its shares of the parent's tokens, are turned as the parent is.
    """
    side = parent.shape[0]
    teacher, places = [], []
    for view in (FIRST_GLOBAL, OTHER_GLOBAL):
        turn = draw_turn(rng)
        teacher.append(photometric(turned(parent, *turn), config, rng, view, side))
        places.append([turned(cell, *turn).ravel() for cell in cells])
    student = [photometric(dihedral(child, rng), config, rng, LOCAL, side) for child in children]
    return Views("pair", teacher, student, [], tiles, cells=np.array(places) if cells else None)


def multicrop_views(
    tile: Image, views: ViewsConfig, local_px: int, config: PhotometricConfig, rng: np.random.Generator, tile_id: str
) -> Views:
    """DINOv2's views of one tile: global crops of the tile's own size for both networks, local crops for the student."""
    side = tile.shape[0]
    large = [
        photometric(
            dihedral(crop(tile, views.global_scale, side, rng), rng), config, rng, min(place, OTHER_GLOBAL), side
        )
        for place in range(views.global_crops)
    ]
    small = [
        photometric(dihedral(crop(tile, views.local_scale, local_px, rng), rng), config, rng, LOCAL, side)
        for _ in range(views.local_crops)
    ]
    return Views("multicrop", large, None, small, (tile_id,))


def dihedral(image: Image, rng: np.random.Generator) -> Image:
    """One of the eight flips and quarter turns of a square, each as likely."""
    return turned(image, *draw_turn(rng))


def draw_turn(rng: np.random.Generator) -> tuple[int, bool]:
    """Quarter turns and whether to mirror, for `turned`: the eight as likely."""
    return int(rng.integers(4)), bool(rng.integers(2))


def turned(image: Pixels, turn: int, mirror: bool) -> Pixels:
    """A square array [H, H] or [H, H, C] turned clockwise by `turn` quarters, then mirrored left to right."""
    if turn == 0:
        return cv2.flip(image, 1) if mirror else image  # type: ignore[return-value]
    if turn == 2:
        return cv2.flip(image, 0 if mirror else -1)  # type: ignore[return-value]
    if mirror and turn == 1:
        return cv2.transpose(image)  # type: ignore[return-value]
    rotated = cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE if turn == 1 else cv2.ROTATE_90_COUNTERCLOCKWISE)
    return cv2.flip(rotated, 1) if mirror else rotated  # type: ignore[return-value]


def enlarged_cell(parent: Image, position: int, step: int) -> Image:
    """The cell `position` (row-major) of the parent's `step` x `step` grid, enlarged to the parent's size by cubic interpolation.

    It shows what the child at this position shows, with the parent's resolution. Where the side is no multiple of `step`, cell
    borders are rounded to whole pixels.
    """
    side = parent.shape[0]
    top, bottom = (side * (position // step + end) // step for end in (0, 1))
    left, right = (side * (position % step + end) // step for end in (0, 1))
    cell = parent[top:bottom, left:right]
    return cv2.resize(cell, (side, side), interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)


def crop(image: Image, scale: tuple[float, float], side: int, rng: np.random.Generator) -> Image:
    """A random rectangle (share of the area in `scale`, aspect 3/4 to 4/3) resized to `side` x `side`."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*ASPECTS))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    shrinks = w >= side and h >= side
    window = image[y : y + h, x : x + w]
    resized = cv2.resize(window, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return resized.astype(np.uint8, copy=False)


def photometric(image: Image, config: PhotometricConfig, rng: np.random.Generator, place: int, tile_px: int) -> Image:
    """Stain jitter, colour jitter, grayscale, blur and solarisation with the strengths and shares of `config`.

    `place` picks DINO's asymmetric shares; `tile_px`, the side of the tile that the view is of, scales the blur.
    """
    if config.stain:
        image = jitter_stain(image, config.stain, rng)
    matrix = colour_matrix(image, config, rng)
    if matrix is not None:
        image = cv2.transform(image, matrix)  # type: ignore[assignment]
    if rng.random() < config.blur[place]:
        image = blur(image, rng.uniform(*BLUR_SIGMA) * tile_px / 224)
    if place == OTHER_GLOBAL and rng.random() < config.solarize:
        image = cv2.min(image, cv2.bitwise_not(image))  # type: ignore[assignment]
    return image


def blur(image: Image, sigma: float) -> Image:
    """Gaussian blur with `sigma` in pixels, cut off at three sigma.

    `GaussianBlur` rounds its weights to 8 bits and is slow beyond 7 of them, where floats are used: twice as fast at 224 px,
    at most two levels apart.
    """
    size = round(6 * sigma + 1) | 1
    if size <= FEW_WEIGHTS:
        return cv2.GaussianBlur(image, (0, 0), sigma)  # type: ignore[return-value]
    kernel = cv2.getGaussianKernel(size, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(image, -1, kernel, kernel)  # type: ignore[return-value]


def colour_matrix(image: Image, config: PhotometricConfig, rng: np.random.Generator) -> npt.NDArray[np.float64] | None:
    """Brightness b, contrast c, saturation s, hue and grayscale composed into one affine map [3, 4] of RGB, or None.

    Each of torchvision's steps is linear in RGB (hue as a rotation H in YIQ), so they are multiplied before the image is
    touched once; values are clipped at the end instead of after each step. With G, which replaces a colour by its luma,
    and the luma y of the brightened image's mean, H G = G H = G leaves

        x -> c b (s H + (1 - s) G) x + (1 - c) y, or, where the view is grey, x -> c b G x + (1 - c) y
    """
    gain, shift, turn = 1.0, 0.0, np.array([1.0, 0.0, 0.0])  # the latter of HUE_BASIS
    jittered = rng.random() < config.jitter_share and config.jitter > 0
    if jittered:
        brightness, contrast, saturation = (
            1 + config.jitter * spread * (2 * draw - 1) for spread, draw in zip(JITTER, rng.random(3), strict=True)
        )
        angle = 2 * math.pi * rng.uniform(-0.1, 0.1) * config.jitter
        red, green, blue, _ = cv2.mean(image)
        gain = contrast * brightness
        shift = (1 - contrast) * brightness * (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)
        turn[1:] = saturation * math.cos(angle), saturation * math.sin(angle)
    if greyed := rng.random() < config.grayscale:
        turn[1:] = 0
    if not jittered and not greyed:
        return None
    matrix = np.full((3, 4), shift)
    matrix[:, :3] = (gain * turn @ HUE_BASIS).reshape(3, 3)
    return matrix


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images [..., H, W, 3] to fp32 [..., 3, H, W], normalised as the backbone expects: one copy, changed in place."""
    mean_, std_ = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (mean, std))
    copied = images.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    return copied.div_(255).sub_(mean_).div_(std_)
