"""Whole slides by a teacher at 20x and by a student at 5x: tile ratio, encoder ratio, whole-slide ratio, slides per minute.

    python benchmarks/xmag.py [SLIDE ...] [--repeats 3] [--sample 8] [--threads 2] [--device cpu] [--size 10752 8960]
        [--teacher published:uni2-h] [--student timm:vit_base_patch14_dinov2]

Without slides a synthetic one of `--size` level-0 px is made (0.25 um/px). Encoders are architectures with random weights:
`published:NAME` (`mad encoders`) or `timm:MODEL`. In one process, repeat by repeat, each side opens every slide, segments its
tissue, lays the grid [5, 20], reads the tiles of its own magnification with tissue as stage `embed` does, and encodes them; tiles
that cross the slide's border (which `embed` leaves out) too, so that both sides see the same tissue. Encoding takes `--sample`
tiles per slide, evenly spread (0: all, the default where there is a GPU; 8 on a CPU). Where not all are encoded, its time is

    segmentation + reading of all tiles + number of tiles x time per encoded tile

and is printed as computed. Where all are, that of one pass in which tiles are read while others are encoded is printed as measured.
Each figure is the median over the repeats of the sum over slides; ratios are teacher / student.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

if "--device cpu" in " ".join(sys.argv).replace("--device=", "--device "):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # encoders take the GPU that they see

import numpy as np
import pandas as pd
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from mad.config.encoders import EncoderConfig
from mad.config.model import TileConfig
from mad.config.synthetic import SyntheticConfig
from mad.models.embedding import embed_tiles
from mad.models.encoders import TimmEncoder, build_published
from mad.models.registry import PUBLISHED
from mad.slides.synthetic.slide import write_slide
from mad.slides.tissue import tissue_mask
from mad.tiles.aligned import AlignedSlide, Footprint, open_aligned
from mad.tiles.index import tile_table
from mad.tiles.labels import block_sums, cells_per_tile, raster_shape
from mad.tiles.pyramid import parse_tile_id

COARSE, FINE = 5.0, 20.0
PUBLISHED_TILE_RATIO = 11.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", nargs="*", type=Path)
    parser.add_argument("--teacher", default="published:uni2-h")
    parser.add_argument("--student", default="timm:vit_base_patch14_dinov2")
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=int, help="tiles per slide that are encoded; 0: all")
    parser.add_argument("--batch", type=int, help="tiles per forward pass; not given: that of stage embed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--size", type=int, nargs=2, default=(10752, 8960), help="of the synthetic slide, level-0 px")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.sample is None:
        args.sample = 0 if torch.cuda.is_available() else 8
    config = TileConfig(magnifications=[COARSE, FINE], tile_px=args.tile_px)
    with tempfile.TemporaryDirectory() as folder:
        slides = args.slides or [synthetic_slide(args.size, Path(folder))]
        print_counts(slides, config)
        compare(slides, config, args)


def synthetic_slide(size: tuple[int, int], folder: Path) -> Path:
    """One slide of the synthetic cohort."""
    write_slide(SyntheticConfig(patients=1, width=size[0], height=size[1]), "S01", folder)
    return folder / "S01.tiff"


def segment(slide: AlignedSlide, config: TileConfig) -> pd.DataFrame:
    """The tile table of a slide without labels: what stage `tile` does, less annotations and picture."""
    grid, mpp = slide.grid, slide.scale.mpp
    cells = cells_per_tile(grid, mpp, config.tissue.mpp)
    downsample = grid.finest_px / cells
    overview = slide.reader.overview(downsample, *raster_shape(grid, cells), left=grid.left, top=grid.top)
    counts = block_sums(tissue_mask(overview, mpp=mpp * downsample, options=config.tissue), cells)
    none = np.zeros((*counts.shape, 1), np.int64)
    return tile_table(
        "S", grid, slide.plan, counts, none, (cells, 1), ["none"], min_tissue=config.min_tissue, min_annotated=0.5
    )


def with_tissue(table: pd.DataFrame, magnification: float, config: TileConfig) -> list[tuple[int, ...]]:
    """Indices of the tiles that are encoded, coarsest tile by coarsest tile; those that cross the slide's border too."""
    chosen = table[(table["tissue"] >= config.min_tissue) & (table["magnification"] == magnification)]
    return sorted(parse_tile_id(tile_id)[1] for tile_id in chosen["tile_id"])


def pixels(slide: AlignedSlide, tiles: list[tuple[int, ...]]) -> Iterator[np.ndarray]:
    """The tiles as stage `embed` reads them densely."""
    for (i, j), own in groupby(tiles, key=lambda index: index[:2]):
        footprint = Footprint(slide, i, j)
        for index in own:
            if (found := footprint.tile(index)) is not None:
                yield found


def print_counts(slides: list[Path], config: TileConfig) -> None:
    """How many tiles each magnification has, at the tissue's edge and inside it."""
    coarse = fine = whole = 0
    for path in slides:
        with open_aligned(path, config) as slide:
            table, (width, height) = segment(slide, config), slide.reader.level_dimensions[0]
            parents, children = (with_tissue(table, level, config) for level in (COARSE, FINE))
            counts = pd.Series([index[:2] for index in children], dtype=object).value_counts()
            inside = sum(counts.get(index, 0) == 16 for index in parents)
            print(f"{path.name}: {width} x {height} px, {slide.scale.mpp:.4f} um/px")
        coarse, fine, whole = coarse + len(parents), fine + len(children), whole + inside
    print(
        f"tiles with tissue, {config.tile_px} px: {fine} at {FINE:g}x, {coarse} at {COARSE:g}x\n"
        f"tile ratio: {fine / coarse:.1f} with the edges of tissue and slide (published: {PUBLISHED_TILE_RATIO}); "
        f"16 by geometry inside, where all 16 children have tissue ({whole} of the {coarse} tiles at {COARSE:g}x)"
    )


def build(spec: str, args: argparse.Namespace) -> TimmEncoder:
    """An encoder of this architecture with random weights."""
    kind, _, name = spec.partition(":")
    entry = EncoderConfig(name="e", spec=spec, batch=args.batch, precision=args.precision)
    if kind == "published":
        return TimmEncoder(build_published(PUBLISHED[name], args.tile_px), entry, args.tile_px, PUBLISHED[name])
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, img_size=args.tile_px)
    except TypeError:  # a model without an input size of its own
        model = timm.create_model(name, pretrained=False, num_classes=0)
    return TimmEncoder(model, entry, args.tile_px)


class Side:
    """One encoder at its magnification, and the seconds that its parts took, repeat by repeat."""

    def __init__(self, name: str, spec: str, magnification: float, args: argparse.Namespace) -> None:
        self.name, self.spec, self.magnification, self.args = name, spec, magnification, args
        self.encoder = build(spec, args)
        self.parts: dict[str, list[float]] = {}
        self.tiles = self.encoded = 0

    def repeat(self, slides: list[Path], config: TileConfig) -> None:
        """One repeat over all slides."""
        self.tiles = self.encoded = 0
        spent: dict[str, float] = dict.fromkeys(("segmentation", "reading", "encoding"), 0.0)
        for path in slides:

            def segmented(path: Path = path) -> tuple[AlignedSlide, list[tuple[int, ...]]]:
                slide = open_aligned(path, config)
                return slide, with_tissue(segment(slide, config), self.magnification, config)

            (slide, tiles), seconds = timed(segmented)
            spent["segmentation"] += seconds
            with slide:
                wanted = self.args.sample or len(tiles)
                chosen = set(np.linspace(0, len(tiles) - 1, min(wanted, len(tiles))).round().astype(int).tolist())

                def read(slide: AlignedSlide = slide, tiles: list = tiles, chosen: set = chosen) -> list[np.ndarray]:
                    return [image for n, image in enumerate(pixels(slide, tiles)) if n in chosen]

                images, seconds = timed(read)
            spent["reading"] += seconds
            spent["encoding"] += timed(lambda images=images: self.embed(iter(images)))[1]
            self.tiles, self.encoded = self.tiles + len(tiles), self.encoded + len(images)
        if self.encoded == self.tiles:
            spent["measured"] = sum(timed(lambda path=path: self.whole(path, config))[1] for path in slides)
        for name, seconds in spent.items():
            self.parts.setdefault(name, []).append(seconds)

    def whole(self, path: Path, config: TileConfig) -> None:
        """From file to embeddings: tiles are read while others are encoded."""
        with open_aligned(path, config) as slide:
            self.embed(pixels(slide, with_tissue(segment(slide, config), self.magnification, config)))

    def embed(self, images: Iterator[np.ndarray]) -> None:
        embed_tiles(self.encoder, images, self.args.batch, self.name)

    def seconds(self, part: str) -> float:
        """Median over the repeats."""
        return statistics.median(self.parts[part])

    @property
    def per_tile(self) -> float:
        return self.seconds("encoding") / self.encoded

    @property
    def fixed(self) -> float:
        """Seconds of all slides before any network."""
        return self.seconds("segmentation") + self.seconds("reading")

    @property
    def computed(self) -> float:
        """Seconds of all slides, one part after the other."""
        return self.fixed + self.tiles * self.per_tile


def compare(slides: list[Path], config: TileConfig, args: argparse.Namespace) -> None:
    """Run both sides in turn and print their figures."""
    sides = [Side("teacher", args.teacher, FINE, args), Side("student", args.student, COARSE, args)]
    for side in sides:
        side.embed(iter(np.zeros((1, config.tile_px, config.tile_px, 3), np.uint8)))  # warm
    for _ in range(args.repeats):
        for side in sides:
            side.repeat(slides, config)
    teacher, student = sides
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} threads"
    print(f"{device}; {len(slides)} slide(s), {args.repeats} repeats")
    for side in sides:
        audit: dict[str, Any] = side.encoder.audit
        with FlopCounterMode(display=False) as counter:
            side.encoder(np.zeros((1, config.tile_px, config.tile_px, 3), np.uint8))
        print(
            f"{side.name} {side.spec} at {side.magnification:g}x: {audit['parameters'] / 1e6:.0f} M parameters, "
            f"{counter.get_total_flops() / 1e9:.0f} GFLOP per tile, {audit['dtype']}\n"
            f"  {side.encoded} of {side.tiles} tiles encoded: {1000 * side.per_tile:.1f} ms per tile; "
            f"segmentation {side.seconds('segmentation'):.2f} s, reading {side.seconds('reading'):.2f} s, "
            f"encoding {side.tiles * side.per_tile:.2f} s"
        )
    encoder = teacher.per_tile / student.per_tile
    print(
        f"encoder ratio: {encoder:.1f} per tile; {16 * encoder:.0f} per field of view (16 tiles of the teacher, one of the student)"
    )
    print(f"segmentation and reading alone: {teacher.fixed / student.fixed:.1f}: what is left where encoding is free")
    both = "measured" in teacher.parts and "measured" in student.parts
    for how in ("computed", *(["measured"] if both else [])):
        slow, fast = ((side.computed if how == "computed" else side.seconds(how)) for side in sides)
        rates = [60 * len(slides) / seconds for seconds in (slow, fast)]
        print(
            f"whole-slide ratio, {how}: {slow / fast:.1f} ({slow:.2f} s and {fast:.2f} s); "
            f"slides per minute: {rates[0]:.3g} by the teacher, {rates[1]:.3g} by the student"
        )


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the seconds that it took."""
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


if __name__ == "__main__":
    main()
