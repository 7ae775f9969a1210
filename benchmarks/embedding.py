"""Tiles per second from shards to embeddings: `mad embed` against a plain loop of PIL, torchvision and timm.

    python benchmarks/embedding.py --results results [--model vit_small_patch16_224] [--tiles 512] [--rounds 5] [--threads 1]

Both sides read the same tiles from the same tars by offset and run the same architecture with random weights. They take turns in
one process; ratios are medians over the rounds. `plain` decodes one image after the other with Pillow, makes it a tensor and
normalises it with torchvision, and runs batches of 64 in fp32; `plain-bf16` the same under autocast. `share` is the network's
products per second over the measured rate of a large bf16 product.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from training import matmul_rate

from mad.config.encoders import EncoderConfig
from mad.config.training import BackboneConfig
from mad.files import read_json, read_parquet
from mad.models.embedding import CPU_BATCH, embed_tiles
from mad.models.encoders import TimmEncoder
from mad.models.vit import build_backbone, mean_std
from mad.tiles.shards import decode, read_member


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--tiles", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tile_px = read_json(arguments.results / "config.json")["tile"]["tile_px"]
    places = tile_places(arguments.results / "shard", arguments.tiles)
    model = build_backbone(BackboneConfig(model=arguments.model), tile_px).eval()
    encoder = TimmEncoder(model, EncoderConfig(name="e", spec="timm:e"), tile_px)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*mean_std(model))])
    shards = arguments.results / "shard"

    def ours() -> np.ndarray:
        return embed_tiles(encoder, (decode(read_member(shards, *place)) for place in places), None, "embed")

    def plain(dtype: torch.dtype) -> np.ndarray:
        parts = []
        for start in range(0, len(places), CPU_BATCH):
            read = [read_member(shards, *place) for place in places[start : start + CPU_BATCH]]
            images = torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in read])
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                parts.append(model(images.to(device)).float().cpu().numpy())
        return np.concatenate(parts)

    sides: dict[str, Callable[[], np.ndarray]] = {
        "mad": ours, "plain": lambda: plain(torch.float32), "plain-bf16": lambda: plain(torch.bfloat16),
    }  # fmt: skip
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, tile_px, tile_px, device=device))
    flops = counter.get_total_flops() * len(places)
    vectors = {name: side() for name, side in sides.items()}
    worst = cosine(vectors["mad"], vectors["plain"]).min()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - begin)
    rate = matmul_rate(device)
    print(
        f"{arguments.model}, {len(places)} tiles of {tile_px} px, {device}, {encoder.audit['dtype']}, {arguments.threads} threads"
    )
    for name, seconds in times.items():
        ratio = statistics.median(mine / other for mine, other in zip(seconds, times["mad"], strict=True))
        median = statistics.median(seconds)
        share = flops / median / rate
        print(f"  {name:10} {len(places) / median:8.1f} tiles/s, share {share:.2f}; mad is {ratio:.2f} x as fast")
    print(f"  least cosine of the embeddings of mad and plain: {worst:.5f}")


def tile_places(folder: Path, count: int) -> list[tuple[str, int, int]]:
    """Tar, offset and size of the first `count` distinct tiles."""
    places: list[tuple[str, int, int]] = []
    for path in sorted(folder.glob("*.parquet")):
        table = read_parquet(path)
        table = table[table["status"] == "ok"].drop_duplicates("tile_id")
        places += list(table[["shard", "offset", "size"]].itertuples(index=False, name=None))
    return places[:count]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of corresponding rows."""
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


if __name__ == "__main__":
    main()
