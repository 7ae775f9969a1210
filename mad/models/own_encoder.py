"""An encoder that a user brings as a function of a module of their own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mad.config.encoders import EncoderConfig
from mad.files import MadError


class OwnEncoder:
    """A user's encoder: `python:MODULE:FACTORY`, where FACTORY(tile_px) gives a function from tiles to embeddings.

    The function's own attribute `audit`, a dictionary, is written with the embeddings where it has one; it says nothing of `spec`,
    `dim` and `status`. What FACTORY raises is let through.
    """

    def __init__(self, target: str, entry: EncoderConfig, tile_px: int) -> None:
        module, _, factory = target.partition(":")
        key = f"encoders: {entry.name!r} ({entry.spec})"
        sys.path.insert(0, str(Path.cwd()))  # a file beside the configuration is a module
        try:
            try:
                make = getattr(importlib.import_module(module), factory)
            except (ImportError, AttributeError, ValueError) as error:
                raise MadError(
                    f"{key}: cannot be imported: {error}; name a module on the Python path and a function in it"
                ) from error
            self._embed = make(tile_px)
        finally:
            sys.path.pop(0)
        self._key = key
        dim = self(np.zeros((1, tile_px, tile_px, 3), np.uint8)).shape[1]
        self.audit: dict[str, Any] = {**getattr(self._embed, "audit", {}), "spec": entry.spec, "dim": dim}
        self.audit.pop("status", None)  # that of an absent encoder

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        vectors = np.asarray(self._embed(tiles), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(tiles):
            raise MadError(
                f"{self._key}: gave {vectors.shape} for {len(tiles)} tiles; it has to return one vector per tile"
            )
        return vectors
