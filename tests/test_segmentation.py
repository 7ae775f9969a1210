"""Figure 4's slides, maps and their scores."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.probe import Probe
from mad.evaluation.segmentation import map_scores, paint, segmentation_slides
from mad.files import MadError

CLASSES = ["a", "b"]
SLIDES = pd.DataFrame(
    {
        "slide_id": ["S3", "S1", "S2", "S4"],
        "split": ["test", "train", "test", "test"],
        "annotation": ["x.geojson", "x.geojson", "x.geojson", None],
    }
)


def test_first_annotated_test_slides() -> None:
    assert segmentation_slides(SLIDES, EvaluationConfig()) == ["S2"]
    assert segmentation_slides(SLIDES, EvaluationConfig(segmentation_num_slides=5)) == ["S2", "S3"]
    assert segmentation_slides(SLIDES, EvaluationConfig(segmentation_num_slides=0)) == []


def test_named_slides_win_and_strangers_are_refused() -> None:
    assert segmentation_slides(SLIDES, EvaluationConfig(segmentation_slides=["S4", "S1"])) == ["S4", "S1"]
    with pytest.raises(MadError, match=r"evaluate.segmentation_slides: the cohort has no slide 'S9'; it has S3, S1"):
        segmentation_slides(SLIDES, EvaluationConfig(segmentation_slides=["S4", "S9"]))


def test_block_split_has_no_split_per_slide() -> None:
    for missing in (None, pd.NA):
        slides = SLIDES.assign(split=pd.array([missing] * 4, dtype="string"))
        assert segmentation_slides(slides, EvaluationConfig()) == ["S1"]


def tiles(labels: list[str | None]) -> pd.DataFrame:
    number = np.arange(len(labels))
    return pd.DataFrame(
        {
            "tile_id": number.astype(str),
            "magnification": 10.0,
            "x": number,
            "y": 0,
            "side": 1,
            "label": pd.array(labels, object),
            "split": "test",
            **{f"share_{name}": [0.75 * (label == name) for label in labels] for name in CLASSES},
        }
    )


def test_paint_takes_the_first_run_and_keeps_the_order() -> None:
    probe = Probe(weight=torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]]]), bias=torch.zeros(2, 1, 2))
    features = np.array([[2.0], [-3.0], [1.0]], np.float32)
    painted = paint(probe, [("S1", tiles(["b", "a", None]), features)], CLASSES)
    assert painted["predicted"].tolist() == ["b", "a", "b"]
    assert painted["tile_id"].tolist() == ["0", "1", "2"] and set(painted["slide_id"]) == {"S1"}


def test_scores_are_of_labelled_tiles_and_present_classes() -> None:
    painted = tiles(["a", "a", "a", None]).assign(slide_id="S1", predicted=["a", "a", "b", "b"])
    (row,) = map_scores(painted, CLASSES)
    assert row["tiles"] == 4 and row["scored"] == 3
    assert row["accuracy"] == pytest.approx(2 / 3)
    assert row["mean_iou"] == pytest.approx(2 / 3)  # class b is not in the truth
    assert row["pixel"]["accuracy"] == pytest.approx(2 / 3) and row["pixel"]["mean_iou"] == pytest.approx(2 / 3)
    assert row["fragments"] == {"true": 1, "predicted": 2} and row["boundary_f"] == 0.0
    for without in (painted.assign(label=None), painted.assign(split="train"), painted.assign(split=None)):
        (none,) = map_scores(without, CLASSES)
        assert none["scored"] == 0 and none["mean_iou"] is None and none["accuracy"] is None
        assert none["boundary_f"] is None and none["fragments"] is None
    (part,) = map_scores(painted.assign(split=["test", "train", "test", "test"]), CLASSES)
    assert part["scored"] == 2 and part["accuracy"] == pytest.approx(1 / 2)


def test_no_slides_make_an_empty_table() -> None:
    empty = paint(Probe(weight=torch.zeros(1, 1, 2), bias=torch.zeros(1, 1, 2)), [], CLASSES)
    assert len(empty) == 0 and "predicted" in empty and map_scores(empty, CLASSES) == []


def test_pixels_of_tiles_without_a_majority_are_scored_too() -> None:
    painted = tiles(["a", None]).assign(slide_id="S1", predicted=["a", "a"], share_b=[0.0, 0.25])
    (row,) = map_scores(painted, CLASSES)
    assert row["scored"] == 1 and row["mean_iou"] == 1.0
    assert row["pixel"]["accuracy"] == pytest.approx(0.75)
    assert row["pixel"]["mean_iou"] == pytest.approx((0.75 + 0) / 2)
