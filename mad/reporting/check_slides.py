"""Checks of what reads slides and writes tiles: OpenSlide, tifffile, libvips, the codecs and HDF5."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from packaging.version import Version

from mad.reporting.check import REINSTALL, Check

SIDE = 32  # of the test image
TILE = 16  # of its TIFF, the smallest that the format takes


def check_openslide() -> Check:
    """OpenSlide 4.0.1 or later: 4.0.0 corrupts the bottom partial tile row of some TIFFs."""
    import openslide

    found = openslide.__library_version__
    if Version(found) < Version("4.0.1"):
        mend = "pip install 'openslide-bin>=4.0.1', and no older system library before it on the path"
        return Check("openslide", "FAIL", f"library {found} corrupts the bottom tile row of some TIFFs", mend)
    return Check("openslide", "PASS", f"library {found}, openslide-python {openslide.__version__}")


def check_readers() -> Check:
    """A small tiled TIFF is read alike by OpenSlide, tifffile and libvips, from a file and from memory."""
    import openslide
    import pyvips
    import tifffile

    image = smooth_image()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tiff"
        tifffile.imwrite(path, image, tile=(TILE, TILE), photometric="rgb", compression="deflate", metadata=None)

        def by_openslide() -> np.ndarray:
            with openslide.OpenSlide(path) as slide:
                return np.asarray(slide.read_region((0, 0), 0, (SIDE, SIDE)).convert("RGB"))

        readers = {
            "OpenSlide": by_openslide,
            "tifffile": lambda: tifffile.imread(path),
            "libvips": lambda: pyvips.Image.new_from_buffer(path.read_bytes(), "").numpy(),
        }
        return _round_trips("readers", readers, image, lossy=())


def check_codecs() -> Check:
    """A small image goes through each codec that slides and shards are stored with, and comes back."""
    import imagecodecs as codecs
    import simplejpeg

    image = smooth_image()
    raw = image.tobytes()
    trips: dict[str, Callable[[], np.ndarray]] = {
        "JPEG": lambda: simplejpeg.decode_jpeg(codecs.jpeg8_encode(image, level=100, subsampling="444")),
        "JPEG of TIFFs": lambda: codecs.jpeg8_decode(
            simplejpeg.encode_jpeg(image, quality=100, colorsubsampling="444")
        ),
        "JPEG 2000": lambda: codecs.jpeg2k_decode(codecs.jpeg2k_encode(image, reversible=True, level=0)),
        "PNG": lambda: codecs.png_decode(codecs.png_encode(image)),
        "WebP": lambda: codecs.webp_decode(codecs.webp_encode(image, lossless=True)),
        "deflate": lambda: _pixels(codecs.zlib_decode(codecs.zlib_encode(raw))),
        "LZW": lambda: _pixels(codecs.lzw_decode(codecs.lzw_encode(raw))),
        "zstd": lambda: _pixels(codecs.zstd_decode(codecs.zstd_encode(raw))),
    }
    return _round_trips("codecs", trips, image, lossy=("JPEG", "JPEG of TIFFs"))


def check_h5py() -> Check:
    """HDF5, which `mad export` writes: a data set with an attribute goes through a file in memory."""
    import io

    import h5py

    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        file.create_dataset("coords", data=[[1, 2]]).attrs["patch_size"] = 224
    with h5py.File(memory, "r") as file:
        if file["coords"][:].tolist() != [[1, 2]] or file["coords"].attrs["patch_size"] != 224:
            return Check("h5py", "FAIL", f"{h5py.__version__}: what was written does not come back", REINSTALL)
    return Check("h5py", "PASS", f"{h5py.__version__}, HDF5 {h5py.version.hdf5_version}")


def smooth_image() -> np.ndarray:
    """uint8 [32, 32, 3], which a lossy codec keeps nearly."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.stack([x * 4, y * 4, x + y], axis=-1).astype(np.uint8)


def _round_trips(
    check: str, trips: Mapping[str, Callable[[], np.ndarray]], image: np.ndarray, lossy: tuple[str, ...]
) -> Check:
    """Whether each of `trips` gives `image` back."""
    faults = []
    for name, trip in trips.items():
        try:
            error = np.abs(trip().astype(int) - image).max()
        except Exception as fault:  # each library has errors of its own
            faults.append(f"{name}: {type(fault).__name__}: {fault}")
            continue
        if error > (4 if name in lossy else 0):
            faults.append(f"{name}: pixels come back changed by up to {error}")
    if faults:
        return Check(check, "FAIL", "; ".join(faults), REINSTALL)
    return Check(check, "PASS", f"{', '.join(trips)} give the pixels back")


def _pixels(data: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(SIDE, SIDE, 3)
