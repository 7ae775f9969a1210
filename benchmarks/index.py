"""Memory and time of the index that every process of a training holds of its cohort's shard tables.

    python benchmarks/index.py [--slides 200] [--pairs 150] [--folder FOLDER]

Writes the shard tables of that many slides, each of as many pairs of either transition (17 rows a pair) and half as many tiles
alone, 7 in 10 slides of the train split. Then each side in a process of its own: `mad` loads the indexes of train and val, and the
reader of train; `plain` only reads the tables with pandas, keeps the readable rows of these splits and sorts them. No pixels are
made: nothing here reads a tar. With `--folder` the tables are kept and used again.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from mad.files import write_parquet
from mad.stages.shard import COLUMNS, TYPES
from mad.training.index import load_indexes
from mad.training.tile_reader import TileReader

LADDER = (2.5, 10.0, 40.0)
SPLITS = ("train", "val")


def table(slide: str, split: str, pairs: int, rng: np.random.Generator) -> pd.DataFrame:
    """A slide's shard table, without pixels behind it."""
    rows = []
    for level, (coarse, fine) in enumerate(pairwise(LADDER)):
        for n in range(pairs):
            parent, kind = f"{slide}_L{level}_0_{n}" + "_0" * level, f"{coarse:g}x-{fine:g}x"
            child = parent.replace(f"_L{level}_", f"_L{level + 1}_")
            rows.append((parent, kind, "parent", parent, -1, split, coarse))
            rows += [(f"{child}_{k}", kind, "child", parent, k, split, fine) for k in range(16)]
    alone = [f"{slide}_L2_1_{n}_0_0" for n in range(pairs // 2)]
    rows += [(tile, "40x", "standalone", tile, -1, split, 40.0) for tile in alone]
    named, digests = pd.DataFrame(rows, columns=COLUMNS[:7]), rng.bytes(32 * len(rows)).hex()
    sizes = rng.integers(8000, 30000, len(rows))
    return named.assign(
        shard=[f"{slide}/{split}-{kind}-000000.tar" for kind in named["kind"]], offset=np.cumsum(sizes), size=sizes,
        sha256=[digests[64 * n :][:64] for n in range(len(rows))], status="ok", blur=rng.uniform(50, 500, len(rows)),
    )[COLUMNS].astype(TYPES)  # fmt: skip


def mad(folder: Path) -> object:
    """What a training process holds."""
    indexes = load_indexes(folder, SPLITS, 4)
    return indexes, TileReader(indexes["train"], 224)


def plain(folder: Path) -> object:
    """The rows of both splits in a table of pandas, in order."""
    columns = [name for name in COLUMNS if name != "blur"]
    tables = [
        pd.read_parquet(path, columns=columns).assign(slide=path.stem) for path in sorted(folder.glob("*.parquet"))
    ]
    rows = pd.concat(tables, ignore_index=True)
    rows = rows[rows["split"].isin(SPLITS) & (rows["status"] == "ok")]
    return rows.sort_values(["split", "kind", "sample_id", "position"], ignore_index=True)


def held() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(side: Callable[[Path], object], folder: Path) -> tuple[float, float, float]:
    """Seconds of processor time, bytes more than before that are held at the end, and at most."""
    before, start = held(), time.process_time()
    kept = side(folder)
    seconds, after = time.process_time() - start, held()
    del kept
    return seconds, after - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=150, help="of either transition, a slide")
    parser.add_argument("--folder", type=Path, help="keeps the tables; in a temporary folder without it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, rng = args.folder or Path(temporary), np.random.default_rng(0)
        for n in range(args.slides):
            slide = f"SLIDE-{n:05d}-01Z-00-DX1"
            split = "train" if n % 10 < 7 else "val" if n % 10 == 7 else "test"
            if not (folder / f"{slide}.parquet").exists():
                write_parquet(folder / f"{slide}.parquet", table(slide, split, args.pairs, rng))
        rows = sum(len(index.rows) for index in load_indexes(folder, SPLITS, 4).values())
        print(f"{args.slides} slides, {rows} rows of {' and '.join(SPLITS)}")
        for side in (mad, plain):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seconds, after, peak = pool.submit(measure, side, folder).result()
            print(
                f"{side.__name__:<6} {seconds:6.1f} s of processor time, {after / 2**30:.2f} GiB held, {peak / 2**30:.2f} at most"
            )


if __name__ == "__main__":
    main()
