"""Figure 4 of the MAD paper: maps of one slide at 10x and 40x, painted tile by tile by the 10x-trained probe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mad.config.evaluation import EvaluationConfig

if TYPE_CHECKING:
    from mad.evaluation.probe import Probe

RULES = {
    "probe": "the paper's probe, trained on coarse training tiles alone, its first run",
    "choice": "the paper names the probe of its classification for segmentation, and shows the maps as evidence of transfer; "
    "ours is the probe of the transfer, so that the fine map is of unseen magnification",
    "tiles": "painted: every tile of the slide's grid but those cut by its border, blank ones too; scored: those of the test "
    "split that have a label; no score where there are none",
    "scores": "macro over the classes that the slide's labels hold",
}


def segmentation_slides(slides: pd.DataFrame, config: EvaluationConfig) -> list[str]:
    """Slides of Figure 4: those that the configuration names, else the first annotated test slides by id.

    With `split_by: block` a slide has no split, and the first annotated ones are taken.

    Args:
        slides: cohort table (slide_id, split, annotation).
        config: the evaluation section.
    """
    if config.segmentation_slides:
        return [slide for slide in config.segmentation_slides if slide in set(slides["slide_id"])]
    chosen = slides
    if "annotation" in slides:
        chosen = chosen[chosen["annotation"].notna() & (chosen["annotation"].astype(str) != "")]
    if "split" in slides:
        chosen = chosen[chosen["split"].isna() | (chosen["split"] == "test")]
    return sorted(chosen["slide_id"])[: config.segmentation_num_slides]


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
        dense: slide id, its tile table (tile_id magnification x y side label split, row for row with the features), and
            features [n, d].
        classes: class names in order.
        device: of the probe.

    Returns:
        Table slide_id tile_id magnification x y side label split predicted, class names in `label` and `predicted`.
    """
    parts = []
    for slide_id, tiles, features in dense:
        predicted = probe.predict(features, device=device)[0]
        table = tiles[["tile_id", "magnification", "x", "y", "side", "label", "split"]].assign(
            predicted=np.array(classes, object)[predicted]
        )
        table.insert(0, "slide_id", slide_id)
        parts.append(table)
    columns = ["slide_id", "tile_id", "magnification", "x", "y", "side", "label", "split", "predicted"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def map_scores(painted: pd.DataFrame, classes: list[str]) -> list[dict[str, Any]]:
    """Mean IoU, mean Dice and accuracy of every slide and magnification of `paint`'s table, over its test tiles alone."""
    from mad.evaluation.data import class_counts, plain
    from mad.metrics.confusion import accuracy, class_dice, class_iou, confusion_matrix, macro

    code = {name: number for number, name in enumerate(classes)}
    rows = []
    for (slide_id, magnification), tiles in painted.groupby(["slide_id", "magnification"], sort=True):
        known = tiles[tiles["label"].notna() & (tiles["split"] == "test")]
        truth = known["label"].map(code).to_numpy(np.int64)
        predicted = known["predicted"].map(code).to_numpy(np.int64)
        matrix = confusion_matrix(truth, predicted, len(classes))
        rows.append(
            {
                "slide_id": slide_id,
                "magnification": float(magnification),
                "tiles": len(tiles),
                "scored": len(known),
                "counts": class_counts(truth, classes),
                "mean_iou": plain(float(macro(class_iou(matrix)))),
                "mean_dice": plain(float(macro(class_dice(matrix)))),
                "accuracy": plain(float(accuracy(matrix))),
            }
        )
    return rows
