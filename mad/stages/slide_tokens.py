"""What a slide-level head reads of a slide: the tokens of an encoder or of a mixer, all of them or a share of the tiles.

With a share, that part of the slide's finest tiles stays and the coarser ones all do: a smaller share is a part of a larger
one, and which tiles stay depends on their ids alone. A mixer mixes what is left anew: a tile that is dropped need not have been
encoded.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mad.config import Config
from mad.config.biomarkers import AggregatorConfig
from mad.evaluation.bags import Bag
from mad.files import MadError, read_json, read_parquet
from mad.tiles.embeddings import encoder_digest, map_array, read_audit, read_embeddings

if TYPE_CHECKING:
    from mad.training.region_data import SlideRegions

Read = tuple[NDArray[np.float32], pd.DataFrame, "SlideRegions | None"]
"""Vectors, the table of the tokens, and for a mixer that learns what it mixes."""
TOKEN = ["region", "token", "tile_id"]  # columns that name a mixer's token


class SlideTokens:
    """The tokens of one entry of `biomarkers.aggregators`."""

    def __init__(self, config: Config, entry: AggregatorConfig, device: str = "cpu") -> None:
        self.config, self.entry, self.device = config, entry, device
        self.results = Path(config.results)
        mixer = config.mixer(entry.mixer) if entry.mixer else None
        self.mixer_config = mixer
        self.magnifications = sorted((mixer and mixer.magnifications) or map(float, config.tile.magnifications))
        self.kinds = [*(f"{magnification:g}x" for magnification in self.magnifications), "region"]
        self._mixer: Any = None
        self._last: tuple[str, Any] = ("", None)  # a slide is asked for at every share in turn: its files are read once

    def source(self) -> dict[str, Any]:
        """What made the embeddings: audit of the encoder or summary of the mixer; `"status": "absent"` where it could not be had.

        Raises:
            MadError: it has not been made, or its embeddings, which are mixed anew, are another encoder's by now.
        """
        if self.entry.encoder is not None:
            return read_audit(self.results / "embed" / self.entry.encoder)
        path = self.results / "mix" / str(self.entry.mixer) / "summary.json"
        if not path.exists():
            raise MadError(f"{path}: no such file; run `mad mix {self.entry.mixer}` first")
        found: dict[str, Any] = read_json(path)
        anew = self.entry.finetune is not None or min(self.config.biomarkers.tile_shares) < 1
        if anew and (known := found.get("encoder_sha256")):
            embedded = read_audit(self.results / "embed" / found["encoder"])
            if encoder_digest(embedded) != known:
                raise MadError(
                    f"mix/{self.entry.mixer}: made of embeddings by other weights or arguments than those in "
                    f"embed/{found['encoder']} now; run `mad mix {self.entry.mixer}` again"
                )
        return found

    def read(self, slide_id: str, share: float = 1.0) -> Bag:
        """The bag of a slide; it may be empty.

        Raises:
            MadError: the slide was not embedded, or not mixed.
        """
        store, table, regions = self._plain(slide_id, share) if self.entry.encoder else self._mixed(slide_id, share)
        region = table["token"].to_numpy() == "region"
        magnification = table["magnification"].to_numpy(np.float64)
        wanted = {
            "finest": magnification == self.magnifications[-1],
            "coarsest": magnification == self.magnifications[0],
            "all": np.isin(magnification, self.magnifications),
            "region": region,
        }[self.entry.tokens]
        rows = np.flatnonzero(wanted)
        level = np.searchsorted(self.magnifications, np.where(region, self.magnifications[0], magnification))
        names = np.where(region, table["region"].to_numpy(object), table["tile_id"].to_numpy(object))
        return Bag(
            slide_id=slide_id,
            store=store,
            rows=table["row"].to_numpy(np.int64)[rows],
            kind=np.where(region, len(self.magnifications), level)[rows].astype(np.int64),
            names=names[rows],
            tiles=int((~region).sum()) if self.entry.mixer else len(rows),
            regions=None if regions is None else regions.bare(),
        )

    def _plain(self, slide_id: str, share: float) -> Read:
        """An encoder's dense embeddings, tiles with tissue alone."""
        if slide_id != self._last[0]:
            ids, store = read_embeddings(self.results / "embed" / str(self.entry.encoder) / "dense", slide_id)
            tiles = read_parquet(self.results / "tile" / f"{slide_id}.parquet", ["tile_id", "magnification", "status"])
            table = ids.reset_index(names="row").merge(tiles[tiles["status"] == "ok"], on="tile_id")
            self._last = slide_id, (store, table.assign(token="tile", region=None))
        store, table = self._last[1]
        return store, table[self._kept(table, share)], None

    def _mixed(self, slide_id: str, share: float) -> Read:
        """A mixer's tokens: as stage `mix` wrote them, or mixed anew from a share of the tiles; where the mixer learns, each
        fold's mixes that share, and `store` is empty."""
        from mad.models.mixer import load_mixer
        from mad.stages.mix import WEIGHTS, contextual_tokens, token_table

        folder = self.results / "mix" / str(self.entry.mixer)
        learns = self.entry.finetune is not None
        if share == 1:
            for path in (folder / f"{slide_id}.npy", folder / f"{slide_id}.parquet"):
                if not path.exists():
                    raise MadError(f"{path}: no such file; run `mad mix {self.entry.mixer}` again")
            table = read_parquet(folder / f"{slide_id}.parquet")
            slide = self._regions(slide_id) if learns else None
            if slide is not None and not token_table(slide)[TOKEN].equals(table[TOKEN]):
                raise MadError(
                    f"{folder / slide_id}.npy: not of the tiles there are now; run `mad mix {self.entry.mixer}` again"
                )
            return map_array(folder / f"{slide_id}.npy"), table.reset_index(names="row"), slide
        slide = self._regions(slide_id)
        thin = thinned(slide, self._kept(slide.table, share))
        table = token_table(thin).reset_index(names="row")
        if learns:
            return np.empty((len(table), 0), np.float32), table, thin
        if self._mixer is None:
            self._mixer = load_mixer(folder / WEIGHTS).to(self.device)
        return contextual_tokens(self._mixer, thin), table, None

    def _regions(self, slide_id: str) -> SlideRegions:
        """What a mixer mixes of a slide."""
        from mad.training.region_data import read_regions

        assert self.mixer_config is not None
        if slide_id != self._last[0]:
            self._last = slide_id, read_regions(self.config, self.mixer_config, slide_id)
        found: SlideRegions = self._last[1]
        return found

    def _kept(self, table: pd.DataFrame, share: float) -> NDArray[np.bool_]:
        """Which tiles of a table stay: all but the finest ones beyond the share."""
        kept = np.ones(len(table), bool)
        finest = np.flatnonzero(table["magnification"].to_numpy(np.float64) == self.magnifications[-1])
        names = table["tile_id"].to_numpy(object)
        order = sorted(finest, key=lambda row: _rank(names[row]))
        kept[order[int(np.ceil(share * len(finest))) :]] = False
        return kept


def thinned(slide: SlideRegions, kept: NDArray[np.bool_]) -> SlideRegions:
    """The regions of a slide without some tiles; a region that loses all of them is gone."""
    region = np.repeat(np.arange(len(slide)), np.diff(slide.bounds))[kept]
    starts = np.flatnonzero(np.diff(region, prepend=-1))
    return replace(
        slide,
        table=slide.table[kept].reset_index(drop=True),
        bounds=np.append(starts, len(region)).astype(np.int64),
        **{name: getattr(slide, name)[kept] for name in ("row", "scale", "place", "where")},
    )


def _rank(tile_id: str) -> bytes:
    return hashlib.blake2b(tile_id.encode(), digest_size=8).digest()
