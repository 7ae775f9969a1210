"""Reading and rasterising label masks, and 100,000 cells as QuPath GeoJSON and ImageScope XML, against loops over them.

    python benchmarks/annotations.py [--polygons 100000] [--repeats 3] [--size 40000 30000]

The slide has `--size` px at 0.25 um/px, a cell some 20 vertices, the class raster 2 um per cell. The rasters are timed
in one process, alternating: ours (exact: the class at a cell's centre), `cv2.fillPoly` per polygon (which also paints the
border), `skimage.draw.polygon` per polygon. Prints medians, polygons per second, the ratios, and in how many raster cells
each differs from ours. Masks have one pixel per pixel of the slide, 1.2 GB unless `--size` says otherwise; printed is by how
much they raise the peak of memory.
"""

import argparse
import gzip
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pyvips
import shapely
import skimage.draw

from mad.slides.annotations import Region, open_mask, read_annotation
from mad.tiles.labels import NO_CLASS, class_raster, mask_raster, raster_shape
from mad.tiles.pyramid import Grid, Ladder

CLASSES = ["Tumour", "Stroma", "Lymphocyte"]
CELLS = 28


def cell_outlines(grid: Grid, num_polygons: int, num_vertices: int = 20) -> np.ndarray:
    """Round cells of 4 to 8 um radius: level-0 px, [polygons, vertices, 2]."""
    rng = np.random.default_rng(0)
    centre = rng.uniform((100, 100), (grid.width - 100, grid.height - 100), (num_polygons, 1, 2))
    angle = np.linspace(0, 2 * np.pi, num_vertices, endpoint=False)
    radius = rng.uniform(16, 32, (num_polygons, 1, 1)) * rng.uniform(0.9, 1.1, (num_polygons, num_vertices, 1))
    return np.round(centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1), 2)


def write_geojson(path: Path, outlines: np.ndarray) -> None:
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*outline, outline[0]]]},
            "properties": {"objectType": "annotation", "classification": {"name": CLASSES[n % len(CLASSES)]}},
        }
        for n, outline in enumerate(outlines.tolist())
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def write_imagescope(path: Path, outlines: np.ndarray) -> None:
    with path.open("w") as file:
        file.write("<Annotations>")
        for number, name in enumerate(CLASSES):
            file.write(f'<Annotation Name="{name}"><Regions>')
            for outline in outlines[number :: len(CLASSES)].tolist():
                vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in outline)
                file.write(f'<Region Type="0" NegativeROA="0"><Vertices>{vertices}</Vertices></Region>')
            file.write("</Regions></Annotation>")
        file.write("</Annotations>")


def loop(regions: Sequence[Region], grid: Grid, draw: Callable[[np.ndarray, np.ndarray, int], None]) -> np.ndarray:
    """The class raster polygon by polygon; `draw` gets vertices in raster cells, centres at whole numbers."""
    raster = np.full(raster_shape(grid, CELLS), NO_CLASS, np.uint8)
    for number in reversed(range(len(CLASSES))):
        for region in regions:
            if region.name == CLASSES[number]:
                for polygon in shapely.get_parts(region.geometry):
                    draw(raster, shapely.get_coordinates(polygon) * CELLS / grid.finest_px - 0.5, number)
    return raster


def draw_cv2(raster: np.ndarray, points: np.ndarray, number: int) -> None:
    cv2.fillPoly(raster, [np.round(points * 64).astype(np.int32)], number, cv2.LINE_8, 6)


def draw_skimage(raster: np.ndarray, points: np.ndarray, number: int) -> None:
    rows, columns = skimage.draw.polygon(points[:, 1], points[:, 0], raster.shape)
    raster[rows, columns] = number


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_masks(folder: Path, grid: Grid) -> None:
    small = np.random.default_rng(0).integers(0, 4, (grid.height // 500, grid.width // 500)).astype(np.uint8)
    image = pyvips.Image.new_from_array(small).zoom(500, 500)
    image.tiffsave(str(folder / "tiled.tif"), tile=True, tile_width=512, tile_height=512, compression="deflate")
    image.tiffsave(str(folder / "bare.tif"))
    image.pngsave(str(folder / "grey.png"), compression=1)
    pyvips.cache_set_max(0)
    values = dict(enumerate(CLASSES, start=1))
    for name in ("tiled.tif", "bare.tif", "grey.png"):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        taken = seconds(
            lambda name=name: mask_raster(
                open_mask(folder / name, (grid.width, grid.height)), values, CLASSES, grid, CELLS
            )
        )
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(
            f"mask {name:14} {taken:6.2f} s  {grid.width * grid.height / taken / 1e6:9,.0f} Mpx/s       peak memory +{more:.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--polygons", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=(40_000, 30_000), help="of the slide, multiples of 500 px")
    args = parser.parse_args()
    grid = Grid(Ladder((2.5, 10.0, 40.0)), 224.0, *args.size)
    with tempfile.TemporaryDirectory() as folder:
        time_masks(Path(folder), grid)
    outlines = cell_outlines(grid, args.polygons)
    with tempfile.TemporaryDirectory() as folder:
        plain, packed, markup = (Path(folder) / name for name in ("a.geojson", "a.geojson.gz", "a.xml"))
        write_geojson(plain, outlines)
        packed.write_bytes(gzip.compress(plain.read_bytes(), 5))
        write_imagescope(markup, outlines)
        for path in (plain, packed, markup):
            median = statistics.median(seconds(lambda path=path: read_annotation(path)) for _ in range(args.repeats))
            size = path.stat().st_size / 1e6
            print(f"read {path.name:14} {median:6.2f} s  {args.polygons / median:9,.0f} polygons/s  {size:.0f} MB")
        regions = read_annotation(plain).regions
    ways: dict[str, Callable[[], np.ndarray]] = {
        "mad": lambda: class_raster(regions, CLASSES, grid, CELLS),
        "cv2 loop": lambda: loop(regions, grid, draw_cv2),
        "skimage loop": lambda: loop(regions, grid, draw_skimage),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            times[name].append(seconds(way))
    ours, exact = statistics.median(times["mad"]), ways["mad"]()
    for name, way in ways.items():
        median, other = statistics.median(times[name]), way()
        print(
            f"raster {name:12} {median:6.2f} s  {args.polygons / median:9,.0f} polygons/s  {median / ours:5.1f} x mad's time; "
            f"covers {(other != NO_CLASS).sum():,} cells, {(other != exact).sum():,} unlike mad's"
        )


if __name__ == "__main__":
    main()
