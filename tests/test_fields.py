"""Aligned augmentation of a field at two magnifications: after every flip and turn child k is token block k."""

import cv2
import numpy as np
import pytest
import torch

from mad.config.distill import DistillConfig
from mad.config.views import PhotometricConfig
from mad.models.cells import cell_means
from mad.training import fields
from mad.training.views import turned

EIGHT = [(turn, mirror) for turn in range(4) for mirror in (False, True)]
PLAIN = PhotometricConfig(jitter=0, grayscale=0, blur=(0, 0, 0), solarize=0)
DISTILL = DistillConfig(teacher="t")
SIDE = 28  # divides by 2 and 4; blocks of whole pixels


def coordinates(side: int) -> np.ndarray:
    """An image whose pixels are their own row and column, and a third number, so that no two are equal."""
    rows, columns = np.mgrid[:side, :side]
    return np.stack([rows, columns, (3 * rows + 7 * columns) % 256], axis=-1).astype(np.uint8)


def brute_force(image: np.ndarray, turn: int, mirror: bool) -> np.ndarray:
    """Clockwise quarter turns and a mirror, pixel by pixel from their definition."""
    for _ in range(turn):
        side, before = len(image), image
        image = np.empty_like(before)
        for row in range(side):
            for column in range(side):
                image[column, side - 1 - row] = before[row, column]
    return np.stack([line[::-1] for line in image]) if mirror else image


class Drawn:
    """A generator whose first two draws are a way of turning; the third seeds the colours."""

    def __init__(self, turn: int, mirror: bool) -> None:
        self._draws = [turn, mirror, 5]

    def integers(self, _: int) -> int:
        return self._draws.pop(0)


@pytest.mark.parametrize("way", EIGHT)
@pytest.mark.parametrize("step", [2, 4])
def test_after_every_flip_and_turn_child_k_is_token_block_k(way, step):
    """The pixels of the field are its coordinates; the student's tokens are means of blocks of its pixels.

    Block k of the student's tokens, child k that the teacher sees and stored embedding k (the mean of the child that it is of)
    must tell of one place, and that place is where the definition of the turn, pixel by pixel, puts it.
    """
    large = coordinates(step * SIDE)
    children = fields.cells(large, SIDE)
    parent = fields.shrunk(children)
    stored = np.stack([child.reshape(-1, 3).mean(axis=0) for child in children]).astype(np.float32)
    shown = fields.augment(fields.make_field(DISTILL, parent, children, None), PLAIN, Drawn(*way))
    cached = fields.augment(fields.make_field(DISTILL, parent, [], stored), PLAIN, Drawn(*way))

    expected = brute_force(large, *way)
    truth = expected.reshape(step, SIDE, step, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(step**2, SIDE, SIDE, 3)
    assert np.array_equal(np.stack(shown.shown), truth)
    assert np.array_equal(shown.student, brute_force(parent, *way)) and np.array_equal(shown.student, cached.student)

    tokens = torch.from_numpy(shown.student.copy()).float()[None]  # a token per pixel
    blocks = cell_means(tokens, step)[0].numpy()
    means = truth.reshape(step**2, -1, 3).mean(axis=1)
    assert np.abs(cached.features - means).max() < 1e-3
    assert np.abs(blocks[:, :2] - means[:, :2]).max() < 1  # the parent's pixels are rounded
    places = np.abs(blocks[:, None, :2] - cached.features[None, :, :2]).sum(axis=2)
    assert (places.argmin(axis=1) == np.arange(step**2)).all() and not shown.features and not cached.shown


@pytest.mark.parametrize("way", EIGHT)
def test_a_wrong_order_would_be_seen(way):
    """What the proof above rests on: but for the identity, untouched places differ from the turned ones."""
    assert np.array_equal(fields.turned_places(16, *way), np.arange(16)) == (way == (0, False))
    assert np.array_equal(turned(coordinates(8), *way), brute_force(coordinates(8), *way))
    assert fields.turned_places(1, *way).tolist() == [0]


def test_each_of_the_eight_is_drawn():
    field = fields.make_field(DISTILL, coordinates(SIDE), [], np.arange(16, dtype=np.float32)[:, None])
    drawn = {
        tuple(fields.augment(field, PLAIN, np.random.default_rng(seed)).features[:, 0].tolist()) for seed in range(200)
    }
    assert len(drawn) == 8


def test_both_magnifications_get_the_same_colours():
    """A field of one colour per child, nearly: the mean colours of the children shrink to the colours of the parent."""
    rng = np.random.default_rng(1)
    large = cv2.resize(
        rng.integers(60, 190, (4, 4, 3)).astype(np.uint8), (4 * SIDE,) * 2, interpolation=cv2.INTER_CUBIC
    )
    children = fields.cells(large, SIDE)
    config, moved = PhotometricConfig(jitter=1, jitter_share=1, grayscale=0.3, blur=(0, 0, 0), stain=0.2), []
    for seed in range(20):
        field = fields.make_field(DISTILL, fields.shrunk(children), children, None)
        out = fields.augment(field, config, np.random.default_rng(seed))
        difference = fields.shrunk(out.shown).astype(int) - out.student
        assert np.abs(difference).mean() < 1.5  # rounding, and clipping before and after the mean
        moved.append(np.abs(out.student.mean(axis=(0, 1)) - field.student.mean(axis=(0, 1))).max())
    assert np.mean(moved) > 5


def test_resized_and_coarse_fields():
    children = [np.full((SIDE, SIDE, 3), 10 * k, np.uint8) for k in range(16)]
    resized = fields.make_field(DistillConfig(teacher="t", input="resized"), None, children, None)
    blocks = resized.student.reshape(4, 7, 4, 7, 3).mean(axis=(1, 3, 4)).ravel()
    assert blocks.tolist() == [10 * k for k in range(16)] and len(resized.shown) == 16
    parent = coordinates(SIDE)
    coarse = fields.make_field(DistillConfig(teacher="t", teacher_level="coarse", cache=False), parent, [], None)
    assert coarse.shown == [parent] and coarse.features is None
    assert np.array_equal(fields.mosaic(fields.cells(fields.mosaic(children), SIDE)), fields.mosaic(children))


def test_cell_means_are_means_over_blocks_row_by_row():
    grid = torch.randn(3, 8, 8, 5, dtype=torch.float64)
    for step in (1, 2, 4):
        side = 8 // step
        wanted = [
            grid[:, r * side :, c * side :][:, :side, :side].mean(dim=(1, 2)) for r in range(step) for c in range(step)
        ]
        torch.testing.assert_close(cell_means(grid, step), torch.stack(wanted, dim=1))


def test_whole_pairs_have_all_children():
    rows = np.arange(32).reshape(2, 16)
    rows[1, 3] = -1
    assert fields.is_whole(rows, 4).tolist() == [True, False]
    assert fields.is_whole(rows[:, :15], 4).tolist() == [False, False]
