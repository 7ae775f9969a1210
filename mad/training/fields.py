"""Views of cross-magnification distillation: one field of view at two magnifications, and the student's tokens over its children.

Geometry and colours are drawn once per field. The children are put together to one mosaic before it is turned and coloured, and
cut apart afterwards: child k of the turned mosaic is what lies in block k of the turned parent, whichever child that was. Stored
embeddings change places by the same turn. Positions are row-major in an s x s grid, s² = K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from mad.config.distill import DistillConfig
from mad.config.views import PhotometricConfig
from mad.training.views import FIRST_GLOBAL, Image, draw_turn, photometric, turned

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Field:
    """What the student sees [P, P, 3], and of what the teacher tells: images [P, P, 3] that it embeds, or embeddings [K, D]."""

    student: Image
    shown: list[Image]
    features: Features | None


def make_field(distill: DistillConfig, parent: Image | None, children: list[Image], features: Features | None) -> Field:
    """The field as it is stored.

    Args:
        distill: which image is the student's and whose embeddings are the targets.
        parent: [P, P, 3]; not needed with `input: resized`.
        children: K images [P, P, 3], row-major; none where neither student nor teacher sees them.
        features: the teacher's embeddings [K, D], or [1, D] of the parent; None: it embeds images.
    """
    student = parent if distill.input == "pyramid" else shrunk(children)
    assert student is not None
    shown = [] if features is not None else children if distill.teacher_level == "fine" else [student]
    return Field(student, shown, features)


def augment(field: Field, config: PhotometricConfig, rng: np.random.Generator) -> Field:
    """The field under one flip or turn, and one set of colours for all of its images."""
    way, seed = draw_turn(rng), int(rng.integers(2**63))

    def changed(image: Image) -> Image:  # equal generators draw equal parameters, whatever the pixels are
        return photometric(
            turned(image, *way), config, np.random.default_rng(seed), FIRST_GLOBAL, field.student.shape[0]
        )

    shown = cells(changed(mosaic(field.shown)), field.student.shape[0]) if field.shown else []
    features = None if field.features is None else field.features[turned_places(len(field.features), *way)]
    return Field(changed(field.student), shown, features)


def turned_places(count: int, turn: int, mirror: bool) -> npt.NDArray[np.int32]:
    """Which of `count` = s² cells comes to lie at each place of a turned grid [count]."""
    side = math.isqrt(count)
    return turned(np.arange(count, dtype=np.int32).reshape(side, side), turn, mirror).ravel()


def mosaic(children: Sequence[Image]) -> Image:
    """K = s² images [P, P, 3] put together row by row: [s P, s P, 3]."""
    side = math.isqrt(len(children))
    return np.vstack([np.hstack(children[start : start + side]) for start in range(0, len(children), side)])


def cells(image: Image, side_px: int) -> list[Image]:
    """The cells of `side_px` of an image, row by row: inverse of `mosaic`."""
    starts = range(0, image.shape[0], side_px)
    return [image[top : top + side_px, left : left + side_px] for top in starts for left in starts]


def shrunk(children: Sequence[Image]) -> Image:
    """The mosaic of K = s² tiles at the side of one of them: areas of s x s pixels averaged."""
    side = children[0].shape[0]
    image = cv2.resize(mosaic(children), (side, side), interpolation=cv2.INTER_AREA)
    return image.astype(np.uint8, copy=False)


def is_whole(children: npt.NDArray[np.int64], step: int) -> npt.NDArray[np.bool_]:
    """Of each pair whether all of its step² children are there: rows [N, at most step²], -1 for one that is not."""
    return np.asarray((children >= 0).all(axis=1) & (children.shape[1] == step**2))
