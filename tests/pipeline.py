"""The stages up to the shards on the two small slides of the `slides` fixture."""

from pathlib import Path

from mad.config import Config, parse_config
from mad.slides.sheet import cohort_rows, write_sheet
from mad.stages import cohort, sample, shard, tile


def configure(folder: Path, slides: Path, **more: object) -> Config:
    """A cohort of the two slides, S01 for training and S02 for the test."""
    records = [
        {"slide_id": name, "path": str(slides / f"{name}.tiff"), "patient_id": name, "split": split, "grade": "1"}
        | {"annotation": str(slides / f"{name}.geojson")}
        for name, split in (("S01", "train"), ("S02", "test"))
    ]
    write_sheet(folder / "slides.tsv", records)
    return parse_config(
        {
            "results": str(folder / "results"),
            "cohort": {"sheet": str(folder / "slides.tsv")},
            "tile": {"tile_px": 112},
            "sample": {"max_standalone": {"10x": 3, "40x": 5}},
            **more,
        }
    )


def run_all(config: Config) -> Path:
    cohort.run(config)
    for row in cohort_rows(config):
        tile.run(config, row)
    sample.run(config)
    for row in cohort_rows(config):
        shard.run(config, row)
    shard.run_cohort(config)
    return Path(config.results)
