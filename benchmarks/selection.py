"""Selection and planning at cohort scale: stage `sample` and `snakemake --dry-run` on a synthetic cohort of many slides.

    python benchmarks/selection.py [--slides 1000] [--uncapped] [--threads 2] [--folder FOLDER]

Writes a cohort sheet and the tile tables of slides of 40,000 x 30,000 px (25,600 tiles of 224 px at 2.5x, 10x and 40x), with a
few patterns of tissue and labels in turn, then runs the stage and the dry run each in a child process and prints its wall
time and peak memory. No pixels are made: nothing here reads a slide. With `--folder` the tables are kept and used again.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from mad.files import write_json, write_parquet
from mad.slides.scale import plan_scale
from mad.slides.sheet import write_sheet
from mad.tiles.index import tile_table
from mad.tiles.pyramid import Grid, Ladder

ROOT = Path(__file__).parents[1]
LADDER = Ladder((2.5, 10.0, 40.0))
CLASSES = ["Gray Matter", "White Matter", "Leptomeninges", "Superficial Cortex", "Background"]
CELLS = 8
PATTERNS = 8
CAPS = {
    "max_pairs": {"2.5x-10x": 1300, "10x-40x": 22000},
    "max_standalone": {"2.5x": 500, "10x": 3000, "40x": 12000},
}


def pattern(seed: int) -> pd.DataFrame:
    """The tile table of one slide, its tissue a few blobs, its classes smooth fields inside them."""
    rng = np.random.default_rng(seed)
    grid = Grid(LADDER, 224.0, 40_000, 30_000)
    plan = plan_scale(
        mpp=0.25, level_downsamples=[1, 4, 16], longer_px=40_000, magnifications=LADDER.magnifications, tile_px=224
    )
    shape = grid.level_shape(2)
    fields = np.stack([gaussian_filter(rng.standard_normal(shape), 10) for _ in CLASSES])
    tissue = fields[-1] > np.quantile(fields[-1], rng.uniform(0.3, 0.6))
    winner = np.where(tissue, fields[:-1].argmax(axis=0), len(CLASSES) - 1)
    counts = (winner[..., None] == np.arange(len(CLASSES))) * CELLS**2
    return tile_table(
        "SLIDE", grid, plan, tissue * CELLS**2, counts, (CELLS, CELLS), CLASSES, min_tissue=0.1, min_annotated=0.5
    )


def write_cohort(folder: Path, num_slides: int) -> None:
    """`slides.tsv` and the tile tables under `results/tile`."""
    names = [f"S{number:05d}" for number in range(num_slides)]
    write_sheet(
        folder / "slides.tsv",
        [{"slide_id": name, "path": f"slides/{name}.svs", "patient_id": f"P{name[1:]}"} for name in names],
    )
    (folder / "slides").mkdir()
    for name in names:  # empty: planning asks whether a slide is there, nothing reads it
        (folder / "slides" / f"{name}.svs").touch()
    patterns = [pattern(seed) for seed in range(min(PATTERNS, num_slides))]
    for number, name in enumerate(names):
        table = patterns[number % len(patterns)]
        ids = {column: name + table[column].str.slice(len("SLIDE")) for column in ("tile_id", "parent_id")}
        write_parquet(folder / "results" / "tile" / f"{name}.parquet", table.assign(slide_id=name, **ids))


def measure(command: list[str], threads: int = 1) -> str:
    """Wall and processor seconds of a child process and those that it starts, and the memory of the largest, as text."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    granted = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=granted)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # the peak is the largest so far: small children run first
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{seconds:6.1f} s ({busy:.1f} s of processor time), peak {after.ru_maxrss / 2**20:.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2, help="processes of the stage")
    parser.add_argument("--uncapped", action="store_true", help="select every usable tile")
    parser.add_argument(
        "--folder", type=Path, help="where the cohort is made, or was made before; else a temporary folder"
    )
    args = parser.parse_args()
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="mad-selection-"))).resolve()
    try:
        if not (folder / "slides.tsv").exists():
            start = time.perf_counter()
            write_cohort(folder, args.slides)
            print(f"cohort of {args.slides} slides written in {time.perf_counter() - start:.1f} s")
        config = {
            "results": str(folder / "results"),
            "cohort": {"sheet": str(folder / "slides.tsv")},
            "tile": {"tile_px": 224},
            "label": {"classes": CLASSES},
            "sample": {} if args.uncapped else CAPS,
        }
        write_json(folder / "config.json", config)
        settings = str(folder / "config.json")
        snakemake = [
            sys.executable,
            "-m",
            "snakemake",
            "--cores",
            "1",
            "--dry-run",
            "--quiet",
            "--configfile",
            settings,
        ]
        print("dry run:", measure(snakemake))
        print("sample: ", measure([sys.executable, "-m", "mad", "sample", "--config", settings], args.threads))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
