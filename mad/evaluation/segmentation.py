"""Figure 4 of the MAD paper: maps of one slide at 10x and 40x, painted tile by tile by the 10x-trained probe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.data import class_counts, plain
from mad.metrics.confusion import accuracy, class_dice, class_iou, confusion_matrix, macro
from mad.metrics.maps import boundary_f, cell_numbers, fragments, pixel_confusion
from mad.slides.shown import mapped_slides

if TYPE_CHECKING:
    from mad.evaluation.probe import Probe

RULES = {
    "probe": "the paper's probe, trained on coarse training tiles alone, its first run",
    "choice": "the paper names the probe of its classification for segmentation, and shows the maps as evidence of transfer; "
    "ours is the probe of the transfer, so that the fine map is of unseen magnification",
    "tiles": "painted: every tile of the slide's grid but those cut by its border, blank ones too; scored: those of the test "
    "split that have a label; no score where there are none",
    "scores": "macro over the classes that the slide's labels hold",
    "pixel": "every annotated pixel of the test split gets its tile's prediction: mean IoU and Dice of the annotated areas, tiles "
    "without a majority label included",
    "boundary_f": "F-score of the borders between tiles of two classes, within one tile (Csurka et al. 2013), on scored tiles",
    "fragments": "connected regions of one class, predicted and true, on scored tiles",
}
SHARE = "share_"


def segmentation_slides(slides: pd.DataFrame, config: EvaluationConfig) -> list[str]:
    """Slides of Figure 4 (`mapped_slides`).

    Args:
        slides: cohort table (slide_id, split, annotation).
        config: the evaluation section.
    """
    table = slides[["slide_id", "annotation", "split"]].astype(object)
    return mapped_slides(table.where(table.notna(), None).itertuples(index=False), config)  # type: ignore[arg-type]


def paint(
    probe: Probe,
    dense: Iterable[tuple[str, pd.DataFrame, NDArray]],
    classes: list[str],
    *,
    device: Any = "cpu",
) -> pd.DataFrame:
    """Predict every tile of some slides.

    Args:
        probe: whose first run predicts.
        dense: slide id, its tile table (tile_id magnification x y side label split, and share_{class}; row for row with the
            features), and features [n, d].
        classes: class names in order.
        device: of the probe.

    Returns:
        Table slide_id tile_id magnification x y side label split share_{class} predicted, class names in `label` and `predicted`.
    """
    shares = [SHARE + name for name in classes]
    kept = ["tile_id", "magnification", "x", "y", "side", "label", "split", *shares]
    parts = []
    for slide_id, tiles, features in dense:
        predicted = probe.predict(features, device=device)[0]
        table = tiles[kept].assign(predicted=np.array(classes, object)[predicted])
        table.insert(0, "slide_id", slide_id)
        parts.append(table)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["slide_id", *kept, "predicted"])


def map_scores(painted: pd.DataFrame, classes: list[str]) -> list[dict[str, Any]]:
    """Scores of every slide and magnification of `paint`'s table, over its test tiles alone.

    By tile (`mean_iou`, `mean_dice`, `accuracy`), by pixel (`pixel`), and of the map's shape (`boundary_f`, `fragments`); see
    `RULES`. A score without tiles is None.
    """
    code = {name: number for number, name in enumerate(classes)}
    rows = []
    for (slide_id, magnification), tiles in painted.groupby(["slide_id", "magnification"], sort=True):
        test = tiles[tiles["split"] == "test"]
        known = test[test["label"].notna()]
        truth = known["label"].map(code).to_numpy(np.int64)
        predicted = known["predicted"].map(code).to_numpy(np.int64)
        shares = test[[SHARE + name for name in classes]].to_numpy(np.float64)
        pixels = pixel_confusion(shares, test["predicted"].map(code).to_numpy(np.int64), len(classes))
        maps = [_grid(known, codes) for codes in (truth, predicted)] if len(known) else []
        rows.append(
            {
                "slide_id": slide_id,
                "magnification": float(magnification),
                "tiles": len(tiles),
                "scored": len(known),
                "counts": class_counts(truth, classes),
                **_scores(confusion_matrix(truth, predicted, len(classes))),
                "pixel": _scores(pixels),
                "boundary_f": boundary_f(maps[0], maps[1]) if maps else None,
                "fragments": {"true": fragments(maps[0]), "predicted": fragments(maps[1])} if maps else None,
            }
        )
    return rows


def _scores(matrix: NDArray) -> dict[str, float | None]:
    macros = {
        "mean_iou": macro(class_iou(matrix)),
        "mean_dice": macro(class_dice(matrix)),
        "accuracy": accuracy(matrix),
    }
    return {name: plain(float(value)) for name, value in macros.items()}


def _grid(tiles: pd.DataFrame, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Class codes [n] of tiles of one magnification as a raster of one cell per tile, -1 where there is none."""
    side = float(tiles["side"].median())
    cells = np.stack([cell_numbers(tiles[axis].to_numpy(), side) for axis in ("y", "x")], axis=1)
    raster = np.full(cells.max(axis=0) + 1, -1)
    raster[tuple(cells.T)] = codes
    return raster
