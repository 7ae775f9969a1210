"""Slide to shards: our tiles per second against the usual ways and against the limit, in one process run, alternating.

    python benchmarks/tiling.py SLIDE [--annotation FILE] [--subsampling 420] [--repeats 5] [--big]

One core. Every pair of the slide at all magnifications is cut: each parent at 2.5x and 10x with its 16 children. Sides:

    mad         stage `shard`: read, blur score, JPEG, digests, tar and index
    usual       OpenSlide read_region per tile, Pillow JPEG, tarfile: the same tiles, each read once
    hs2p        its tar of each magnification (openslide backend, one worker; where it is installed; 4:2:0 only)
    dzsave      pyvips dzsave at the same tile size into a zip: every tile of the slide at every power of two
    limit       every compressed tile that the cut tiles touch decoded once, every cut tile encoded once, nothing else

Then two slides at once on two cores, and with `--big` time and peak memory of `mad tile` and `mad shard` on a slide of four by
three copies of SLIDE, whose compressed tiles are copied as they are.
"""

import argparse
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.update(VIPS_CONCURRENCY="1", OMP_NUM_THREADS="1")

import cv2
import numpy as np
import openslide
import pandas as pd
import pyvips
import tifffile
from PIL import Image

from mad.config import Config
from mad.files import read_parquet, write_json, write_parquet
from mad.slides.readers import TiffReader, open_slide
from mad.slides.scale import read_scale
from mad.slides.sheet import cohort_rows
from mad.stages import sample, shard, tile
from mad.tiles.aligned import open_aligned
from mad.tiles.pyramid import parse_tile_id
from mad.tiles.shards import encode

SUBSAMPLING = {"444": (0, "off"), "422": (1, "on"), "420": (2, "on")}  # of Pillow, of libvips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--annotation", type=Path)
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--quality", type=int, default=95)
    parser.add_argument("--subsampling", default="444", choices=SUBSAMPLING)
    parser.add_argument("--pyramid", default="scanner", choices=("scanner", "area"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--big", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(shutil.copy(args.slide, Path(folder) / f"twin{args.slide.suffix}"))
        config = prepare(args, Path(folder), {"A": args.slide.absolute(), "B": twin})
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        compare(config, args)
        os.sched_setaffinity(0, cores)
        two_cores(config, args.repeats)
        if args.big:
            big(args, Path(folder) / "big")


def prepare(args: argparse.Namespace, folder: Path, slides: dict[str, Path]) -> Config:
    """Tile the slides and select all of their pairs; returns the configuration, saved beside the results."""
    folder.mkdir(exist_ok=True)
    annotation = str(args.annotation.absolute()) if args.annotation else ""
    rows = [f"{name}\t{slide}\t{name}\t{annotation}\ttrain" for name, slide in slides.items()]
    (folder / "slides.tsv").write_text("\n".join(["slide_id\tpath\tpatient_id\tannotation\tsplit", *rows]) + "\n")
    settings = {
        "results": str(folder / "results"),
        "cohort": {"sheet": str(folder / "slides.tsv")},
        "tile": {"tile_px": args.tile_px, "pyramid": args.pyramid},
        "label": {"classes": ["Compact", "Loose", "Crypts", "Infiltrate", "Background"]},
        "shard": {"quality": args.quality, "subsampling": args.subsampling},
    }
    write_json(folder / "config.json", settings)
    config = Config(**settings)
    start = time.perf_counter()
    for row in cohort_rows(config):
        tile.run(config, row)
    print(f"stage tile: {(time.perf_counter() - start) / len(slides):.1f} s per slide (mask, labels, tables, picture)")
    sample.run(config)
    for name in slides:
        path = folder / "results" / "sample" / f"{name}.parquet"
        write_parquet(path, read_parquet(path).query("role != 'standalone'"))
    return config


def compare(config: Config, args: argparse.Namespace) -> None:
    """Print the median tiles per second of every side."""
    row = cohort_rows(config)[0]
    out = Path(config.results) / "other"
    selection = read_parquet(Path(config.results) / "sample" / "A.parquet")
    tiles = read_parquet(Path(config.results) / "tile" / "A.parquet").set_index("tile_id")
    unique = selection["tile_id"].drop_duplicates()
    chosen = tiles.loc[unique]

    def ours() -> float:
        shutil.rmtree(Path(config.results) / "shard" / "A", ignore_errors=True)
        start = time.perf_counter()
        shard.run(config, row)
        return len(unique) / (time.perf_counter() - start)

    sides: dict[str, Callable[[], float]] = {
        "mad": ours,
        "usual": lambda: rate(usual, row.path, selection, chosen, args, out),
        "dzsave": lambda: rate(dzsave, row.path, args, out),
        "limit": lambda: rate(limit, config, chosen, args),
    }
    try:
        sides["hs2p"] = hs2p(row.path, config, args, out)
    except ImportError as error:
        print(f"hs2p is left out: {error}")
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            found[name].append(side())
    print(
        f"{len(unique)} tiles ({chosen['magnification'].value_counts().to_dict()}), quality {args.quality}, {args.subsampling}"
    )
    median = {name: statistics.median(values) for name, values in found.items()}
    for name, value in median.items():
        spread = f"{min(found[name]):.0f}-{max(found[name]):.0f}"
        print(f"{name:8} {value:7.0f} tiles/s ({spread}); mad is {median['mad'] / value:5.2f} x")


def rate(side: Callable[..., int], *given: object) -> float:
    """Tiles per second of a side, which returns how many it made."""
    start = time.perf_counter()
    count = side(*given)
    return count / (time.perf_counter() - start)


def usual(path: str, selection: pd.DataFrame, chosen: pd.DataFrame, args: argparse.Namespace, out: Path) -> int:
    """The same tiles in the same samples, each read by `read_region` and encoded by Pillow once."""
    slide = openslide.OpenSlide(path)
    done: dict[str, bytes] = {}
    with tarfile.open(out / "usual.tar", "w") as tar:
        for entry in selection.itertuples():
            if entry.tile_id not in done:
                place = chosen.loc[entry.tile_id]
                size = round(place.side / slide.level_downsamples[place.level])
                image = slide.read_region((place.x, place.y), place.level, (size, size)).convert("RGB")
                if size != args.tile_px:
                    image = image.resize((args.tile_px, args.tile_px), Image.Resampling.BOX)
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=args.quality, subsampling=SUBSAMPLING[args.subsampling][0])
                done[entry.tile_id] = buffer.getvalue()
            info = tarfile.TarInfo(f"{entry.sample_id}.{entry.position}.jpg")
            info.size = len(done[entry.tile_id])
            tar.addfile(info, io.BytesIO(done[entry.tile_id]))
    return len(done)


def hs2p(path: str, config: Config, args: argparse.Namespace, out: Path) -> Callable[[], float]:
    """hs2p's tars of every magnification; where the tiles lie is found beforehand and not timed."""
    from hs2p import SegmentationConfig, SlideSpec, TilingConfig, tile_slide
    from hs2p.api import extract_tiles_to_tar

    if args.subsampling != "420":
        raise ImportError("it writes 4:2:0 alone; compare with --subsampling 420")
    plans = [
        tile_slide(
            SlideSpec(sample_id=f"m{magnification:g}", image_path=Path(path)),
            tiling=TilingConfig(
                backend="openslide",
                mask_backend="openslide",
                requested_spacing_um=10 / magnification,
                requested_tile_size_px=args.tile_px,
                tolerance=0.12,
                overlap=0.0,
            ),
            segmentation=SegmentationConfig(method="hsv", downsample=16),
        )
        for magnification in config.tile.magnifications
    ]

    def write() -> int:
        for plan in plans:
            extract_tiles_to_tar(plan, out, jpeg_quality=args.quality, num_workers=1)
        return sum(len(plan.x) for plan in plans)

    return lambda: rate(write)


def dzsave(path: str, args: argparse.Namespace, out: Path) -> int:
    """Deep zoom by libvips."""
    image = pyvips.Image.tiffload(path)[:3]
    suffix = f".jpg[Q={args.quality},subsample-mode={SUBSAMPLING[args.subsampling][1]}]"
    image.dzsave(str(out / "dz.zip"), tile_size=args.tile_px, overlap=0, depth="onetile", suffix=suffix)
    with zipfile.ZipFile(out / "dz.zip") as made:
        return sum(name.endswith(".jpg") for name in made.namelist())


def limit(config: Config, chosen: pd.DataFrame, args: argparse.Namespace) -> int:
    """Decode what must be decoded and encode what must be encoded: nothing is placed, scored, digested or written."""
    with open_aligned(cohort_rows(config)[0].path, config.tile) as slide:
        reader = slide.reader
        assert isinstance(reader, TiffReader)
        for level, tiles in chosen.groupby("level"):
            stored, downsample = reader.levels[level], reader.level_downsamples[level]
            first = (tiles[["x", "y"]] / downsample).round().astype(int).to_numpy()
            last = first + (tiles["side"] / downsample).round().astype(int).to_numpy()[:, None] - 1
            spans = np.concatenate([first, last], axis=1) // ([stored.tile_width, stored.tile_height] * 2)
            for place in {(r, c) for x0, y0, x1, y1 in spans for r in range(y0, y1 + 1) for c in range(x0, x1 + 1)}:
                reader._tile(stored, *place)
        samples = [slide.tile(parse_tile_id(name)[1]) for name in chosen.index[:: max(1, len(chosen) // 64)]]
    for number in range(len(chosen)):
        encode(samples[number % len(samples)], format="jpg", quality=args.quality, subsampling=args.subsampling)
    return len(chosen)


def two_cores(config: Config, repeats: int) -> None:
    """Both rows of the sheet one after the other and at once: what `--cores 2` gains."""

    def cut(*slides: str) -> float:
        for name in slides:
            shutil.rmtree(Path(config.results) / "shard" / name, ignore_errors=True)
        start = time.perf_counter()
        with ProcessPoolExecutor(len(slides)) as pool:
            list(pool.map(cut_slide, [config] * len(slides), slides))
        return time.perf_counter() - start

    one, two = [], []
    for _ in range(repeats):
        one.append(cut("A") + cut("B"))
        two.append(cut("A", "B"))
    print(
        f"two slides on two cores: {statistics.median(one) / statistics.median(two):.2f} x as fast as one after the other"
    )


def cut_slide(config: Config, name: str) -> None:
    cv2.setNumThreads(1)
    shard.run(config, next(row for row in cohort_rows(config) if row.slide_id == name))


def big(args: argparse.Namespace, folder: Path) -> None:
    """Time and peak memory of both stages, as commands, on a slide of 4 x 3 copies."""
    folder.mkdir()
    slide = folder / "big.tiff"
    width, height = repeat_tiles(args.slide, slide, across=4, down=3)
    args.annotation = None
    prepare(args, folder, {"A": slide})
    for stage in ("tile", "shard"):
        command = [sys.executable, "-m", "mad", stage, "A", "--config", str(folder / "config.json")]
        start = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command} failed")
        seconds = time.perf_counter() - start
        print(f"{width} x {height} px: mad {stage} {seconds:.1f} s, peak memory {usage.ru_maxrss / 1024:.0f} MB")
        if stage == "shard":
            count = read_parquet(folder / "results" / "shard" / "A.parquet", ["tile_id"])["tile_id"].nunique()
            print(f"  {count} tiles, {count / seconds:.0f} tiles/s with start and end of the process")


def repeat_tiles(source: Path, target: Path, *, across: int, down: int) -> tuple[int, int]:
    """A pyramidal TIFF of copies of another's compressed tiles, side by side; its width and height in px."""
    with open_slide(source) as reader, tifffile.TiffWriter(target, bigtiff=True) as out:
        assert isinstance(reader, TiffReader)
        mpp = read_scale(reader.properties, None, str(source)).mpp
        for level, page in enumerate(stored.page for stored in reader.levels):
            if page.imagewidth % page.tilewidth or page.imagelength % page.tilelength:
                raise SystemExit(f"{source}: level {level} is no whole number of tiles")
            rows, columns = page.imagelength // page.tilelength, page.imagewidth // page.tilewidth
            order = [r * columns + c for r in list(range(rows)) * down for c in list(range(columns)) * across]
            places = [(page.dataoffsets[n], page.databytecounts[n]) for n in order]
            per_cm = 1e4 / (mpp * reader.level_downsamples[level])
            out.write(
                (os.pread(reader._descriptor, size, offset) for offset, size in places),
                shape=(page.imagelength * down, page.imagewidth * across, 3),
                dtype=np.uint8,
                tile=(page.tilelength, page.tilewidth),
                photometric="ycbcr" if page.photometric == 6 else "rgb",
                subsampling=page.subsampling if page.photometric == 6 else None,
                compression="jpeg",
                jpegtables=page.jpegtables,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
                metadata=None,
            )
        return reader.level_dimensions[0][0] * across, reader.level_dimensions[0][1] * down


if __name__ == "__main__":
    cv2.setNumThreads(1)
    main()
