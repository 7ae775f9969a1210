"""Figure 4 within stage `evaluate`: maps of test slides by the paper's probe, painted and scored from dense embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad.config import Config
from mad.files import MadError, read_parquet, write_parquet

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from mad.evaluation.probe import Probe


def cohort_slides(config: Config) -> pd.DataFrame:
    """The cohort's slides.

    Raises:
        MadError: stage `cohort` has not run.
    """
    path = Path(config.results) / "cohort" / "slides.parquet"
    if not path.exists():
        raise MadError(f"{path}: no such file; run `mad cohort` first")
    return read_parquet(path)


def segmentation_report(
    config: Config, encoder: str, probes: list[Probe], painted_path: Path, device: Any
) -> dict[str, Any]:
    """Paint the slides of Figure 4 and score the maps; writes an empty table where there are none."""
    from mad.evaluation.data import NotApplicableError
    from mad.evaluation.segmentation import RULES, map_scores, paint, segmentation_slides

    classes = list(config.label.classes)
    slides = cohort_slides(config)
    wanted = segmentation_slides(slides, config.evaluate)
    folder = Path(config.results) / "embed" / encoder / "dense"
    present = [slide for slide in wanted if (folder / f"{slide}.npy").exists()] if probes else []
    painted = paint(probes[0], _dense(config, folder, slides, present), classes, device=device) if present else None
    write_parquet(painted_path, paint_nothing(classes) if painted is None else painted)
    if painted is None:
        raise NotApplicableError(
            "no probe: Table 5 is not applicable"
            if not probes
            else f"no dense embeddings of {wanted or 'any slide'} under {folder}"
        )
    return {
        "rules": RULES,
        "classes": classes,
        "slides": present,
        "without_embeddings": [slide for slide in wanted if slide not in present],
        "magnifications": config.evaluate.segmentation_magnifications,
        "maps": map_scores(painted, classes),
    }


def _dense(
    config: Config, folder: Path, slides: pd.DataFrame, wanted: list[str]
) -> Iterator[tuple[str, pd.DataFrame, NDArray]]:
    import numpy as np
    import pandas as pd

    from mad.tiles.sampling import tile_splits

    columns = ["tile_id", "parent_id", "i", "j", "status", "magnification", "x", "y", "side", "label"]
    columns += [f"share_{name}" for name in config.label.classes]
    split_of = slides.set_index("slide_id")["split"]
    for slide in wanted:
        rows = read_parquet(folder / f"{slide}.parquet", ["tile_id"])
        tiles = read_parquet(Path(config.results) / "tile" / f"{slide}.parquet", columns)
        split = None if pd.isna(split_of[slide]) else str(split_of[slide])
        tiles = tiles.assign(split=tile_splits(tiles, config.cohort, split))
        joined = rows.merge(tiles, on="tile_id", how="left", validate="one_to_one")
        shown = joined["magnification"].isin(
            config.evaluate.segmentation_magnifications
        )  # an encoder of regions has more
        features = np.load(folder / f"{slide}.npy", mmap_mode="r", allow_pickle=False)
        yield slide, joined[shown].reset_index(drop=True), features[shown]


def paint_nothing(classes: list[str]) -> pd.DataFrame:
    """The table of Figure 4 without a slide."""
    from mad.evaluation.segmentation import paint

    return paint(None, [], classes)  # type: ignore[arg-type]
