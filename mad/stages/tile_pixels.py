"""Tiles of slides as pixels, for encoders that learn from them: read straight from the slide, as stage `embed` does.

Slides whose decoded tiles fit stay in memory, the first ones first; of the others the tiles that are asked for are read each time.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from mad.config import Config
from mad.evaluation.bags import Bag
from mad.files import MadError
from mad.progress import log
from mad.slides.sheet import cohort_rows
from mad.tiles.aligned import Footprint, open_aligned
from mad.tiles.pyramid import parse_tile_id


class TilePixels:
    """Pixels of the tiles of a bag."""

    def __init__(self, config: Config, cache_gb: float) -> None:
        self._config = config
        self._rows = {row.slide_id: row for row in cohort_rows(config)}
        self._left = cache_gb * 1e9
        self._whole: dict[str, tuple[NDArray[np.object_], NDArray[np.uint8]]] = {}
        self._told = False

    def __call__(self, bag: Bag, places: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.uint8]:
        """RGB [m, P, P, 3] of some places of a bag.

        Raises:
            MadError: the slide cannot be opened, or a tile of it cannot be decoded, any more.
        """
        if bag.slide_id in self._whole:
            names, pixels = self._whole[bag.slide_id]
            if np.array_equal(names, bag.names):
                return pixels[places]
        if len(bag) * self._config.tile.tile_px**2 * 3 > self._left:
            if not self._told:
                log(
                    f"tiles: memory for decoded ones is full (finetune.cache_gb); {bag.slide_id} and others are read each time"
                )
                self._told = True
            return self.read(bag.slide_id, bag.names[places])
        pixels = self.read(bag.slide_id, bag.names)
        self._left -= pixels.nbytes
        self._whole[bag.slide_id] = bag.names, pixels
        return pixels[places]

    def read(self, slide_id: str, names: NDArray[np.object_]) -> NDArray[np.uint8]:
        """RGB [n, P, P, 3] of tiles of one slide, in the order of their ids."""
        row, side = self._rows[slide_id], self._config.tile.tile_px
        parsed = [parse_tile_id(name)[1] for name in names]
        pixels = np.empty((len(names), side, side, 3), np.uint8)
        order = sorted(range(len(names)), key=lambda n: (parsed[n][:2], len(parsed[n]), parsed[n]))
        with open_aligned(row.path, self._config.tile, row.mpp) as slide:
            for (i, j), tiles in groupby(order, key=lambda n: parsed[n][:2]):
                footprint = Footprint(slide, i, j)
                for n in tiles:
                    if (found := footprint.tile(parsed[n])) is None:
                        raise MadError(
                            f"{row.path}: tile {names[n]} cannot be decoded any more; copy the slide anew and run `mad embed` again"
                        )
                    pixels[n] = found
        return pixels
