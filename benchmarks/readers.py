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

from mad.slides.readers import OpenSlideReader, Reader, open_slide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide")
    parser.add_argument("--side", type=int, default=1792, help="side of a footprint in level-0 pixels")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    pyvips.cache_set_max(0)
    with open_slide(args.slide) as slide:
        (width, height), profile, name = slide.level_dimensions[0], slide.profile, type(slide).__name__
    places = [
        (x, y) for y in range(0, height - args.side + 1, args.side) for x in range(0, width - args.side + 1, args.side)
    ]

    def libvips() -> Callable[[int, int], np.ndarray]:
        region = pyvips.Region.new(pyvips.Image.tiffload(args.slide)[:3])
        shape = (args.side, args.side, 3)
        return lambda x, y: np.frombuffer(region.fetch(x, y, args.side, args.side), np.uint8).reshape(shape)

    def reading(reader: Reader) -> Callable[[int, int], np.ndarray]:
        return lambda x, y: reader.read(0, x, y, args.side, args.side)

    # Opened anew for every repeat: what one repeat decoded must not be there for the next.
    readers: dict[str, Callable[[], Callable[[int, int], np.ndarray]]] = {
        f"mad ({name})": lambda: reading(open_slide(args.slide)),
        "OpenSlide": lambda: reading(OpenSlideReader(args.slide)),
        "libvips": libvips,
    }
    first = [opened()(*places[0]).astype(int) for opened in readers.values()]
    worst = max(int(np.abs(first[0] - other).max()) for other in first[1:])
    if profile:
        readers["mad, ICC applied"] = lambda: reading(open_slide(args.slide, "apply"))
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(args.repeats):
        for name, opened in readers.items():
            read = opened()
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
