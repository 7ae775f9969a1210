"""The table of maps, where encoders were mapped on different slides."""

from __future__ import annotations

from typing import Any

from mad.reporting.map_table import map_table


def line(slide: str, score: float) -> dict[str, Any]:
    return {
        "slide_id": slide, "magnification": 10.0, "mean_iou": score, "pixel": {"mean_iou": score, "mean_dice": score},
        "boundary_f": score, "fragments": {"true": 3, "predicted": 4}, "scored": 96,
    }  # fmt: skip


def report(*lines: dict[str, Any], bare: tuple[str, ...] = ()) -> dict[str, Any]:
    maps = {"status": "ok", "split_by": "patient", "rules": {}, "maps": list(lines), "without_embeddings": list(bare)}
    return {"segmentation": maps | {"sources": {"data_digest": "d"}}}


def test_sources_name_the_map_of_every_encoder() -> None:
    table = map_table(
        ["a", "b"], {"a": report(line("S1", 0.1), line("S2", 0.2)), "b": report(line("S2", 0.3), bare=("S1",))}
    )
    first, second = table.blocks
    assert [column.source[:3] for column in first.columns] == [("segmentation", "maps", "0")] * 6
    assert [column.source[:3] for column in second.columns] == [("segmentation", "maps", "0 or 1")] * 6
    assert "`maps/0 or 1/pixel/mean_dice`" in table.markdown()
    assert [row.cells["S2 10x iou"].value for row in table.rows] == [0.2, 0.3]
    assert table.notes == ["b: Not mapped, without embeddings: S1.", "No intervals: every map is of one slide."]
