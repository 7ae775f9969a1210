"""Writing one synthetic slide: a pyramidal TIFF at 40x, 10x and 2.5x, and its annotation."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from mad.config.synthetic import SyntheticConfig
from mad.files import Pathlike, atomic_path, write_json
from mad.slides.synthetic.annotate import feature_collection
from mad.slides.synthetic.layout import MPP, layout
from mad.slides.synthetic.render import render

DOWNSAMPLES = (1, 4, 16)
TILE_PX = 256


def write_slide(config: SyntheticConfig, slide_id: str, out_dir: Pathlike) -> None:
    """Write `{slide_id}.tiff` and `{slide_id}.geojson` into `out_dir`: the same bytes on every call.

    Raises:
        MadError: the cohort has no such slide.
    """
    truth = layout(config, slide_id)
    write_pyramid(Path(out_dir) / f"{slide_id}.tiff", render(config, slide_id, truth), config.quality)
    write_json(Path(out_dir) / f"{slide_id}.geojson", feature_collection(slide_id, truth))


def run(config: SyntheticConfig, slide_id: str, out_dir: Pathlike) -> None:
    """The stage: one slide of the cohort."""
    write_slide(config, slide_id, out_dir)


def write_pyramid(path: Pathlike, picture: NDArray[np.uint8], quality: int) -> None:
    """Write pixels [height, width, 3] with their exact 4 x 4 and 16 x 16 area averages as a tiled JPEG TIFF.

    Levels are plain pages, the lower ones marked as reduced: what OpenSlide (generic-tiff), libvips (`page=`) and tifffile
    all read. Chroma is not subsampled; resolution is in the tags, so the scale needs no guess.
    """
    height, width = picture.shape[:2]
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as tiff:
        for level, downsample in enumerate(DOWNSAMPLES):
            size = (width // downsample, height // downsample)
            pixels_per_cm = 1e4 / (MPP * downsample)
            tiff.write(
                picture if level == 0 else cv2.resize(picture, size, interpolation=cv2.INTER_AREA),
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",  # of the pixels handed over; they are stored as YCbCr
                compression="jpeg",
                compressionargs={"level": quality},
                subsampling=(1, 1),
                subfiletype=int(level > 0),
                resolution=(pixels_per_cm, pixels_per_cm),
                resolutionunit="CENTIMETER",
                description="synthetic neuropathology, 40x, 0.25 um/px" if level == 0 else None,
                metadata=None,
                software="mad",
                maxworkers=1,
            )
