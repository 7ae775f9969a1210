"""Stage `cohort`: the sheet, checked, as `cohort/slides.parquet`. Opens no slide.

Columns that the sheet has beyond those of `SlideRow` are not in the file: another label would make everything after it anew. Stage
`biomarkers` asks `cohort_table` for them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pandas as pd

from mad.config import Config
from mad.files import write_parquet
from mad.progress import log
from mad.slides.sheet import cohort_rows


def run(config: Config) -> None:
    """Write `cohort/slides.parquet`: one row per slide with its patient and split."""
    table = cohort_table(config, targets=False)
    write_parquet(Path(config.results) / "cohort" / "slides.parquet", table)
    splits = table["split"].value_counts().to_dict() or "by block"
    log(f"cohort: {len(table)} slides of {table['patient_id'].nunique()} patients; {splits}")


def cohort_table(config: Config, *, targets: bool = True) -> pd.DataFrame:
    """One row per slide of the sheet as it is now, with its split; with or without the columns of slide-level `targets`."""
    records = []
    for row in cohort_rows(config):
        record = asdict(row)
        more = record.pop("targets")
        records.append({**record, **(more if targets else {}), "split_by": config.cohort.split_by})
    table = pd.DataFrame(records)
    text = [name for name in table.columns if name != "mpp"]
    return table.astype({**dict.fromkeys(text, "string"), "mpp": "float64"})
