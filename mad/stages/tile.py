"""Stage `tile`: one slide's grid of aligned tiles with tissue and labels, as `tile/{slide}.parquet`.

Beside it `tile/{slide}.json` tells the slide's scale, how each magnification is read, and what went wrong if anything did,
and `tile/{slide}.png` shows tissue, grid and labels over the slide.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from mad.config import Config
from mad.files import MadError, StorageError, write_json, write_parquet
from mad.progress import log
from mad.reporting.overlay import write_overlay
from mad.slides.pen import pen_mask
from mad.slides.sheet import SlideRow
from mad.slides.tissue import tissue_mask, unscanned
from mad.tiles.aligned import AlignedSlide, open_aligned
from mad.tiles.annotated import annotated_raster
from mad.tiles.index import empty_table, tile_table
from mad.tiles.labels import NO_CLASS, block_sums, cells_per_tile, class_counts, raster_shape


def run(config: Config, row: SlideRow) -> None:
    """Tile one slide. A slide that cannot be tiled gets an empty table and its cause in the JSON file.

    Raises:
        MadError: the slide cannot be tiled and `on_bad_slide` is "fail".
    """
    folder = Path(config.results) / "tile"
    try:
        with open_aligned(row.path, config.tile, row.mpp) as slide:
            table, facts = _tile(config, row, slide, folder / f"{row.slide_id}.png")
    except MadError as error:
        if config.on_bad_slide == "fail" or isinstance(error, StorageError):
            raise
        table, facts = empty_table(config.label.classes), {"status": "failed", "cause": str(error)}
        write_overlay(
            folder / f"{row.slide_id}.png", np.full((64, 256, 3), 255, np.uint8), title=f"{row.slide_id}: failed"
        )
    write_parquet(folder / f"{row.slide_id}.parquet", table)
    write_json(folder / f"{row.slide_id}.json", {"slide_id": row.slide_id, "path": row.path, **facts})
    log(
        f"tile {row.slide_id}: {facts['status']}, {len(table)} tiles"
        + (f"; {facts['cause']}" if facts["cause"] else "")
    )


def _tile(config: Config, row: SlideRow, slide: AlignedSlide, picture: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    classes = config.label.classes
    grid, mpp = slide.grid, slide.scale.mpp

    tissue_cells = cells_per_tile(grid, mpp, config.tile.tissue.mpp)
    downsample = grid.finest_px / tissue_cells
    shape = raster_shape(grid, tissue_cells)
    overview, lost = slide.reader.salvaged_overview(downsample, *shape, left=grid.left, top=grid.top)
    options = config.tile.tissue
    tissue = tissue_mask(overview, mpp=mpp * downsample, options=options) & ~lost
    pen = pen_mask(np.where(lost[..., None], np.uint8(255), overview), mpp=mpp * downsample)  # black would be ink
    inked = float(pen[tissue].mean()) if tissue.any() else 0.0
    if options.exclude_pen:
        tissue &= ~pen

    class_cells = cells_per_tile(grid, mpp, config.label.mpp)
    raster, annotation, warnings = annotated_raster(
        row.annotation,
        config.label,
        grid,
        class_cells,
        bounds=slide.reader.bounds,
        size=slide.reader.level_dimensions[0],
    )
    if row.annotation and config.label.glass_is_background and config.label.background:
        glass = ~(tissue | pen | lost | unscanned(overview, mpp=mpp * downsample))
        fine = cv2.resize(glass.astype(np.uint8), raster.shape[::-1], interpolation=cv2.INTER_NEAREST)
        raster[(raster == NO_CLASS) & (fine == 1)] = classes.index(config.label.background)

    table = tile_table(
        row.slide_id,
        grid,
        slide.plan,
        block_sums(tissue, tissue_cells),
        class_counts(raster, len(classes), class_cells),
        (tissue_cells, class_cells),
        classes,
        min_tissue=config.tile.min_tissue,
        min_annotated=config.label.min_annotated,
        pen_counts=block_sums(pen, tissue_cells),
    )
    missing = [f"{level.magnification:g}x" for level in slide.plan.levels if not level.available]
    enlarged = [
        f"{level.magnification:g}x enlarged {level.level_downsample / level.downsample:.3g}x"
        for level in slide.plan.levels
        if level.available and level.enlarged
    ]
    causes = [slide.scale.warning] if slide.scale.warning else []
    if missing:
        causes.append(f"{', '.join(missing)} left out: finer than the slide's {mpp:.3g} um/px")
    if enlarged:
        causes.append(f"{', '.join(enlarged)}: finer than the slide's {mpp:.3g} um/px")
    if lost.any():
        area = lost.sum() * (mpp * downsample / 1000) ** 2
        causes.append(f"{area:.2g} mm2 of the slide cannot be decoded, taken as not scanned; copy the file anew")
    if not tissue.any():
        causes.append("no tissue found; if there is some, lower its threshold or try another tile.tissue.method")
    coarsest = table["magnification"] == config.tile.magnifications[0]
    if not (coarsest & (table["status"] != "edge")).any():
        causes.append(f"smaller than one whole {config.tile.magnifications[0]:g}x tile: no pair starts there")
    causes += warnings
    facts = {
        "status": "ok" if tissue.any() else "no tissue",
        "cause": "; ".join(causes) or None,
        "vendor": slide.reader.properties.get("openslide.vendor"),
        "width": grid.width,
        "height": grid.height,
        "mpp": mpp,
        "mpp_source": slide.scale.source,
        "icc": slide.reader.icc,
        "keeps_pixel_grid": slide.plan.keeps_pixel_grid,
        "levels": [asdict(level) for level in slide.plan.levels],
        "tissue_share": float(tissue.mean()),
        "pen_share": inked,
        "annotation": annotation,
        "tiles": {f"{m:g}x": int(n) for m, n in table["magnification"].value_counts().sort_index().items()},
    }
    write_overlay(
        picture,
        overview,
        title=row.slide_id,
        mpp=mpp * downsample,
        tissue=tissue,
        pen=pen,
        raster=raster,
        grid=grid,
        label=config.label,
    )
    return table, facts
