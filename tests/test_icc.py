"""ICC profiles: kept or applied, as an independent conversion of the whole image says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiff
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from slide_files import write_dicom

from mad.config.model import TileConfig
from mad.files import MadError
from mad.slides.icc import describe_profile, to_srgb
from mad.slides.readers import open_slide
from mad.tiles.aligned import open_aligned

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
HUES = np.stack([np.mgrid[:500, :600][1] % 256, np.mgrid[:500, :600][0] % 256, np.mgrid[:500, :600].sum(0) % 256], -1)
PIXELS = HUES.astype(np.uint8)


def swapped_profile() -> bytes:
    """sRGB with the tags of the red and the blue primary exchanged: its conversion exchanges the channels."""
    red, blue = SRGB.index(b"rXYZ"), SRGB.index(b"bXYZ")
    data = bytearray(SRGB)
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data)


def independent(pixels: np.ndarray, profile: bytes) -> np.ndarray:
    """The whole image converted in one call."""
    image = ImageCms.profileToProfile(
        Image.fromarray(pixels),
        ImageCms.getOpenProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    return np.asarray(image)


@pytest.mark.parametrize("compression", ["deflate", "jpeg"])
def test_apply_converts_every_read_and_keep_none(tmp_path: Path, compression: str) -> None:
    profile = swapped_profile()
    write_tiff(tmp_path / "s.tif", [PIXELS, PIXELS[::4, ::4]], 0.25, compression=compression, iccprofile=profile)
    with open_slide(tmp_path / "s.tif") as kept, open_slide(tmp_path / "s.tif", "apply") as applied:
        assert kept.icc.startswith("kept (sRGB") and applied.icc.startswith("applied to sRGB (sRGB")
        for level in (0, 1):
            width, height = kept.level_dimensions[level]
            stored = kept.read(level, 0, 0, width, height)
            wanted = independent(stored, profile)
            if compression == "deflate":
                assert (stored == (PIXELS, PIXELS[::4, ::4])[level]).all()
                assert np.abs(wanted[..., ::-1].astype(int) - stored).max() <= 2  # the profile does what it is made for
            for x, y, w, h in [(0, 0, 40, 30), (33, 70, 100, 50), (width - 30, height - 20, 60, 60)]:
                found = applied.read(level, x, y, w, h)
                assert (found[: height - y, : width - x] == wanted[y : y + h, x : x + w]).all()
                assert (found[height - y :] == 255).all() and (found[:, width - x :] == 255).all()
        overview = applied.overview(4, 125, 150)
        assert (overview == applied.read(1, 0, 0, 150, 125)).all()
        assert np.abs(overview.astype(int) - kept.overview(4, 125, 150)).max() > 50


def test_the_configuration_reaches_the_tiles(tmp_path: Path) -> None:
    profile = swapped_profile()
    write_tiff(tmp_path / "s.tif", [PIXELS], 0.25, iccprofile=profile)
    config = TileConfig(tile_px=16)
    assert config.icc == "keep"
    with open_aligned(tmp_path / "s.tif", config) as slide:
        assert (slide.tile((0, 0, 5, 5)) == PIXELS[80:96, 80:96]).all()
    with open_aligned(tmp_path / "s.tif", config.model_copy(update={"icc": "apply"})) as slide:
        assert (slide.tile((0, 0, 5, 5)) == independent(PIXELS, profile)[80:96, 80:96]).all()


def test_a_profile_of_dicom_through_openslide(tmp_path: Path) -> None:
    profile = swapped_profile()
    path = write_dicom(tmp_path, [PIXELS], "1.2.840.10008.1.2.4.90", icc=profile)[0]
    with open_slide(path) as kept, open_slide(path, "apply") as applied:
        assert kept.profile == profile and applied.icc.startswith("applied to sRGB")
        assert (kept.read(0, 0, 0, 600, 500) == PIXELS).all()
        assert (applied.read(0, 100, 100, 300, 200) == independent(PIXELS, profile)[100:300, 100:400]).all()


def test_no_profile(tmp_path: Path) -> None:
    write_tiff(tmp_path / "s.tif", [PIXELS], 0.25)
    with open_slide(tmp_path / "s.tif", "apply") as slide:
        assert slide.icc == "none" and slide.profile is None
        assert (slide.read(0, 0, 0, 600, 500) == PIXELS).all()


@pytest.mark.parametrize("compression", ["deflate", "jpeg2000"])
def test_a_broken_profile_is_an_error_where_it_is_applied(tmp_path: Path, compression: str) -> None:
    write_tiff(tmp_path / "s.tif", [PIXELS], 0.25, iccprofile=SRGB[:200], compression=compression)
    with open_slide(tmp_path / "s.tif") as slide:
        assert slide.icc == "kept (damaged profile)"
        assert slide.read(0, 0, 0, 10, 10).shape == (10, 10, 3)
    with pytest.raises(MadError, match="s.tif: its ICC profile .200 bytes. cannot be applied.*set tile.icc: keep"):
        open_slide(tmp_path / "s.tif", "apply")


def test_a_profile_of_another_colour_space_is_an_error() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with pytest.raises(MadError, match="set tile.icc: keep"):
        to_srgb(lab, "s")


@given(st.binary(max_size=300))
def test_what_is_no_profile_is_damaged(data: bytes) -> None:
    assert describe_profile(data) == "damaged profile"
    with pytest.raises(MadError, match="set tile.icc: keep"):
        to_srgb(data, "s")
