"""Fixtures shared by the tests: a slide whose pixels tell their own coordinates, and the folder of real slides."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import settings

from mad.config.synthetic import SyntheticConfig
from mad.slides.synthetic.slide import write_slide

settings.register_profile("mad", deadline=None, derandomize=True)  # machines are noisy, and CI must not be flaky
settings.load_profile("mad")

DOWNSAMPLES = (1, 4, 16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that several processes end at once."""
    items.sort(key=lambda item: item.get_closest_marker("workflow") is None)


def coordinate_pixels(width: int, height: int, level: int) -> np.ndarray:
    """RGB pixels that encode their own column, row and level: [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x & 255, y & 255, (x >> 8) + ((y >> 8) << 3) + (level << 6)], axis=-1).astype(np.uint8)


def decode_coordinates(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column, row and level that `coordinate_pixels` wrote."""
    low_x, low_y, high = (pixels[..., n].astype(int) for n in range(3))
    return low_x + ((high & 7) << 8), low_y + (((high >> 3) & 7) << 8), high >> 6


def write_tiff(path: Path, levels: list[np.ndarray], mpp: float | None, **options: object) -> None:
    """A tiled pyramidal TIFF that OpenSlide and libvips read; lossless unless `options` say otherwise."""
    with tifffile.TiffWriter(path) as file:
        for number, pixels in enumerate(levels):
            scale = {}
            if mpp is not None:
                per_cm = 1e4 / (mpp * levels[0].shape[1] / pixels.shape[1])
                scale = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
            settings = {"tile": (256, 256), "photometric": "rgb", "compression": "deflate", **scale, **options}
            file.write(pixels, subfiletype=int(number > 0), metadata=None, **settings)


def heed_permissions() -> None:
    """A `preexec_fn`: what is run may enter and read what its owner may, if root runs it too (prctl(2), capabilities(7))."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP


@pytest.fixture(scope="session")
def coordinate_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 40x slide of 2000 x 1900 px with levels 1/4/16; every pixel tells its place and level."""
    path = tmp_path_factory.mktemp("slides") / "coordinates.tiff"
    levels = [coordinate_pixels(2000 // d, 1900 // d, n) for n, d in enumerate(DOWNSAMPLES)]
    write_tiff(path, levels, mpp=0.25)
    return path


@pytest.fixture(scope="session")
def real_slides() -> Path:
    """The folder that MAD_REAL_SLIDES names."""
    folder = os.environ.get("MAD_REAL_SLIDES")
    if not folder:
        pytest.skip("MAD_REAL_SLIDES is unset: no real slides to try")
    return Path(folder)


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two synthetic slides of one coarsest tile each, with their annotations."""
    folder = tmp_path_factory.mktemp("cohort")
    for slide_id in ("S01", "S02"):
        write_slide(SyntheticConfig(width=1792, height=1792), slide_id, folder)
    return folder
