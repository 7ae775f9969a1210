"""Segmentation maps beside their slides: Figure 4, and the predictions as polygons for QuPath.

Reads evaluate/*/segmentation.parquet and the slides' thumbnails; writes report/figures/figure4_segmentation.png and report/maps/.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad.config import Config
from mad.files import MadError, read_parquet
from mad.progress import log
from mad.reporting.from_json import Reports

if TYPE_CHECKING:
    import pandas as pd

    from mad.slides.readers import IccChoice

THUMBNAIL_PX = 1400


def figure4_and_maps(config: Config, slides: pd.DataFrame, mpp_of: dict[str, float | None], reports: Reports) -> None:
    """One row per slide and magnification: thumbnail, truth, maps; and the maps' polygons.

    Args:
        slides: the cohort's.
        mpp_of: slide -> um/px of its level 0; None of one that was not tiled.
        reports: of every encoder.
    """
    from mad.reporting.map_figure import figure4
    from mad.reporting.overlay import class_colours

    folder = Path(config.results) / "evaluate"
    painted = {
        encoder: read_parquet(folder / encoder / "segmentation.parquet")
        for encoder, parts in reports.items()
        if parts.get("segmentation", {}).get("status") == "ok" and (folder / encoder / "segmentation.parquet").exists()
    }
    colours = class_colours(config.label)
    path_of = dict(zip(slides["slide_id"], slides["path"], strict=True))
    if gone := sorted({slide for table in painted.values() for slide in table["slide_id"]} - set(path_of)):
        log(
            f"report: maps of {', '.join(gone)} are left out: the cohort has no such slide; `mad evaluate ENCODER` maps others"
        )
        painted = {encoder: table[table["slide_id"].isin(list(path_of))] for encoder, table in painted.items()}
    _write_maps(Path(config.results) / "report" / "maps", painted, colours, path_of)
    shown = list(dict.fromkeys(slide for table in painted.values() for slide in table["slide_id"]))
    rows = []
    for slide in shown:
        thumbnail, extent = read_thumbnail(str(path_of[slide]), config.tile.icc)
        for magnification in config.evaluate.segmentation_magnifications:
            maps = {}
            for encoder, table in painted.items():
                mine = table[(table["slide_id"] == slide) & (table["magnification"] == magnification)]
                if len(mine):
                    maps[encoder] = mine
            if not maps:
                continue
            truth = next(iter(maps.values()))
            scores = {
                encoder: line["mean_iou"]
                for encoder in maps
                for line in reports[encoder]["segmentation"]["maps"]
                if line["slide_id"] == slide and line["magnification"] == magnification
            }
            rows.append({
                "slide_id": slide, "magnification": magnification, "mpp": mpp_of.get(slide),
                "thumbnail": thumbnail, "extent": extent, "truth": truth, "maps": maps, "scores": scores,
            })  # fmt: skip
    target = Path(config.results) / "report" / "figures" / "figure4_segmentation.png"
    figure4(rows, list(reports), colours=colours, path=target)


def _write_maps(
    folder: Path, painted: dict[str, pd.DataFrame], colours: dict[str, str], path_of: dict[str, str]
) -> None:
    """The predictions as `{encoder}/{slide}_{magnification}x.geojson` for QuPath, in place of those of earlier runs."""
    from mad.reporting.map_polygons import write_map

    origin = {slide: _qupath_origin(path_of[slide]) for table in painted.values() for slide in set(table["slide_id"])}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for encoder, table in painted.items():
        for (slide, magnification), tiles in table.groupby(["slide_id", "magnification"]):
            write_map(folder / encoder / f"{slide}_{magnification:g}x.geojson", tiles, colours, origin[slide])


def _qupath_origin(path: str) -> tuple[int, int]:
    """Where QuPath's coordinates of a slide begin: at the corner of its bounds, where they are smaller than the slide."""
    from mad.slides.readers import open_slide

    try:
        with open_slide(path) as slide:
            x, y, *size = slide.bounds
            return (0, 0) if tuple(size) == tuple(slide.level_dimensions[0]) else (x, y)
    except (MadError, OSError) as error:
        log(f"report: {path}: the maps count from its corner, its bounds cannot be read: {error}")
        return 0, 0


def read_thumbnail(path: str, icc: IccChoice) -> tuple[Any, list[float] | None]:
    """A slide shrunk to at most THUMBNAIL_PX, and its extent [left, right, bottom, top] in level-0 px; None if unreadable."""
    from mad.slides.readers import open_slide

    try:
        with open_slide(path, icc) as slide:
            left, top, width, height = slide.bounds
            downsample = max(width, height) / THUMBNAIL_PX
            if downsample < 1:
                downsample = 1.0
            rows, columns = max(1, round(height / downsample)), max(1, round(width / downsample))
            image, _ = slide.salvaged_overview(downsample, rows, columns, left=left, top=top)
        return image, [left, left + width, top + height, top]
    except (MadError, OSError) as error:
        log(f"report: no thumbnail: {error}")
        return None, None
