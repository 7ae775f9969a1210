"""Stage `viewer`: a static folder `report/viewer/` in which slides are looked at with annotation, labels and predictions as layers.

`run_slide` writes `pyramids/{slide}/` (deep zoom tiles, `slide.json`), the one part that opens a slide. `run` writes the rest from
tile/, evaluate/ and the annotations: `layers/{slide}/` (outlines as GeoJSON; per map a PNG of one pixel per tile and QuPath
GeoJSON), `pages/{slide}.html`, `assets/` and, last, `index.html`. Nothing in it comes from a network: any file server shows it,
`mad view` is one.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad.config import Config
from mad.files import MadError, StorageError, atomic_folder, atomic_path, read_json, read_parquet, write_json
from mad.progress import log
from mad.slides.sheet import SlideRow, cohort_rows
from mad.slides.shown import viewed_slides

if TYPE_CHECKING:
    import pandas as pd

    from mad.reporting.layers import Layer

    Painted = dict[str, tuple[pd.DataFrame, dict[tuple[str, float], float | None]]]


def run_slide(config: Config, row: SlideRow) -> None:
    """Write one slide's pyramid. One that cannot be read leaves its cause in `slide.json`.

    Raises:
        MadError: the slide cannot be read and `on_bad_slide` is "fail", or the disk is full.
    """
    from mad.slides.deepzoom import OVERLAP, TILE_PX, frame_of, last_single_tile, write_deepzoom
    from mad.slides.readers import open_slide
    from mad.slides.scale import read_scale

    with atomic_folder(_folder(config) / "pyramids" / row.slide_id) as folder:
        facts: dict[str, Any] = {"slide_id": row.slide_id, "status": "ok", "cause": None}
        try:
            with open_slide(row.path, config.tile.icc) as slide:
                scale = read_scale(slide.properties, row.mpp, row.path)
                frame = frame_of(slide, scale.mpp, config.viewer.magnification)
                write_deepzoom(folder, slide, frame, config.viewer.quality)
                facts |= asdict(frame) | {
                    "mpp": scale.mpp,
                    "size": slide.level_dimensions[0],
                    "bounds": slide.bounds,
                    "tile_px": TILE_PX,
                    "overlap": OVERLAP,
                    "thumbnail_level": last_single_tile(frame),
                }
        except MadError as error:
            if config.on_bad_slide == "fail" or isinstance(error, StorageError):
                raise
            facts |= {"status": "failed", "cause": str(error)}
        write_json(folder / "slide.json", facts)
    log(f"viewer {row.slide_id}: {facts['cause'] or f'{frame.width} x {frame.height} px'}")


def run(config: Config) -> None:
    """Write layers, pages and index of the slides whose pyramids are there.

    Raises:
        MadError: a slide of the viewer has no pyramid yet; an annotation cannot be read and `on_bad_slide` is "fail".
    """
    from mad.reporting.layers import write_layer
    from mad.reporting.overlay import class_colours
    from mad.reporting.viewer_page import index_page, slide_page, write_assets

    folder = _folder(config)
    rows = {row.slide_id: row for row in cohort_rows(config)}
    names = viewed_slides(rows.values(), config)
    colours = class_colours(config.label)
    painted = _painted(config)
    with (
        atomic_folder(folder / "layers") as layers,
        atomic_folder(folder / "pages") as pages,
        atomic_folder(folder / "assets") as assets,
    ):
        write_assets(assets)
        facts = []
        for name in names:
            path = folder / "pyramids" / name / "slide.json"
            if not path.exists():
                raise MadError(f"{path}: no such file; run `mad viewer {name}` first")
            slide = read_json(path) | {"layers": []}
            facts.append(slide)
            if slide["status"] != "ok":
                continue
            for layer in _layers(config, name, painted):
                slide["layers"].append(write_layer(layers / name, layer, colours, slide["bounds"], slide["size"]))
            slide["layers"] += _annotation(config, layers / name, rows[name], slide)
            (pages / f"{name}.html").write_text(slide_page(slide, colours), encoding="utf-8")
    with atomic_path(folder / "index.html") as temporary:
        temporary.write_text(index_page(facts), encoding="utf-8")
    log(f"viewer: {len(names)} slides, {sum(len(slide['layers']) for slide in facts)} layers in {folder}")


def _folder(config: Config) -> Path:
    return Path(config.results) / "report" / "viewer"


def _annotation(config: Config, folder: Path, row: SlideRow, slide: dict[str, Any]) -> list[dict[str, Any]]:
    """The annotation's layer, if there is one. Of a file that cannot be read the tile stage has told the cause already."""
    from mad.reporting.annotation_layer import write_annotation

    if not row.annotation:
        return []
    try:
        told = write_annotation(folder, row.annotation, config.label, slide)
    except MadError as error:
        if config.on_bad_slide == "fail" or isinstance(error, StorageError):
            raise
        log(f"viewer {row.slide_id}: no annotation layer: {error}")
        return []
    return [told] if told else []


def _painted(config: Config) -> Painted:
    """encoder -> its predictions, and the mean IoU of its maps by slide and magnification; of the encoders that have any."""
    found = {}
    for entry in config.encoders:
        folder = Path(config.results) / "evaluate" / entry.name
        path = folder / "segmentation.json"
        if path.exists() and (report := read_json(path)).get("status") == "ok":
            scores = {(line["slide_id"], line["magnification"]): line["mean_iou"] for line in report["maps"]}
            found[entry.name] = read_parquet(folder / "segmentation.parquet"), scores
    return found


def _layers(config: Config, slide: str, painted: Painted) -> list[Layer]:
    """Labels and predictions of one slide, magnification by magnification."""
    from mad.reporting.layers import Layer

    path = Path(config.results) / "tile" / f"{slide}.parquet"
    truth = read_parquet(path, ["magnification", "x", "y", "side", "status", "label"])
    truth = truth[truth["status"] != "edge"]
    found = []
    for magnification in config.evaluate.segmentation_magnifications:
        labelled = truth[truth["magnification"] == magnification]
        if labelled["label"].notna().any():
            found.append(Layer(None, magnification, labelled.rename(columns={"label": "class"})))
        for encoder, (table, scores) in painted.items():
            mine = table[(table["slide_id"] == slide) & (table["magnification"] == magnification)]
            if len(mine):
                score = scores.get((slide, magnification))
                found.append(Layer(encoder, magnification, mine.rename(columns={"predicted": "class"}), score))
    return found
