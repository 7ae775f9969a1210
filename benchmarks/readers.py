"""Reading a slide's footprints: our TIFF reader against OpenSlide and libvips, in one process, alternating.

    python benchmarks/readers.py results/synthetic/S01.tiff [--side 1792] [--repeats 5]

Prints the median time per footprint (a coarsest tile's area at level 0) of each reader and the ratios, and checks that all
give the same pixels within the codecs' rounding.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import pyvips

from mad.slides.readers import OpenSlideReader, open_slide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide")
    parser.add_argument("--side", type=int, default=1792, help="side of a footprint in level-0 pixels")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    pyvips.cache_set_max(0)
    ours, plain = open_slide(args.slide), OpenSlideReader(args.slide)
    width, height = ours.level_dimensions[0]
    places = [
        (x, y) for y in range(0, height - args.side + 1, args.side) for x in range(0, width - args.side + 1, args.side)
    ]
    region = pyvips.Region.new(pyvips.Image.tiffload(args.slide)[:3])

    def libvips(x: int, y: int) -> np.ndarray:
        return np.frombuffer(region.fetch(x, y, args.side, args.side), np.uint8).reshape(args.side, args.side, 3)

    readers: dict[str, Callable[[int, int], np.ndarray]] = {
        f"mad ({type(ours).__name__})": lambda x, y: ours.read(0, x, y, args.side, args.side),
        "OpenSlide": lambda x, y: plain.read(0, x, y, args.side, args.side),
        "libvips": libvips,
    }
    first = [read(*places[0]).astype(int) for read in readers.values()]
    worst = max(int(np.abs(first[0] - other).max()) for other in first[1:])
    if ours.profile:
        srgb = open_slide(args.slide, "apply")
        readers["mad, ICC applied"] = lambda x, y: srgb.read(0, x, y, args.side, args.side)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(args.repeats):
        for name, read in readers.items():
            start = time.perf_counter()
            for place in places:
                read(*place)
            seconds[name].append((time.perf_counter() - start) / len(places))
    base = statistics.median(seconds["OpenSlide"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:18} {1000 * median:8.1f} ms per footprint  {base / median:5.2f} x OpenSlide")
    print(f"{len(places)} footprints of {args.side} px, {args.repeats} repeats; largest difference of a pixel: {worst}")


if __name__ == "__main__":
    main()
