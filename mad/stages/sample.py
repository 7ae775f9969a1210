"""Stage `sample`: pairs and standalone tiles of the whole cohort under the class caps, as one `sample/{slide}.parquet` each.

The files are small and deterministic: a slide whose selection does not change gets the same bytes again, and stage `shard`
leaves its pixels alone. Slides are read and written one by one, in several processes; between the two passes only row
numbers and ranks are kept, some 20 bytes per sample that may still be selected.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mad.config import Config
from mad.files import read_parquet, write_parquet
from mad.progress import log, track
from mad.slides.sheet import SlideRow, cohort_rows
from mad.tiles.pyramid import Ladder
from mad.tiles.sampling import Caps, Limits, candidates, expand, tile_splits

NEEDED = ["tile_id", "parent_id", "i", "j", "k", "m", "label", "status"]
SLIDES_PER_PROCESS = 30  # about what one selects in the time that another process takes to start


def run(config: Config) -> None:
    """Select the tiles of every slide of the cohort, in as many processes as OMP_NUM_THREADS (or the machine) grants."""
    rows = cohort_rows(config)
    limits = Limits(_caps(config))
    counts: Counter[tuple[str, str]] = Counter()
    with _mapping(len(rows)) as each:
        parts = track(each(partial(_candidates, config), rows), "sample: rank", total=len(rows), unit="slides")
        found = [limits.add(part) for part in parts]
        chosen = ((row, limits.select(part)) for row, part in zip(rows, found, strict=True))
        for count in track(each(partial(_write, config), chosen), "sample: write", total=len(rows), unit="slides"):
            counts.update(count)
    log("sample: " + ", ".join(f"{split} {kind} {n}" for (split, kind), n in sorted(counts.items())))


@contextmanager
def _mapping(num_slides: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map`, over processes where the cohort is large enough for them to pay."""
    granted = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    processes = min(granted, num_slides // SLIDES_PER_PROCESS)
    if processes < 2:
        yield map
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def _candidates(config: Config, row: SlideRow) -> pd.DataFrame:
    """What may be selected from one slide."""
    table = _table(config, row, NEEDED)
    return candidates(
        table.assign(split=tile_splits(table, config.cohort, row.split)),
        _ladder(config),
        seed=config.seed,
        background=config.label.background,
        background_pairs=config.sample.background_pairs,
    )


def _write(config: Config, chosen: tuple[SlideRow, pd.DataFrame]) -> Counter[tuple[str, str]]:
    """Write one slide's selection; returns its samples per split and kind."""
    row, selected = chosen
    tile_ids = _table(config, row, ["tile_id"])["tile_id"]
    table = expand(selected, tile_ids, _ladder(config))
    write_parquet(Path(config.results) / "sample" / f"{row.slide_id}.parquet", table)
    return Counter(zip(selected["split"], selected["kind"], strict=True))


def _table(config: Config, row: SlideRow, columns: list[str]) -> pd.DataFrame:
    return read_parquet(Path(config.results) / "tile" / f"{row.slide_id}.parquet", columns=columns)


def _ladder(config: Config) -> Ladder:
    return Ladder(tuple(config.tile.magnifications))


def _caps(config: Config) -> Caps:
    options = config.sample
    caps = {kind: cap for kind, cap in (options.max_pairs | options.max_standalone).items() if cap is not None}
    return Caps(caps, options.max_unlabelled, options.test_share)
