"""Slides of every format, written small: OME-TIFF, Aperio SVS with all that lies in it, JPEG 2000, DICOM."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from conftest import coordinate_pixels
from PIL import Image

WIDTH, HEIGHT = 1504, 1104
LEVELS = [coordinate_pixels(WIDTH // d, HEIGHT // d, n) for n, d in enumerate((1, 4, 16))]
SMOOTH = np.stack([np.mgrid[:600, :800][1] / 4, np.mgrid[:600, :800][0] / 4, np.full((600, 800), 90)], -1).astype(
    np.uint8
)
MICRON = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}
APERIO = "Aperio Image Library v11.2.1\n1504x1104 [0,0 1504x1104] (256x256) |AppMag = 40|MPP = 0.2520"


def write_ome(path: Path, levels: list[np.ndarray], axes: str = "YXS", **options: object) -> None:
    """An OME-TIFF whose smaller levels are SubIFDs of the first, as QuPath and Bio-Formats write it."""
    options = {"photometric": "rgb", "tile": (128, 128), "compression": "deflate", **options}
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as file:
        file.write(levels[0], subifds=len(levels) - 1, metadata={"axes": axes, **MICRON}, **options)
        for pixels in levels[1:]:
            file.write(pixels, subfiletype=1, **options)


def write_aperio(path: Path, description: str = APERIO, **options: object) -> None:
    """An Aperio SVS: level 0, thumbnail (in strips, of the slide's own shape), levels 1 and 2, label, macro picture."""
    options = {"photometric": "rgb", "compression": "deflate", "metadata": None, **options}
    extra = {"photometric": "rgb", "metadata": None, "compression": "lzw", "rowsperstrip": 16}
    with tifffile.TiffWriter(path) as file:
        file.write(LEVELS[0], tile=(256, 256), description=description, **options)
        file.write(np.full((HEIGHT // 2, WIDTH // 2, 3), 7, np.uint8), description=APERIO, **extra)
        for pixels in LEVELS[1:]:
            file.write(pixels, tile=(256, 256), description=description, **options)
        file.write(
            np.full((HEIGHT // 8, WIDTH // 8, 3), 8, np.uint8), subfiletype=1, description="Aperio\nlabel 1x1", **extra
        )
        file.write(
            np.full((HEIGHT // 6, WIDTH // 6, 3), 9, np.uint8), subfiletype=9, description="Aperio\nmacro 1x1", **extra
        )


def write_jpeg_2000(path: Path, compression: int) -> None:
    pixels = SMOOTH
    if compression == 33003:
        pixels = np.asarray(Image.fromarray(SMOOTH).convert("YCbCr"))
    options = {"reversible": True, "mct": False, "codecformat": "j2k"}

    def tiles():  # type: ignore[no-untyped-def]
        for y in range(0, 600, 256):
            for x in range(0, 800, 256):
                tile = np.zeros((256, 256, 3), np.uint8)
                part = pixels[y : y + 256, x : x + 256]
                tile[: part.shape[0], : part.shape[1]] = part
                yield imagecodecs.jpeg2k_encode(tile, **options)

    with tifffile.TiffWriter(path) as file:
        file.write(
            tiles(), shape=SMOOTH.shape, dtype=np.uint8, tile=(256, 256), photometric="rgb", compression=compression,
            description=APERIO.replace("1504x1104", "800x600"), metadata=None,
        )  # fmt: skip


def write_dicom(folder: Path, levels: list[np.ndarray], syntax: str, icc: bytes | None = None) -> list[Path]:
    """A DICOM WSI series: one file per level, tiles of 256 px (PS3.3 C.8.12, TILED_FULL)."""
    pydicom = pytest.importorskip("pydicom", reason="writes the DICOM slides that are read here")
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.sequence import Sequence
    from pydicom.uid import generate_uid

    wsm = "1.2.840.10008.5.1.4.1.1.77.1.6"
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    paths = []
    for number, pixels in enumerate(levels):
        height, width = pixels.shape[:2]
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = wsm, generate_uid()
        meta.TransferSyntaxUID, meta.ImplementationClassUID = syntax, generate_uid()
        data = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
        data.SOPClassUID, data.SOPInstanceUID = wsm, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = series, study, frame
        data.Modality, data.PatientID, data.PatientName = "SM", "P1", "P^1"
        data.ImageType = ["DERIVED" if number else "ORIGINAL", "PRIMARY", "VOLUME", "RESAMPLED" if number else "NONE"]
        data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows, data.TotalPixelMatrixFocalPlanes = width, height, 1
        data.Rows = data.Columns = 256
        data.SamplesPerPixel, data.PlanarConfiguration = 3, 0
        data.BitsAllocated = data.BitsStored = 8
        data.HighBit, data.PixelRepresentation = 7, 0
        jpeg = syntax.endswith("4.50")
        data.PhotometricInterpretation = "YBR_FULL_422" if jpeg else "RGB"
        data.LossyImageCompression, data.LossyImageCompressionMethod = "01", "ISO_10918_1" if jpeg else "ISO_15444_1"
        data.DimensionOrganizationType, data.NumberOfOpticalPaths = "TILED_FULL", 1
        data.ImagedVolumeWidth, data.ImagedVolumeHeight = levels[0].shape[1] * 25e-5, levels[0].shape[0] * 25e-5
        spacing, groups = Dataset(), Dataset()
        spacing.PixelSpacing = [25e-5 * levels[0].shape[0] / height, 25e-5 * levels[0].shape[1] / width]
        groups.PixelMeasuresSequence = Sequence([spacing])
        data.SharedFunctionalGroupsSequence = Sequence([groups])
        optical = Dataset()
        optical.OpticalPathIdentifier = "1"
        if icc:
            optical.ICCProfile = icc
        data.OpticalPathSequence = Sequence([optical])
        padded = np.pad(pixels, ((0, -height % 256), (0, -width % 256), (0, 0)), mode="edge")
        tiles = [padded[y : y + 256, x : x + 256] for y in range(0, height, 256) for x in range(0, width, 256)]
        data.NumberOfFrames = len(tiles)
        if jpeg:
            frames = [
                imagecodecs.jpeg8_encode(np.ascontiguousarray(tile), level=95, subsampling="422") for tile in tiles
            ]
        else:
            frames = [imagecodecs.jpeg2k_encode(tile, reversible=True, mct=False, codecformat="j2k") for tile in tiles]
        data.PixelData = encapsulate(frames)
        data["PixelData"].is_undefined_length = True
        paths.append(folder / f"{number}.dcm")
        pydicom.dcmwrite(paths[-1], data, enforce_file_format=True)
    return paths


def damage(path: Path, tiles: list[int]) -> Path:
    """Wipe stored tiles of level 0, numbered row by row."""
    with tifffile.TiffFile(path) as file:
        places = [(file.pages[0].dataoffsets[n], file.pages[0].databytecounts[n]) for n in tiles]
    with path.open("r+b") as file:
        for offset, size in places:
            file.seek(offset)
            file.write(bytes(size))
    return path
