"""From a sample's tiles to its views: what method and controls make of a parent with its children, or of a tile alone.

Tiles are whatever a `Reader` reads: rows of an index, or encoded images that came in a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mad.config.distill import DistillConfig
from mad.config.kinds import STANDALONE
from mad.config.training import RunConfig
from mad.tiles.pyramid import parse_tile_id
from mad.training import fields, views
from mad.training.cells import cell_weights
from mad.training.features import Features
from mad.training.masking import Masking
from mad.training.pairing import step_of, steps_of
from mad.training.views import Image

Tile = TypeVar("Tile")
AnyTile = TypeVar("AnyTile", contravariant=True)


class Reader(Protocol[AnyTile]):
    """Reads tiles when they are needed: a method may show one of five."""

    def read(self, tile: AnyTile, /) -> Image:
        """Its RGB pixels [P, P, 3]."""

    def tile_id(self, tile: AnyTile, /) -> str:
        """Its id."""

    def position(self, tile: AnyTile, /) -> int:
        """Its place under its parent, row-major; -1 where it is no child."""


@dataclass(frozen=True)
class ViewMaker:
    """Makes the views of a run's samples. Standalone tiles always give multi-crop views; masks are drawn last.

    `features`: stored embeddings by row, where a frozen teacher's are read. `cells`: rows and columns of a tile's tokens, where
    children answer to the part of their parent that they lie in.
    """

    run: RunConfig
    local_px: int
    masking: Masking | None = None
    features: Features | None = None
    cells: tuple[int, int] | None = None

    def pick(self, kind: str, tiles: Sequence[Tile], rng: np.random.Generator) -> Sequence[Tile]:
        """Of a sample's tiles those that `show` takes: all of them, or with `pair_tiles: one` one of a pair's."""
        one = kind != STANDALONE and self.run.method == "dinov2" and self.run.pair_tiles == "one"
        return [_one_of(tiles, rng)] if one else tiles

    def show(
        self, reader: Reader[Tile], kind: str, tiles: Sequence[Tile], n: int, rng: np.random.Generator
    ) -> list[views.Views]:
        """Views of sample n, which shows `tiles`: a parent and its children, or one tile.

        One entry, or with `pair_tiles: all` one per tile.
        """
        shown = self._views(reader, kind, tiles, rng)
        if self.masking is None:
            return shown
        masks = np.split(self.masking.masks(n, sum(len(view.teacher) for view in shown), rng), len(shown))
        return [
            view._replace(masks=np.zeros_like(mask) if view.kind == "pair" else mask)
            for view, mask in zip(shown, masks, strict=True)
        ]

    def _views(
        self, reader: Reader[Tile], kind: str, tiles: Sequence[Tile], rng: np.random.Generator
    ) -> list[views.Views]:
        if self.run.distill is not None:
            return [self._field(self.run.distill, reader, kind, tiles, rng)]
        if kind != STANDALONE and self.run.method != "dinov2":
            return [self._pair(reader, kind, tiles, rng)]
        return [self._multicrop(reader, tile, rng) for tile in tiles]

    def _pair(self, reader: Reader[Tile], kind: str, tiles: Sequence[Tile], rng: np.random.Generator) -> views.Views:
        parent, *children = tiles
        if self.run.pairs == "same":
            parent = _one_of(tiles, rng)
            read, image = [parent], reader.read(parent)
            images = [image] * len(children)
        elif self.run.pairs == "interpolated":
            read, image = [parent], reader.read(parent)
            images = [views.enlarged_cell(image, reader.position(child), step_of(kind)) for child in children]
        else:
            read, images = [parent, *children], [reader.read(child) for child in children]
            image = reader.read(parent)
        ids = tuple(reader.tile_id(tile) for tile in read)
        cells = [] if self.cells is None else cells_of(reader, kind, tiles, self.cells)
        shown = views.pair_views(image, images, self.run.photometric, rng, ids, cells)
        return shown._replace(kind="global_pair") if self.run.method == "mad_global" else shown

    def _field(
        self, distill: DistillConfig, reader: Reader[Tile], kind: str, tiles: Sequence[Tile], rng: np.random.Generator
    ) -> views.Views:
        field, read = read_field(distill, reader, tiles, self.features)
        shown = fields.augment(field, self.run.photometric, rng)
        ids = tuple(reader.tile_id(tile) for tile in read)
        return views.Views(kind, shown.shown, [shown.student], [], ids, features=shown.features)

    def _multicrop(self, reader: Reader[Tile], tile: Tile, rng: np.random.Generator) -> views.Views:
        image, tile_id = reader.read(tile), reader.tile_id(tile)
        return views.multicrop_views(image, self.run.views, self.local_px, self.run.photometric, rng, tile_id)


def cells_of(
    reader: Reader[Tile], kind: str, tiles: Sequence[Tile], grid: tuple[int, int]
) -> list[npt.NDArray[np.float32]]:
    """`cell_weights` of each child among a sample's tiles; of another parent's (`pairs: shuffled`), where it lies in that one."""
    above, *children = (parse_tile_id(reader.tile_id(tile))[1] for tile in tiles)
    return [cell_weights(index[len(above) :], steps_of(kind), grid) for index in children]


def read_field(
    distill: DistillConfig, reader: Reader[Any], tiles: Sequence[Any], features: Features | None
) -> tuple[fields.Field, list[Any]]:
    """The field of a parent and all of its children as they are stored, and which of these tiles were read."""
    parent, *children = tiles
    seen = [parent] if distill.input == "pyramid" else []
    if distill.input == "resized" or (features is None and distill.teacher_level == "fine"):
        seen += children
    images = [reader.read(tile) for tile in seen]
    own = images.pop(0) if distill.input == "pyramid" else None
    taught = children if distill.teacher_level == "fine" else [parent]
    known = None if features is None else features.read(taught)
    return fields.make_field(distill, own, images, known), seen


def _one_of(tiles: Sequence[Tile], rng: np.random.Generator) -> Tile:
    """The parent as often as it is among the views of a pair: 2 of 2 + children."""
    parent, *children = tiles
    of_parent = rng.random() < 2 / (2 + len(children))
    return parent if of_parent else children[int(rng.integers(len(children)))]
