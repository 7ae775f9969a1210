"""Stage `sample`: pairs and standalone tiles of the whole cohort under the class caps, as one `sample/{slide}.parquet` each.

The files are small and deterministic: a slide whose selection does not change gets the same bytes again, and stage `shard`
leaves its pixels alone.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mad.config import Config
from mad.files import MadError, read_parquet, write_parquet
from mad.progress import log, track
from mad.slides.sheet import cohort_rows
from mad.tiles.pyramid import Ladder
from mad.tiles.sampling import candidates, expand, tile_splits, under_caps

NEEDED = ["tile_id", "parent_id", "i", "j", "label", "status"]


def run(config: Config) -> None:
    """Select the tiles of every slide of the cohort."""
    ladder = Ladder(tuple(config.tile.magnifications))
    rows = cohort_rows(config)
    options = config.sample
    caps = {**options.max_pairs, **options.max_standalone}
    kinds = [ladder.name(n) for n in range(len(ladder))] + [ladder.transition(n) for n in range(len(ladder) - 1)]
    if unknown := sorted(set(caps) - set(kinds)):
        raise MadError(
            f"sample.max_pairs / max_standalone name {unknown}; the ladder {ladder.magnifications} has {kinds}"
        )
    found = []
    for row in track(rows, "sample", unit="slides"):
        table = _table(config, row.slide_id, row.split)
        found.append(
            candidates(
                table,
                ladder,
                seed=config.seed,
                background=config.label.background,
                background_pairs=options.background_pairs,
            ).assign(slide_id=row.slide_id)
        )
    selected = under_caps(pd.concat(found, ignore_index=True), caps, options.max_unlabelled, options.test_share)
    for row in rows:
        table = _table(config, row.slide_id, row.split)
        part = expand(selected[selected["slide_id"] == row.slide_id], table, ladder)
        write_parquet(Path(config.results) / "sample" / f"{row.slide_id}.parquet", part)
    counts = selected.groupby(["split", "kind"]).size()
    log("sample: " + ", ".join(f"{split} {kind} {n}" for (split, kind), n in counts.items()))


def _table(config: Config, slide_id: str, split: str | None) -> pd.DataFrame:
    """The columns of a slide's tile table that selection needs, and each tile's split."""
    table = read_parquet(Path(config.results) / "tile" / f"{slide_id}.parquet", columns=NEEDED)
    return table.assign(split=tile_splits(table, config.cohort, split))
