"""Where weights on a disk are: a file, or a folder as the Hugging Face hub lays it out."""

from __future__ import annotations

import os
from pathlib import Path

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder, the first that is there


def weights_file(path: str) -> Path:
    """The file of weights that `path` names: itself, or of a folder the first of `WEIGHT_FILES` that is there.

    In a folder that may not be entered none is: `Path.is_file` would make an error of it.
    """
    named = Path(path)
    candidates = [named / name for name in WEIGHT_FILES] if os.path.isdir(named) else [named]  # noqa: PTH112
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), candidates[0])  # noqa: PTH113
