"""The viewer's pages: an index of slides, and per slide a page that OpenSeadragon fills. Templates and scripts lie in `web/`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from mad.reporting.web import render

ASSETS = ("viewer.css", "viewer.js", "openseadragon.min.js", "openseadragon.LICENSE.txt")


def write_assets(folder: Path) -> None:
    """Copy what all pages share into an existing folder."""
    for name in ASSETS:
        with as_file(files("mad.reporting.web") / name) as path:
            shutil.copyfile(path, folder / name)


def slide_page(slide: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """The page of one slide, which lies in `pages/`.

    Args:
        slide: its `slide.json`, and under `layers` what `write_layer` and `write_annotation` told. The annotation, which has no
            magnification, stands first on the page; layers are drawn in their own order.
        colours: `#rrggbb` per class.
    """
    groups: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for number, layer in sorted(enumerate(slide["layers"]), key=lambda entry: entry[1]["magnification"] is not None):
        heading = "As drawn" if layer["magnification"] is None else f"{layer['magnification']:g}x"
        groups.setdefault(heading, []).append((number, layer))
    return render("slide.html", slide=slide, groups=groups, colours=colours)


def index_page(slides: Sequence[Mapping[str, Any]]) -> str:
    """The list of slides with thumbnails; those that cannot be shown with their cause."""
    return render("index.html", slides=slides)
