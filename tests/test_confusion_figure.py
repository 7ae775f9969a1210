"""The picture of confusion matrices: shares of the truth in every cell, legible at its own size."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from mad.reporting.confusion_figure import confusion_figures, draw_confusion

CLASSES = ["Gray Matter", "White Matter", "Leptomeninges", "Superficial Cortex", "Background", "Vessel", "Artefact"]


def panels_of(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_title()]


@pytest.mark.parametrize("num_classes", [2, 5, 7])
@pytest.mark.parametrize("num_encoders", [1, 2, 3, 4, 8])
def test_it_is_legible_on_a_printed_page(num_encoders: int, num_classes: int) -> None:
    """No text under 7 points on 7.2 inches; nothing over anything else or cut off."""
    rng = np.random.default_rng(0)
    counts = {
        f"encoder-{n}": rng.integers(0, 5000, (num_classes, num_classes)).astype(float) for n in range(num_encoders)
    }
    figure = draw_confusion(counts, CLASSES[:num_classes], "the paper's linear probe")
    assert figure.get_size_inches()[0] <= 7.5 and len(panels_of(figure)) == num_encoders
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [text for text in figure.findobj(plt.Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 7
    boxes = []
    for axis in panels_of(figure):
        labels = [
            axis.title,
            *axis.texts,
            *axis.get_xticklabels(),
            *axis.get_yticklabels(),
            axis.xaxis.label,
            axis.yaxis.label,
        ]
        boxes += [text.get_window_extent(renderer) for text in labels if text.get_text()]
    frame = figure.bbox.padded(1)
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    plt.close(figure)


def test_rows_are_the_truth_and_sum_to_one() -> None:
    counts = np.array([[6.0, 2, 0], [1, 1, 2 - 1e-12], [0, 0, 0]])  # the mean of runs: nearly whole
    (axis,) = panels_of(figure := draw_confusion({"a": counts}, ["x", "y", "z"], "a probe"))
    written = {text.get_position()[::-1]: text.get_text() for text in axis.texts}
    assert [written[0, c] for c in range(3)] == ["0.75", "0.25", "0.00"]
    assert [written[1, c] for c in range(3)] == ["0.25", "0.25", "0.50"]
    assert [written[2, c] for c in range(3)] == ["–"] * 3, "no tile of this class was tested"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["x\n8", "y\n4", "z\n0"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["x\n8", "y\n4", "z\n0"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y", "z"]
    plt.close(figure)


def test_the_figure_is_of_what_the_json_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        "mad.reporting.confusion_figure.draw_confusion", lambda *told: drawn.append(told) or draw_confusion(*told)
    )
    runs = {"sound": [[[3, 1], [0, 2]]], "linear": [[[4, 0], [1, 1]], [[2, 2], [0, 2]]]}
    done = {"status": "ok", "classes": ["x", "y"], **{probe: {"confusion": counts} for probe, counts in runs.items()}}
    reports = {"a": {"classification": done}, "b": {"classification": {"status": "absent"}}, "c": {}}
    confusion_figures(reports, tmp_path)
    for (panels, classes, probe), (name, mean) in zip(
        drawn, {"sound": [[3, 1], [0, 2]], "linear": [[3, 1], [0.5, 1.5]]}.items(), strict=True
    ):
        assert list(panels) == ["a"] and np.array_equal(panels["a"], mean) and classes == ["x", "y"] and name in probe
    names = ("confusion.png", "confusion_linear.png")
    assert all(Image.open(tmp_path / name).height > 200 for name in names)
    confusion_figures({"c": {}}, tmp_path)
    assert all(Image.open(tmp_path / name).height == 200 for name in names), "a line of text"
