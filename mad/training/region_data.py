"""The regions of a cohort as the mixer reads them: tile tables joined to the dense embeddings of one encoder.

Embeddings stay in their files and are read region by region, so that a cohort need not fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from mad.config import Config
from mad.config.regions import MixerConfig
from mad.files import read_json, read_parquet
from mad.models.mixer import RegionBatch, pad_regions
from mad.tiles.embeddings import read_embeddings
from mad.tiles.index import DIGITS
from mad.tiles.pyramid import Ladder
from mad.tiles.regions import region_table

CHUNK = 8192  # tiles whose embeddings are in memory at once
CONSTANT = 1e-6  # standard deviation, as a share of the mean, of a number that rounding alone moves


@dataclass(frozen=True)
class SlideRegions:
    """The tiles of one slide, region by region: `table` as `mad.tiles.regions.region_table` makes it, and its columns as arrays."""

    slide_id: str
    table: pd.DataFrame
    bounds: NDArray[np.int64]  # [R + 1]: where the tiles of each region begin
    row: NDArray[np.int64]  # [n] of each tile in `vectors`
    scale: NDArray[np.int64]  # [n]
    place: NDArray[np.int64]  # [n]
    where: NDArray[np.float64]  # [n, 3]: centre x, y and side, um
    vectors: NDArray[np.float32]  # [N, D], memory-mapped
    key: str  # digest of what the embeddings were made from

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def tiles(self, region: int) -> slice:
        """Where the tiles of one region are."""
        return slice(int(self.bounds[region]), int(self.bounds[region + 1]))

    def bare(self) -> SlideRegions:
        """Without the table, all that training reads: the ids of a cohort's tiles would fill the memory."""
        return replace(self, table=self.table.iloc[:0].copy())


Places = Sequence[tuple[SlideRegions, int]]  # regions: the slide of each, and its number there


def read_regions(config: Config, mixer: MixerConfig, slide_id: str) -> SlideRegions:
    """The regions of one slide for one mixer.

    Raises:
        MadError: the slide has no dense embeddings of the mixer's encoder.
    """
    results = Path(config.results)
    columns = ["tile_id", "slide_id", "magnification", "mpp", *DIGITS, "status"]
    tiles = read_parquet(results / "tile" / f"{slide_id}.parquet", columns)
    ladder = Ladder(tuple(map(float, config.tile.magnifications)))
    table = region_table(tiles, ladder, config.tile.tile_px, mixer.region_tiles, mixer.magnifications)
    dense = results / "embed" / mixer.encoder / "dense"
    ids, vectors = read_embeddings(dense, slide_id)
    joined = table.merge(ids.reset_index(names="row"), on="tile_id", how="inner", validate="one_to_one")
    row, scale, place = (joined[name].to_numpy(np.int64) for name in ("row", "scale", "place"))
    starts = np.flatnonzero((joined["region"] != joined["region"].shift()).fillna(True).to_numpy(bool))
    return SlideRegions(
        slide_id,
        joined.drop(columns="row"),
        np.append(starts, len(joined)).astype(np.int64),
        row,
        scale,
        place,
        joined[["x_um", "y_um", "side_um"]].to_numpy(np.float64),
        vectors,
        read_json(dense / f"{slide_id}.json")["key"],
    )


def read_batch(places: Places) -> RegionBatch:
    """Some regions as one batch; x and y count from the region's first tile, where fp32 is exact enough."""
    regions = []
    for slide, number in places:
        tiles = slide.tiles(number)
        where = slide.where[tiles] - [*slide.where[tiles.start, :2], 0]
        vectors = np.asarray(slide.vectors[slide.row[tiles]], np.float32)
        regions.append(
            (torch.from_numpy(vectors), torch.from_numpy(slide.scale[tiles].copy()), torch.from_numpy(where).float())
        )
    return pad_regions(regions)


def mean_and_std(slides: Sequence[SlideRegions], scales: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [S, D] of the embeddings per magnification, over all tiles; two passes in float64.

    A number that never changes has standard deviation 1; so has a magnification without a tile, whose mean is 0.
    """
    dim = slides[0].vectors.shape[1]
    counts = np.maximum([sum(int((slide.scale == s).sum()) for slide in slides) for s in range(scales)], 1)[:, None]
    mean, variance = np.zeros((scales, dim)), np.zeros((scales, dim))
    for scale, part in _chunks(slides, scales):
        mean[scale] += part.sum(0) / counts[scale]
    for scale, part in _chunks(slides, scales):
        variance[scale] += ((part - mean[scale]) ** 2).sum(0) / counts[scale]
    std = np.sqrt(variance)
    std[std <= CONSTANT * np.maximum(np.abs(mean), 1)] = 1
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def _chunks(slides: Sequence[SlideRegions], scales: int) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """All embeddings, a magnification of a slide and `CHUNK` tiles at a time, as (magnification, [n, D])."""
    for slide in slides:
        for scale in range(scales):
            rows = slide.row[slide.scale == scale]
            for start in range(0, len(rows), CHUNK):
                yield scale, slide.vectors[rows[start : start + CHUNK]].astype(np.float64)
