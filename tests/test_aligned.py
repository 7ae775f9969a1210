"""Tile (i, j, k, m) holds exactly its place: shown by slides whose pixels tell their own coordinates."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from conftest import decode_coordinates, write_tiff

from mad.config.model import TileConfig
from mad.files import MadError
from mad.slides.readers import OpenSlideReader, Reader, ReadError, TiffReader, open_slide
from mad.tiles.aligned import AlignedSlide, Footprint, open_aligned
from mad.tiles.index import tile_table
from mad.tiles.pyramid import parse_tile_id

CONFIG = TileConfig(tile_px=112)


def all_tiles(slide: AlignedSlide):  # type: ignore[no-untyped-def]
    """The slide's tile table; tissue and labels do not matter here."""
    rows, columns = slide.grid.level_shape(2)
    counts = np.ones((rows, columns), np.int64)
    return tile_table(
        "S", slide.grid, slide.plan, counts, counts[..., None], (1, 1), ["A"], min_tissue=0.1, min_annotated=0.5
    )


@pytest.mark.parametrize("reader", [OpenSlideReader, TiffReader])
def test_every_tile_of_every_level_holds_its_place(coordinate_slide: Path, reader: type[Reader]) -> None:
    """All tiles of the grid, both readers, cut from the footprint and read alone: each pixel tells the right coordinates."""
    with open_aligned(coordinate_slide, CONFIG) as slide:
        assert isinstance(slide.reader, TiffReader)
        if reader is OpenSlideReader:
            object.__setattr__(slide, "reader", OpenSlideReader(coordinate_slide))
        table = all_tiles(slide)
        assert set(table["status"]) == {"ok", "edge"}
        footprint = lru_cache(slide.footprint)
        checked = 0
        for row in table[table["status"] == "ok"].itertuples():
            index = parse_tile_id(row.tile_id)[1]
            level = len(index) - 2
            downsample = (16, 4, 1)[level]
            for pixels in (slide.tile(index), footprint(level, *index[:2])[slide.place(index)]):
                x, y, from_level = decode_coordinates(pixels)
                assert (x == row.x // downsample + np.arange(112)).all()
                assert (y == row.y // downsample + np.arange(112)[:, None]).all()
                assert (from_level == (2, 1, 0)[level]).all()
            checked += 1
        assert checked > 250


def test_tiles_beyond_the_border_are_edges_and_white_there(coordinate_slide: Path) -> None:
    """1900 px of height are 16.96 finest tiles: the seventeenth row is an edge, and the grid has a second coarse row."""
    with open_aligned(coordinate_slide, CONFIG) as slide:
        table = all_tiles(slide)
        finest = table[table["magnification"] == 40]
        assert slide.grid.shape == (2, 2)
        assert set(finest.loc[finest["y"] == 16 * 112, "status"]) == {"edge"}
        assert (finest["y"] < 1900).all() and (finest["x"] < 2000).all()
        tile = slide.tile((1, 0, 0, 0))
        assert (tile[108:] == 255).all() and not (tile[107] == 255).all()


def test_area_levels_are_exact_averages(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (1792, 1792, 3)).astype(np.uint8)
    write_tiff(tmp_path / "s.tiff", [base], mpp=0.25)
    with open_aligned(tmp_path / "s.tiff", CONFIG.model_copy(update={"pyramid": "area"})) as slide:
        for level, downsample in ((0, 16), (1, 4)):
            side = 1792 // downsample
            exact = base.reshape(side, downsample, side, downsample, 3).mean(axis=(1, 3))
            assert np.abs(slide.footprint(level, 0, 0) - exact).max() <= 0.5 + 1e-6


def test_a_grid_in_micrometres_neither_drifts_nor_shifts(tmp_path: Path) -> None:
    """A 28x scan (0.35 um/px): a fine ramp in x and y is found where the tile's um position says, to half a pixel."""
    height, width = 1800, 2600
    y, x = np.mgrid[:height, :width]
    base = np.stack([x % 256, y % 256, (x // 256) * 16 + y // 256], axis=-1).astype(np.uint8)
    write_tiff(tmp_path / "s.tiff", [base], mpp=0.35)
    config = CONFIG.model_copy(update={"on_missing_scale": "upsample"})
    with open_aligned(tmp_path / "s.tiff", config) as slide:
        assert not slide.plan.keeps_pixel_grid
        side_um = 112 * 1.0  # a 10x tile
        for i, j, k in [(0, 0, 0), (0, 0, 15), (0, 1, 5), (0, 1, 6)]:
            row, column = i * 4 + k // 4, j * 4 + k % 4
            x0, y0, width_px, _ = (int(v) for v in slide.grid.rectangle(1, row, column))
            assert abs(x0 * 0.35 - column * side_um) <= 0.35 / 2 + 1e-9
            assert abs(y0 * 0.35 - row * side_um) <= 0.35 / 2 + 1e-9
            direct = cv2.resize(base[y0 : y0 + width_px, x0 : x0 + width_px], (112, 112), interpolation=cv2.INTER_AREA)
            tile = slide.tile((i, j, k))
            smooth = slice(0, 20)  # away from the ramp's wraps the two agree closely
            assert np.abs(tile[smooth, smooth].astype(int) - direct[smooth, smooth]).mean() < 3


SMOOTH = np.stack([np.mgrid[:900, :1000][1] / 4, np.mgrid[:900, :1000][0] / 4, np.mgrid[:900, :1000].sum(0) / 8], -1)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "jpeg", "compressionargs": {"level": 95}},
        {"compression": "jpeg", "compressionargs": {"level": 95}, "subsampling": (2, 2)},
        {"compression": "jpeg", "compressionargs": {"level": 95, "outcolorspace": "rgb"}},
        {"compression": "lzw"},
        {"compression": None},
        {"compression": "deflate", "predictor": True},
        {"compression": "deflate", "planarconfig": "separate"},
    ],
)
def test_the_fast_reader_agrees_with_openslide(tmp_path: Path, options: dict[str, object]) -> None:
    """RGB and YCbCr JPEG, with and without subsampled chroma, and lossless codecs, and samples in separate planes."""
    pixels = SMOOTH.astype(np.uint8)
    stored = pixels
    if options.get("planarconfig") == "separate":
        stored = np.moveaxis(pixels, -1, 0)
    write_tiff(tmp_path / "s.tiff", [stored], 0.25, **options)
    slide = open_slide(tmp_path / "s.tiff")
    assert isinstance(slide, TiffReader)
    for rectangle in [(0, 0, 300, 200), (777, 600, 400, 400), (-50, -20, 100, 100), (2000, 2000, 8, 8)]:
        a, b = slide.read(0, *rectangle), OpenSlideReader(tmp_path / "s.tiff").read(0, *rectangle)
        assert np.abs(a.astype(int) - b).max() <= 2, rectangle
    assert np.abs(slide.read(0, 0, 0, 200, 200).astype(int) - pixels[:200, :200]).mean() < 6


def test_the_overview_shows_the_whole_grid(coordinate_slide: Path, tmp_path: Path) -> None:
    y, x = np.mgrid[:1500, :1700]
    pixels = np.stack([x * 255 / 1700, y * 255 / 1500, x * 0], axis=-1).astype(np.uint8)
    write_tiff(tmp_path / "s.tiff", [pixels], 0.25)
    with open_slide(tmp_path / "s.tiff") as reader:
        for downsample in (16.0, 15.98, 13.7, 3.0):
            rows, columns = int(1500 / downsample), int(1700 / downsample)
            view = reader.overview(downsample, rows, columns, strip_px=200)
            centre_x, centre_y = (np.arange(columns) + 0.5) * downsample, (np.arange(rows) + 0.5) * downsample
            assert np.abs(view[..., 0].mean(axis=0) - centre_x * 255 / 1700).max() < 2.5
            assert np.abs(view[..., 1].mean(axis=1) - centre_y * 255 / 1500).max() < 2.5


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(MadError, match="no such slide"):
        open_slide(tmp_path / "none.svs")
    (tmp_path / "text.svs").write_text("hello")
    with pytest.raises(MadError, match="no slide that can be read"):
        open_slide(tmp_path / "text.svs")
    write_tiff(tmp_path / "short.tiff", [np.arange(3_000_000, dtype=np.uint8).reshape(1000, 1000, 3)], mpp=0.25)
    whole = (tmp_path / "short.tiff").read_bytes()
    (tmp_path / "short.tiff").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ReadError, match="cut short"):
        open_slide(tmp_path / "short.tiff").read(0, 0, 0, 1000, 1000)
    write_tiff(tmp_path / "noscale.tiff", [np.zeros((600, 600, 3), np.uint8)], mpp=None)
    with pytest.raises(MadError, match="`mpp` column"):
        open_aligned(tmp_path / "noscale.tiff", CONFIG)
    assert open_aligned(tmp_path / "noscale.tiff", CONFIG, mpp=0.25).scale.source == "cohort sheet"


def wipe(data: bytes) -> bytes:
    return bytes(len(data))


def wipe_second_half(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def end_early(data: bytes) -> bytes:
    return data[: len(data) // 3] + b"\xff\xd9" + data[len(data) // 3 + 2 :]


@pytest.mark.parametrize("codec", [{"compression": "deflate"}, {"compression": "jpeg"}])
@pytest.mark.parametrize(
    ("reader", "damage"),  # OpenSlide itself lets some JPEG streams pass whose second half is wiped
    [(OpenSlideReader, wipe), (TiffReader, wipe), (TiffReader, wipe_second_half), (TiffReader, end_early)],
)
def test_damaged_pixels_are_an_error_never_white_and_the_rest_still_reads(
    tmp_path: Path, reader: type[Reader], codec: dict[str, str], damage: Callable[[bytes], bytes]
) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "s.tiff"
    write_tiff(path, [rng.integers(0, 256, (1024, 1024, 3)).astype(np.uint8)], 0.25, **codec)
    with tifffile.TiffFile(path) as file:
        offset, size = file.pages[0].dataoffsets[5], file.pages[0].databytecounts[5]  # tile row 1, column 1
    data = path.read_bytes()
    path.write_bytes(data[:offset] + damage(data[offset : offset + size]) + data[offset + size :])
    slide = open_slide(path) if reader is TiffReader else OpenSlideReader(path)
    assert type(slide) is reader
    with pytest.raises(ReadError, match=r"level 0, 100 x 100 px at \(300, 300\)"):
        slide.read(0, 300, 300, 100, 100)
    assert slide.read(0, 0, 0, 200, 200).std() > 50


def test_a_damaged_overview_level_is_read_from_a_finer_one(tmp_path: Path) -> None:
    path = tmp_path / "s.tiff"
    small = SMOOTH[::4, ::4].astype(np.uint8)
    write_tiff(path, [SMOOTH.astype(np.uint8), small], 0.25)
    with tifffile.TiffFile(path) as file:
        offset, size = file.pages[1].dataoffsets[0], file.pages[1].databytecounts[0]
    data = path.read_bytes()
    whole = open_slide(path).overview(8.0, 100, 120)
    path.write_bytes(data[:offset] + wipe_second_half(data[offset : offset + size]) + data[offset + size :])
    assert np.abs(open_slide(path).overview(8.0, 100, 120).astype(int) - whole).max() <= 3


def test_an_overview_starts_where_the_grid_does(tmp_path: Path) -> None:
    write_tiff(tmp_path / "s.tiff", [SMOOTH.astype(np.uint8)], 0.25)
    with open_slide(tmp_path / "s.tiff") as reader:
        view = reader.overview(10.0, 40, 50, left=230, top=310)
        assert np.abs(view[..., 0].mean(0) - (230 + 10 * np.arange(50) + 4.5) / 4).max() < 1.5
        assert np.abs(view[..., 1].mean(1) - (310 + 10 * np.arange(40) + 4.5) / 4).max() < 1.5


@pytest.mark.parametrize("pyramid", ["scanner", "area"])
def test_tiles_of_a_footprint_are_in_place_and_do_not_depend_on_each_other(tmp_path: Path, pyramid: str) -> None:
    """28x, on the grid in micrometres, as the shards are cut: smooth ramps tell where each tile lies."""
    side, mpp = 2600, 0.357

    def ramp(size: int) -> np.ndarray:
        step = side / size
        at = (np.arange(size) + 0.5) * step
        fraction = np.stack(np.broadcast_arrays(at[None, :] / side, at[:, None] / side, 0.5), axis=-1)
        return np.floor(fraction * 255 + np.random.default_rng(0).random((size, size, 1))).astype(np.uint8)

    write_tiff(tmp_path / "s.tiff", [ramp(side), ramp(side // 4)], mpp=mpp)
    with open_aligned(tmp_path / "s.tiff", TileConfig(tile_px=112, pyramid=pyramid)) as slide:
        assert not slide.plan.keeps_pixel_grid
        last = Footprint(slide, 0, 0).tile((0, 0, 15))
        everything = Footprint(slide, 0, 0)
        for index in [(0, 0), *slide.grid.ladder.children((0, 0))]:
            pixels = everything.tile(index)
            assert pixels is not None
            level, row, column = slide.grid.ladder.position(index)
            exact = slide.grid.finest_px * slide.grid.ladder.span(level)
            middle = np.array([(column + 0.5) * exact, (row + 0.5) * exact])
            found = pixels[..., :2].mean(axis=(0, 1)) / 255 * side
            assert np.abs(found - middle).max() < 5, index  # the ramp rises by 1 in 10 px; the noise averages out
        assert last is not None and np.array_equal(last, everything.tile((0, 0, 15)))


def test_a_long_narrow_slide_does_not_drift(tmp_path: Path) -> None:
    """1003 px shrink to 62: along the short side the level looks 16.18 times smaller. The longer side tells the truth."""
    levels = [np.full((1003 // d, 30000 // d, 3), 200, np.uint8) for d in (1, 4, 16)]
    write_tiff(tmp_path / "s.tiff", levels, mpp=0.25)
    with open_aligned(tmp_path / "s.tiff", CONFIG) as slide:
        assert [(plan.level, plan.native) for plan in slide.plan.levels] == [(2, True), (1, True), (0, True)]
    with open_aligned(tmp_path / "s.tiff", CONFIG, 0.125) as slide:
        assert [plan.level_downsample for plan in slide.plan.levels] == [16.0, 4.0, 1.0]


def test_bounds_without_a_pixel_are_refused(coordinate_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TiffReader, "bounds", property(lambda self: (3, 3, 5, 5)))
    with pytest.raises(MadError, match="bounds"):
        open_aligned(coordinate_slide, CONFIG)
    monkeypatch.undo()
    with pytest.raises(MadError, match="coarser than every magnification"):
        open_aligned(coordinate_slide, CONFIG, 8.0)
    monkeypatch.setattr(TiffReader, "bounds", property(lambda self: (0, 0, 100_000, 80_000)))
    with pytest.raises(MadError, match="would measure 250 x 200 mm"):
        open_aligned(coordinate_slide, CONFIG, 2.5)
