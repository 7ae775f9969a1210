"""Where weights on a disk are: a file, or a folder as the Hugging Face hub lays it out."""

from __future__ import annotations

from pathlib import Path

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder, the first that is there


def weights_file(path: str) -> Path:
    """The file of weights that `path` names: itself, or of a folder the first of `WEIGHT_FILES` that is there."""
    named = Path(path)
    candidates = [named / name for name in WEIGHT_FILES] if named.is_dir() else [named]
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
