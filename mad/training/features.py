"""A frozen encoder's stored embeddings, by the rows of an index: what stage `embed` wrote into `embed/{encoder}/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from mad.files import MadError, Pathlike
from mad.tiles.embeddings import check_source, read_embeddings
from mad.training.index import Index


class Features:
    """Embeddings [D] of every tile of an index, memory-mapped slide by slide; safe to use after a fork."""

    def __init__(self, folder: Pathlike, index: Index) -> None:
        """
        Args:
            folder: `embed/{encoder}/`.
            index: whose rows are asked for.

        Raises:
            MadError: a slide is not embedded whole, was embedded from another shard table, or a tile is missing.
        """
        folder = Path(folder)
        ids = index.rows["tile_id"]
        self._slide, slides = pd.factorize(index.rows["slide"])
        self._place = np.zeros(len(ids), dtype=np.int64)
        self._arrays: list[npt.NDArray[np.float32]] = []
        ends = np.bincount(self._slide).cumsum()[:-1]
        for slide, rows in zip(slides, np.split(np.argsort(self._slide, kind="stable"), ends), strict=True):
            table, array = read_embeddings(folder, str(slide))
            check_source(folder, str(slide), index.folder / f"{slide}.parquet")
            places = pd.Index(table["tile_id"]).get_indexer(ids.iloc[rows])
            if (places < 0).any():
                missing = ids.iloc[rows[places < 0][0]]
                raise MadError(f"{folder / f'{slide}.parquet'}: lacks {missing}; run `mad embed {folder.name}` again")
            self._place[rows] = places
            self._arrays.append(array)

    def read(self, rows: Sequence[int]) -> npt.NDArray[np.float32]:
        """Embeddings [n, D] of rows of the index."""
        return np.stack([self._arrays[self._slide[row]][self._place[row]] for row in rows])
