"""Tiles/s of the loaders against the bare decode of the very images that they use.

    python benchmarks/loader.py [--results results] [--batch 32] [--steps 10] [--rounds 25]

For a MAD batch (a parent and 4 of its 16 children per sample) and a DINOv2 batch (one of these five tiles): `decode` decodes the
images from memory with the loader's own decoder, `loader` draws, reads, checks, decodes and collates them without making views,
`views` makes the augmented views as well, `stream` does what `loader` does with tars read end to end (`loader: stream`; as many
other images). All run in this process with one thread, and alternate; medians over the rounds, of the shares too. Shares of the
processor's time stand beside those of wall time: they say more where other work runs on the machine.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch

from mad.config import load_config
from mad.config.training import RunConfig
from mad.tiles.shards import decode
from mad.training import views
from mad.training.data import TrainingSet, batches
from mad.training.index import load_index
from mad.training.stream import StreamSet
from mad.training.views import Views


def plain_pair(parent, children, config, rng, tiles, cells):
    """`views.pair_views` without making views."""
    return Views("pair", [parent], children, [], tiles)


def plain_multicrop(tile, crops, local_px, config, rng, tile_id):
    """`views.multicrop_views` without making views."""
    return Views("multicrop", [tile], None, [], (tile_id,))


def images_of(data: TrainingSet) -> list[bytes]:
    """The encoded images that an epoch of `batches` reads, in this order."""
    with mock.patch.object(data.reader, "read", wraps=data.reader.read) as read:
        consume(data)
    rows = data.index.rows.loc[[call.args[0] for call in read.call_args_list], ["shard", "offset", "size"]]
    found = []
    for shard, offset, size in rows.itertuples(index=False):
        with (data.index.folder / shard).open("rb") as file:
            file.seek(offset)
            found.append(file.read(size))
    return found


def decode_all(encoded: list[bytes]) -> None:
    """Decode every image and let it go."""
    for image in encoded:
        decode(image)


def consume(data: TrainingSet) -> None:
    """Read every batch of the run."""
    for _ in batches(data, start=0, rank=0, world=1, workers=0):
        pass


def consume_plain(data: TrainingSet) -> None:
    """Read every batch of the run without making views."""
    with mock.patch.multiple(views, pair_views=plain_pair, multicrop_views=plain_multicrop):
        consume(data)


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time of one call."""
    wall, own = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="of a finished stage `shard`")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    tile_px = load_config(args.results / "config.json").tile.tile_px
    for method in ("mad", "dinov2"):
        lengths = {"steps": args.steps, "batch": args.batch, "warmup": 0, "freeze_last_layer": 0}
        run = RunConfig(name=method, method=method, mix={"10x-40x": 1}, seed=0, **lengths)
        index = load_index(args.results / "shard", "train", run.children)
        data, stream = (kind(index, run, tile_px, round(tile_px * 3 / 7), 0) for kind in (TrainingSet, StreamSet))
        consume(stream)  # fills its buffer
        stream.begin = lambda step, rank: None
        encoded = images_of(data)
        actions = {
            "decode": lambda encoded=encoded: decode_all(encoded),
            "loader": lambda data=data: consume_plain(data),
            "views": lambda data=data: consume(data),
            "stream": lambda stream=stream: consume_plain(stream),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
        for _ in range(args.rounds):
            for name, action in actions.items():
                times[name].append(seconds(action))
        size = sum(map(len, encoded)) / len(encoded) / 1e3
        print(f"{method}: {len(encoded)} tiles of {tile_px} px, {size:.1f} kB each")
        for name, found in times.items():
            rate = len(encoded) / np.median(found, axis=0)[0]
            wall, own = 100 * np.median(np.array(times["decode"]) / np.array(found), axis=0)
            print(f"  {name:<7} {rate:8.0f} tiles/s  {wall:4.0f} % of decode, {own:4.0f} % by processor time")


if __name__ == "__main__":
    main()
