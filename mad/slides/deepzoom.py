"""A slide as a Deep Zoom pyramid: small JPEG tiles from one tile for all of it down to a wanted magnification.

The slide is read in strips by the reader of the pipeline, so that what is shown is what the encoders see, and memory stays bounded;
the strips wait uncompressed in a temporary TIFF for libvips, which averages and cuts them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyvips
import tifffile

from mad.files import StorageError
from mad.slides.readers import Reader
from mad.slides.scale import plan_scale

TILE_PX, OVERLAP = 510, 1  # 512 px with its overlap on both sides
STRIP_ROWS = 512
NAME = "slide"  # of the files: slide.dzi, slide_files/{level}/{column}_{row}.jpg


@dataclass(frozen=True)
class Frame:
    """Where a picture of a slide lies: its corner and the side of its pixels in level-0 px, its size in its own pixels."""

    left: int
    top: int
    downsample: float
    width: int
    height: int


def frame_of(reader: Reader, mpp: float, magnification: float) -> Frame:
    """The scanned area at `magnification`, on the slide's own pixels where it has them there, never enlarged."""
    plan = plan_scale(
        mpp=mpp,
        level_downsamples=reader.level_downsamples,
        longer_px=max(reader.level_dimensions[0]),
        magnifications=[magnification],
        tile_px=1,
        on_missing="upsample",
    )
    downsample = max(1.0, plan.levels[0].downsample)
    left, top, width, height = reader.bounds
    return Frame(left, top, downsample, math.ceil(width / downsample), math.ceil(height / downsample))


def strips(reader: Reader, frame: Frame, rows: int = STRIP_ROWS) -> Iterator[np.ndarray]:
    """The picture from top to bottom: RGB [at most rows, frame.width, 3].

    Every strip starts at its own place on level 0, rounded once: nothing drifts. What cannot be decoded is black: whether a slide
    is too damaged is for stage `tile` to say, of all of it.
    """
    for start in range(0, frame.height, rows):
        top = round(frame.top + start * frame.downsample)
        count = min(rows, frame.height - start)
        yield reader.salvaged_overview(
            frame.downsample, count, frame.width, left=frame.left, top=top, max_lost=math.inf
        )[0]


def write_deepzoom(folder: Path, reader: Reader, frame: Frame, quality: int) -> None:
    """Write `slide.dzi` and `slide_files/` into an existing folder.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tif") as file:
            with tifffile.TiffWriter(file, bigtiff=True) as tiff:
                tiff.write(
                    strips(reader, frame), shape=(frame.height, frame.width, 3), dtype=np.uint8, photometric="rgb",
                    rowsperstrip=STRIP_ROWS, metadata=None,
                )  # fmt: skip
            image = pyvips.Image.tiffload(file.name, access="sequential")
            image.dzsave(str(folder / NAME), tile_size=TILE_PX, overlap=OVERLAP, suffix=f".jpg[Q={quality}]")
        (folder / f"{NAME}_files" / "vips-properties.xml").unlink(missing_ok=True)  # it tells the time of day
    except (OSError, pyvips.Error) as error:
        raise StorageError(
            f"{folder}: cannot be written ({str(error).strip()}); is the disk full? A picture takes some 4 bytes per pixel "
            f"while it is made, here {frame.width} x {frame.height}"
        ) from None


def last_single_tile(frame: Frame) -> int:
    """The finest level of the pyramid that is one tile alone, `slide_files/{level}/0_0.jpg`: the thumbnail."""
    finest = math.ceil(math.log2(max(frame.width, frame.height)))
    halvings = math.ceil(math.log2(max(frame.width, frame.height) / TILE_PX))
    return finest - max(0, halvings)
