"""Stage `cohort`: the sheet, checked, as `cohort/slides.parquet`. Opens no slide."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pandas as pd

from mad.config import Config
from mad.files import write_parquet
from mad.progress import log
from mad.slides.sheet import cohort_rows


def run(config: Config) -> None:
    """Write `cohort/slides.parquet`: one row per slide with its patient, split and slide-level targets."""
    records = []
    for row in cohort_rows(config):
        record = asdict(row)
        targets = record.pop("targets")
        records.append({**record, **targets, "split_by": config.cohort.split_by})
    table = pd.DataFrame(records)
    text = [name for name in table.columns if name != "mpp"]
    table = table.astype({**dict.fromkeys(text, "string"), "mpp": "float64"})
    write_parquet(Path(config.results) / "cohort" / "slides.parquet", table)
    splits = table["split"].value_counts().to_dict() or "by block"
    log(f"cohort: {len(table)} slides of {table['patient_id'].nunique()} patients; {splits}")
