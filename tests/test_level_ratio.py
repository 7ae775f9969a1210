"""Levels that are no whole downsample, or one but for rounding: tiles hold their place, at the slide's far end too."""

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from conftest import write_tiff
from hypothesis import given
from hypothesis import strategies as st

from mad.config.model import TileConfig
from mad.slides.readers import Reader
from mad.slides.scale import ROUNDING_PX, plan_scale
from mad.tiles.aligned import open_aligned, read_source


class Recorder(Reader):
    """A slide without pixels that keeps what is asked of it."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        super().__init__(Path("recorded"), properties={}, level_dimensions=sizes, profile=None, icc="keep")
        self.asked: list[tuple[int, int, int, int, int]] = []

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        self.asked.append((level, x, y, width, height))
        return np.zeros((height, width, 3), np.uint8)

    def _decode(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        pass


@given(
    width=st.integers(4000, 200_000),
    ratio=st.one_of(st.just(4.0), st.floats(3.95, 4.05)),
    rounding=st.sampled_from([math.floor, math.ceil, round, lambda size: 2 * round(size / 2)]),
    place=st.floats(0, 1),
)
def test_tiles_of_a_level_of_any_size_are_in_place(
    width: int, ratio: float, rounding: Callable[[float], int], place: float
) -> None:
    """A level that was resized to `level_width`: 4x but for rounding, or not. No edge of a tile is off by more than its
    pixels were rounded; where the level is no 4x, by more than the half pixel that a place is rounded to."""
    level_width = rounding(width / ratio)
    reader = Recorder((width, width // 2), (level_width, rounding(width / 2 / ratio)))
    plan = plan_scale(
        mpp=0.25,
        level_downsamples=reader.level_downsamples,
        longer_px=width,
        magnifications=(10.0, 40.0),
        tile_px=224,
    ).levels[0]
    assert plan.level == (1 if width / level_width <= 4.02 else 0)
    x = 896 * int(place * (width // 896 - 1))
    read_source(reader, plan, (x, 0, 896, 896), 224)
    level, left, _, side, _ = reader.asked[0]
    shown = width / reader.level_dimensions[level][0]
    off = max(abs(left - x / shown), abs(left + side - (x + 896) / shown))
    assert off <= (ROUNDING_PX if plan.native else 0.5) + 1e-6
    if ratio == 4.0 and rounding in (math.floor, math.ceil, round):
        assert plan.native and off <= 1 + 1e-6


def test_pixels_of_a_level_of_another_ratio_are_in_place(tmp_path: Path) -> None:
    """A level at 3.985, which is not 4: taken for it, the last tiles and the overview's end would lie 22 px beside."""
    width, height = 6000, 700
    ramp = np.clip((np.arange(width) - 5000) / 4, 0, 255)
    base = np.broadcast_to(ramp[None, :, None], (height, width, 3)).astype(np.uint8)
    small = cv2.resize(base, (round(width / 3.985), round(height / 3.985)), interpolation=cv2.INTER_AREA)
    write_tiff(tmp_path / "s.tiff", [base, small], mpp=0.25)
    with open_aligned(tmp_path / "s.tiff", TileConfig(magnifications=[10, 40], tile_px=112)) as slide:
        assert [(plan.level, plan.native, plan.pyramid) for plan in slide.plan.levels] == [
            (1, False, "scanner"),
            (0, True, "scanner"),
        ]
        x = 12 * 448
        expected = base[0, x : x + 448, 0].reshape(112, 4).mean(axis=1)
        assert np.abs(slide.tile((0, 12))[..., 0].mean(axis=0) - expected).max() < 1.5
        view = slide.reader.overview(32.0, 20, width // 32)
        expected = base[0, : width // 32 * 32, 0].reshape(-1, 32).mean(axis=1)
        assert np.abs(view[..., 0].mean(axis=0) - expected).max() < 1.5
