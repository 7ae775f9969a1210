"""Label masks: every way a PNG or TIFF stores them, and the same labels as the polygons that they were drawn from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import pyvips
import shapely
import tifffile
from PIL import Image, ImageDraw
from shapely.geometry import Polygon

from mad.config import parse_config
from mad.config.model import LabelConfig
from mad.files import MadError, read_json, read_parquet
from mad.slides.annotations import LabelMask, Region, mask, open_mask, read_annotation
from mad.slides.sheet import SlideRow
from mad.stages import tile
from mad.tiles.annotated import annotated_raster
from mad.tiles.labels import NO_CLASS, class_counts, class_raster, mask_raster
from mad.tiles.pyramid import Grid, Ladder

SIZE = (1640, 1200)
CLASSES = ["A", "B", "C"]
VALUES = np.random.default_rng(0).integers(0, 4, (30, 41)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
WIDE = VALUES.astype(np.uint16) * 300


def write_png(path: Path, values: np.ndarray, palette: bool = False, **options: object) -> None:
    image = Image.fromarray(values, mode="P") if palette else Image.fromarray(values)
    if palette:
        image.putpalette([7] * 768)  # every value of the same colour: only the index tells them apart
    image.save(path, **options)


def write_pyramid(path: Path, values: np.ndarray) -> None:
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(values, tile=(64, 64), compression="lzw", subifds=1)
        file.write(values[::2, ::2] + 9, tile=(64, 64), compression="lzw", subfiletype=1)
        file.write(values[::4, ::4] + 5, tile=(64, 64), compression="lzw", subfiletype=1)


WRITERS = {
    "grey.png": lambda path: write_png(path, VALUES),
    "uint16.png": lambda path: write_png(path, WIDE),
    "bits.png": lambda path: write_png(path, VALUES > 1),
    "palette.png": lambda path: write_png(path, VALUES, palette=True),
    "two-bit palette.png": lambda path: write_png(path, VALUES, palette=True, bits=2),
    "transparent.png": lambda path: write_png(path, VALUES, transparency=0),
    "palette.tif": lambda path: write_png(path, VALUES, palette=True),
    "bits.tif": lambda path: tifffile.imwrite(path, VALUES > 1, tile=(64, 64), photometric="minisblack"),
    "tiled.tif": lambda path: tifffile.imwrite(path, VALUES, tile=(64, 64), compression="deflate"),
    "predictor.tiff": lambda path: tifffile.imwrite(path, WIDE, tile=(64, 64), compression="lzw", predictor=True),
    "strips.TIF": lambda path: tifffile.imwrite(path, VALUES, compression="zstd", rowsperstrip=7),
    "bare.tif": lambda path: tifffile.imwrite(path, VALUES),
    "big endian.tif": lambda path: tifffile.imwrite(path, WIDE.astype(">u2"), byteorder=">"),
    "pyramid.tif": lambda path: write_pyramid(path, VALUES),
    "libvips.tif": lambda path: pyvips.Image.new_from_array(VALUES).tiffsave(str(path), tile=True, pyramid=True),
}


def whole(found: LabelMask) -> np.ndarray:
    """All blocks put together; fails where they overlap or leave a gap."""
    values = np.full((found.height, found.width), -1)
    for top, left, block in found.blocks():
        place = values[top : top + block.shape[0], left : left + block.shape[1]]
        assert place.shape == block.shape and (place == -1).all() and block.dtype in (np.uint8, np.uint16)
        place[:] = block
    assert (values >= 0).all()
    return values


@pytest.mark.parametrize("name", WRITERS)
def test_every_storage_gives_the_stored_values(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask, "BLOCK_PX", 10_000)
    WRITERS[name](tmp_path / name)
    found = open_mask(tmp_path / name, SIZE)
    assert (found.width, found.height, found.downsample) == (410, 300, (4, 4))
    expected = VALUES > 1 if name.startswith("bits") else WIDE if name in ("uint16.png", "predictor.tiff") else VALUES
    np.testing.assert_array_equal(whole(found), WIDE if name.startswith("big endian") else expected)


def test_tiles_that_a_sparse_tiff_does_not_store_are_unannotated(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    values = np.zeros((256, 256), np.uint8)
    values[:64, :64] = 3
    tifffile.imwrite(path, values, tile=(64, 64), compression="deflate")
    with tifffile.TiffFile(path, mode="r+") as file:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = file.pages[0].tags[name]
            tag.overwrite((tag.value[0], *[0] * (len(tag.value) - 1)))
    np.testing.assert_array_equal(whole(open_mask(path, (256, 256))), values)


@pytest.mark.parametrize("downsample", [1, 4, 7.3])
@pytest.mark.parametrize(
    "grid",
    [
        Grid(Ladder((2.5, 10.0, 40.0)), 112.0, 2003, 1901),
        Grid(Ladder((10.0, 40.0)), 91.37, 2003, 1901),
        Grid(Ladder((10.0, 40.0)), 112.0, 1403, 1501, left=400, top=208),
    ],
    ids=["own grid", "micrometre grid", "bounds"],
)
def test_a_mask_of_polygons_labels_tiles_as_the_polygons_do(tmp_path: Path, grid: Grid, downsample: float) -> None:
    """Where no border passes within a mask pixel of a cell's centre all is equal; tile shares differ by such cells at most."""
    size, cells = (2003, 1901), 14
    areas = {
        "A": shapely.Point(900, 800).buffer(500),
        "B": Polygon([(50, 1000), (1900, 700), (1990, 1890), (400, 1700)]),
    }
    areas["B"] -= shapely.box(1300, 1200, 1600, 1500)
    columns, rows = (round(side / downsample) for side in size)
    x = (np.arange(columns) + 0.5) * size[0] / columns
    y = (np.arange(rows) + 0.5) * size[1] / rows
    values = np.zeros((rows, columns), np.uint8)
    for value, name in ((20, "B"), (10, "A")):
        values[shapely.contains_xy(areas[name], *np.meshgrid(x, y))] = value
    tifffile.imwrite(tmp_path / "a.tif", values, tile=(256, 256), compression="deflate")

    found = open_mask(tmp_path / "a.tif", size)
    raster, num_px = mask_raster(found, {10: "A", 20: "B"}, CLASSES, grid, cells)
    assert num_px == dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))
    reference = class_raster([Region(name, area) for name, area in areas.items()], CLASSES, grid, cells)
    step = grid.finest_px / cells
    points = np.meshgrid(
        grid.left + (np.arange(raster.shape[1]) + 0.5) * step, grid.top + (np.arange(raster.shape[0]) + 0.5) * step
    )
    on_slide = (points[0] < size[0]) & (points[1] < size[1])
    border = shapely.union_all([shapely.boundary(area) for area in areas.values()])
    near = shapely.distance(border, shapely.points(*points)) <= 0.75 * downsample
    np.testing.assert_array_equal(raster[on_slide & ~near], reference[on_slide & ~near])
    assert (raster[~on_slide] == NO_CLASS).all() and near.mean() < 0.05
    shares, expected = (class_counts(found, 3, cells) / cells**2 for found in (raster, reference))
    loose = class_counts(np.where(near | ~on_slide, 0, NO_CLASS).astype(np.uint8), 1, cells) / cells**2
    assert (np.abs(shares - expected) <= loose + 1e-9).all() and shares[..., :2].max() == 1


@pytest.mark.parametrize("downsample", [1, 3])
def test_centre_sampling_errs_little_against_counting_every_pixel(tmp_path: Path, downsample: int) -> None:
    """A tile's shares from cells' centres against the mask's pixels counted one by one; 14 x 14 cells."""
    grid = Grid(Ladder((10.0, 40.0)), 84.0, 1344, 1344)
    rng = np.random.default_rng(3)
    smooth = np.array(Image.fromarray(rng.normal(size=(24, 24)).astype(np.float32)).resize((1344, 1344), 3))
    values = np.digitize(smooth, [-0.5, 0, 0.5]).astype(np.uint8)[::downsample, ::downsample]
    write_png(tmp_path / "a.png", values)
    raster, _ = mask_raster(open_mask(tmp_path / "a.png", (1344, 1344)), {1: "A", 2: "B", 3: "C"}, CLASSES, grid, 14)
    shares = class_counts(raster, 3, 14) / 14**2
    side = 84 // downsample
    for number in range(3):
        exact = (values == number + 1).reshape(16, side, 16, side).mean(axis=(1, 3))
        error = np.abs(shares[..., number] - exact)
        assert error.max() < 0.05 and error.mean() < 0.012


def test_the_tile_stage_reads_masks(tmp_path: Path, slides: Path) -> None:
    """A synthetic slide with its polygons, and with those drawn into a palette PNG by Pillow: the same tile labels."""
    values = {1: "Gray Matter", 2: "White Matter", 3: "Leptomeninges", 4: "Superficial Cortex"}
    picture = Image.new("P", (896, 896))
    picture.putpalette(range(240))  # Pillow stores as many bits as the palette has colours
    for region in reversed(read_annotation(slides / "S01.geojson").regions):
        (value,) = (value for value, name in values.items() if name == region.name)
        (polygon,) = region.geometry.geoms
        stencil = Image.new("1", picture.size)
        for number, ring in enumerate([polygon.exterior, *polygon.interiors]):
            ImageDraw.Draw(stencil).polygon([(x / 2, y / 2) for x, y in ring.coords], number == 0)
        picture.paste(value, mask=stencil)
    picture.save(tmp_path / "S01.png")
    facts, labels = {}, {}
    for kind, path in {"polygons": slides / "S01.geojson", "mask": tmp_path / "S01.png"}.items():
        options = {"results": str(tmp_path / kind), "tile": {"tile_px": 112}, "label": {"mask_values": values}}
        row = SlideRow("S01", str(slides / "S01.tiff"), "P1", annotation=str(path))
        tile.run(parse_config(options), row)
        facts[kind] = read_json(tmp_path / kind / "tile" / "S01.json")
        labels[kind] = read_parquet(tmp_path / kind / "tile" / "S01.parquet")
    assert facts["mask"]["annotation"]["downsample"] == [2, 2] and facts["mask"]["cause"] is None
    assert set(facts["mask"]["annotation"]["pixels"]) == set(facts["polygons"]["annotation"]["areas"])
    same = labels["mask"]["label"].fillna("") == labels["polygons"]["label"].fillna("")
    assert same.mean() > 0.98 and labels["mask"]["label"].nunique() >= 3
    for name in values.values():
        assert np.abs(labels["mask"][f"share_{name}"] - labels["polygons"][f"share_{name}"]).mean() < 0.01


def config(**options: object) -> LabelConfig:
    return LabelConfig(classes=CLASSES, background=None, **options)  # type: ignore[arg-type]


def test_values_are_classes_and_unlisted_ones_are_told(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", VALUES)
    grid = Grid(Ladder((10.0, 40.0)), 40.0, *SIZE)
    frame = {"bounds": (0, 0, *SIZE), "size": SIZE}
    label = config(mask_values={1: "B", 3: "A"}, rename={"A": "C"})  # rename is for names in files: a mask has none
    raster, facts, warnings = annotated_raster(tmp_path / "a.png", label, grid, 10, **frame)  # type: ignore[arg-type]
    np.testing.assert_array_equal(raster[:300, :410], np.array([NO_CLASS, 1, NO_CLASS, 0])[VALUES])
    assert facts is not None and facts["kind"] == "mask" and facts["downsample"] == [4, 4]
    assert facts["pixels"] == {"A": (VALUES == 3).sum(), "B": (VALUES == 1).sum()}
    assert facts["unknown"] == {"2": (VALUES == 2).sum()}
    assert warnings == [
        f"mask values not in label.mask_values, left out (pixels): {{'2': {(VALUES == 2).sum()}}}; give each its class there"
    ]
    listed = config(mask_values={0: "C", 1: "B", 2: "B", 3: "A"})
    raster, facts, warnings = annotated_raster(tmp_path / "a.png", listed, grid, 10, **frame)  # type: ignore[arg-type]
    np.testing.assert_array_equal(raster[:300, :410], np.array([2, 1, 1, 0])[VALUES])
    assert not warnings and facts is not None and facts["unknown"] == {}


def test_the_configuration_refuses_classes_and_values_that_do_not_exist() -> None:
    assert config(mask_values={"1": "A"}).mask_values == {1: "A"}  # JSON has no other keys
    for values in ({1: "D"}, {-1: "A"}, {65536: "A"}, {"one": "A"}):
        with pytest.raises(ValueError, match="mask_values"):
            config(mask_values=values)


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        ((1640, 1200), True),
        ((1643, 1199), True),  # 410.75 x 299.75: rounded down and up
        ((410, 300), True),
        ((1640, 1213), False),
        ((1200, 1640), False),
        ((205, 150), False),  # finer than the slide
    ],
)
def test_the_mask_has_the_shape_of_the_slide(tmp_path: Path, size: tuple[int, int], fits: bool) -> None:
    write_png(tmp_path / "a.png", VALUES)
    if fits:
        assert open_mask(tmp_path / "a.png", size).width == 410
    else:
        with pytest.raises(MadError, match=rf"a.png: the mask has 410 x 300 px, the slide {size[0]} x {size[1]}"):
            open_mask(tmp_path / "a.png", size)


@pytest.mark.parametrize(
    ("name", "pixels", "options", "cause"),
    [
        ("a.png", np.stack([VALUES] * 3, -1), {}, "its pixels are RGB;"),
        ("a.png", np.stack([VALUES] * 4, -1), {}, "its pixels are RGB and alpha"),
        ("a.png", np.stack([VALUES] * 2, -1), {}, "its pixels are grey and alpha"),
        ("a.tif", np.stack([VALUES] * 3, -1), {}, r"it has 3 channel\(s\), RGB"),
        ("a.tif", VALUES.astype(np.float32), {}, "its pixels are float32"),
        ("a.tif", VALUES.astype(np.int16), {}, "its pixels are int16"),
        ("a.tif", VALUES, {"compression": "jpeg"}, "JPEG may blur"),
        ("a.tif", VALUES, {"compression": "jpeg2000"}, "JPEG2000 may blur"),
        ("a.tif", VALUES, {"photometric": "miniswhite"}, "MINISWHITE"),
        ("a.tif", VALUES, {"compression": "zstd", "rowsperstrip": 300}, "one compressed strip of 410 x 300 px"),
    ],
)
def test_other_images_are_refused_by_name(
    tmp_path: Path, name: str, pixels: np.ndarray, options: dict, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask, "MAX_SEGMENT_BYTES", 100_000)
    (write_png if name == "a.png" else tifffile.imwrite)(tmp_path / name, pixels, **options)
    with pytest.raises(MadError, match=f"{name}: no label mask: .*{cause}.*save it with one uint8 or uint16"):
        open_mask(tmp_path / name, SIZE)


@pytest.mark.parametrize("name", ["grey.png", "tiled.tif", "bare.tif", "uint16.png"])
@pytest.mark.parametrize("damage", ["empty", "text", "head", "half"])
def test_damaged_masks_are_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"a mask?", "head": data[:20], "half": data[: len(data) // 2]}[damage])
    with pytest.raises(MadError, match=rf"{name}: (no PNG or TIFF|the mask's pixels cannot be decoded).*export"):
        whole(open_mask(path, SIZE))


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("folder.png", "pipe.png", "none.tif"):
        with pytest.raises(MadError, match=f"{name}: no .*; mend its `annotation` in the cohort sheet"):
            open_mask(tmp_path / name, SIZE)
