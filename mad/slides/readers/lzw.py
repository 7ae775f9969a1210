"""LZW tiles by libtiff, which checks every code: imagecodecs 2026.3 reads unset memory, or crashes, on a damaged stream."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

LZW = 5  # TIFF compression
WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, OFFSET, SAMPLES, ROWS, SIZE = 256, 257, 258, 259, 262, 273, 277, 278, 279
PREDICTOR, EXTRA = 317, 338
SHORT, LONG = 3, 4
UNASSOCIATED = 2  # the alpha channel that Pillow leaves as it is


def decode_lzw(data: bytes, rows: int, columns: int, samples: int, predictor: int) -> np.ndarray:
    """8-bit samples [rows, columns, samples] of one compressed tile or strip: 1, 3 or 4 samples per pixel.

    The stream is handed over as a TIFF of one strip.

    Raises:
        OSError: the stream is damaged.
    """
    entries = {
        WIDTH: (LONG, columns),
        LENGTH: (LONG, rows),
        BITS: (SHORT, 8),
        COMPRESSION: (SHORT, LZW),
        PHOTOMETRIC: (SHORT, 1 if samples == 1 else 2),
        OFFSET: (LONG, 0),
        SAMPLES: (SHORT, samples),
        ROWS: (LONG, rows),
        SIZE: (LONG, len(data)),
        PREDICTOR: (SHORT, predictor),
    }
    if samples == 4:
        entries[EXTRA] = SHORT, UNASSOCIATED
    bits_at = 8 + 2 + 12 * len(entries) + 4
    entries[OFFSET] = LONG, bits_at + 8
    directory = struct.pack("<H", len(entries))
    for tag, (kind, value) in entries.items():
        count = samples if tag == BITS else 1
        directory += struct.pack("<HHII", tag, kind, count, bits_at if count > 2 else value)
    head = struct.pack("<2sHI", b"II", 42, 8) + directory + bytes(4) + struct.pack("<4H", 8, 8, 8, 8)
    with Image.open(io.BytesIO(head + data), formats=["TIFF"]) as image:
        return np.asarray(image).reshape(rows, columns, samples)
