"""Stage `qc`: the cohort's quality control as `report/qc.json` and `report/qc.html`, before anything is trained.

Reads cohort/, tile/*.json, tile/*.parquet and shard/*.parquet, slide by slide; opens no slide.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad.config import Config
from mad.files import MadError, atomic_path, read_json, read_parquet, write_json
from mad.progress import log, track
from mad.reporting.quality import SHARD_COLUMNS, TILE_COLUMNS, Facts, cohort_quality, exit_line, slide_facts

if TYPE_CHECKING:
    import pandas as pd


def run(config: Config) -> None:
    """Write the page and its numbers. Slides that were not tiled or cut yet are listed as such.

    Raises:
        MadError: there is no cohort table.
    """
    from mad.reporting.qc_page import qc_page

    results = Path(config.results)
    path = results / "cohort" / "slides.parquet"
    if not path.exists():
        raise MadError(f"{path}: no such file; run `mad cohort` first")
    rows = read_parquet(path).to_dict("records")
    facts = [
        _facts(results, {str(key): value for key, value in row.items()}) for row in track(rows, "qc", unit="slides")
    ]
    quality = cohort_quality(facts, config.label.background if config.label.glass_is_background else None)
    page = results / "report" / "qc.html"
    line = exit_line(quality, str(page))
    with atomic_path(page) as temporary:
        temporary.write_text(qc_page(quality), encoding="utf-8")
    write_json(results / "report" / "qc.json", quality | {"line": line})
    log(f"qc: {line}")


def _facts(results: Path, row: dict[str, object]) -> Facts:
    return slide_facts(row, *read_slide(results, str(row["slide_id"]), SHARD_COLUMNS))


def read_slide(
    results: Path, slide: str, columns: list[str]
) -> tuple[dict[str, Any] | None, pd.DataFrame | None, pd.DataFrame | None]:
    """What the tile job told of a slide, TILE_COLUMNS of its tile table and `columns` of its shard table; None of what is not
    made yet."""
    told = results / "tile" / f"{slide}.json"
    tiles = _table(results / "tile" / f"{slide}.parquet", TILE_COLUMNS)
    shard = _table(results / "shard" / f"{slide}.parquet", columns)
    return read_json(told) if told.exists() else None, tiles, shard


def _table(path: Path, columns: list[str]) -> pd.DataFrame | None:
    return read_parquet(path, columns) if path.exists() else None
