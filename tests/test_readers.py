"""Every format: pixels that tell their own coordinates come back through the right reader, at every level; faults are named."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from conftest import coordinate_pixels, decode_coordinates, write_tiff
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from slide_files import (
    APERIO,
    HEIGHT,
    LEVELS,
    MICRON,
    SMOOTH,
    WIDTH,
    write_aperio,
    write_dicom,
    write_jpeg_2000,
    write_ome,
)

from mad.config.model import TileConfig
from mad.files import MadError, file_stamp
from mad.slides.readers import OpenSlideReader, Reader, ReadError, TiffReader, open_slide, slide_stamp
from mad.slides.readers.lzw import decode_lzw
from mad.slides.scale import read_scale
from mad.tiles.aligned import open_aligned

RECTANGLES = [(0, 0, 64, 50), (200, 130, 300, 280), (WIDTH - 30, HEIGHT - 20, 30, 20)]


def assert_coordinates(slide: Reader, num_levels: int = 3) -> None:
    """Each pixel of some rectangles, inside and at the borders, tells its place and level."""
    assert [size[0] for size in slide.level_dimensions] == [WIDTH, WIDTH // 4, WIDTH // 16][:num_levels]
    for level, (width, height) in enumerate(slide.level_dimensions):
        for x, y, w, h in RECTANGLES:
            x, y = min(x, width // 2), min(y, height // 2)
            w, h = min(w, width - x), min(h, height - y)
            columns, rows, from_level = decode_coordinates(slide.read(level, x, y, w, h))
            assert (columns == x + np.arange(w)).all() and (rows == y + np.arange(h)[:, None]).all()
            assert (from_level == level).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "lzw", "predictor": True},
        {"compression": None},
        {"compression": "zstd"},
        {"compression": "jpeg2000", "compressionargs": {"reversible": True}},
        {"compression": 33003, "compressionargs": {"reversible": True}},  # Bio-Formats' number for JPEG 2000
        {"compression": "webp", "compressionargs": {"lossless": True}},
        {"byteorder": ">"},
    ],
    ids=str,
)
def test_ome_tiff_levels_are_subifds(tmp_path: Path, options: dict[str, object]) -> None:
    """OpenSlide sees one level in such a file, or none. Also without tiles' padding: 1504 and 1104 are no multiples of 128."""
    path = tmp_path / "s.ome.tif"
    order = options.pop("byteorder", None) if "byteorder" in options else None
    if order:
        with tifffile.TiffWriter(path, ome=True, byteorder=">") as file:
            file.write(LEVELS[0], subifds=2, metadata={"axes": "YXS", **MICRON}, photometric="rgb", tile=(128, 128))
            for pixels in LEVELS[1:]:
                file.write(pixels, subfiletype=1, photometric="rgb", tile=(128, 128))
    else:
        write_ome(path, LEVELS, **options)
    with open_slide(path) as slide:
        assert isinstance(slide, TiffReader) and slide.properties["openslide.vendor"] == "ome-tiff"
        assert_coordinates(slide)
        scale = read_scale(slide.properties, None, "s")
        assert (scale.mpp, scale.source) == (pytest.approx(0.25), "OME-XML")


@pytest.mark.parametrize("options", [{}, {"tile": None, "rowsperstrip": 40}])
def test_planes_one_after_the_other(tmp_path: Path, options: dict[str, object]) -> None:
    write_ome(
        tmp_path / "s.ome.tif",
        [np.moveaxis(pixels, -1, 0) for pixels in LEVELS],
        "SYX",
        planarconfig="separate",
        **options,
    )
    with open_slide(tmp_path / "s.ome.tif") as slide:
        assert_coordinates(slide)


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 2)])
def test_ome_tiff_of_jpeg_tiles(tmp_path: Path, subsampling: tuple[int, int]) -> None:
    levels = [SMOOTH, SMOOTH[::2, ::2]]
    write_ome(
        tmp_path / "s.ome.tif", levels, compression="jpeg", compressionargs={"level": 95}, subsampling=subsampling
    )
    with open_slide(tmp_path / "s.ome.tif") as slide:
        for level, pixels in enumerate(levels):
            found = slide.read(level, 33, 21, 300, 200).astype(int)
            assert np.abs(found - pixels[21:221, 33:333]).mean() < 1.5
    planes = [np.moveaxis(pixels, -1, 0) for pixels in levels]
    write_ome(tmp_path / "p.ome.tif", planes, "SYX", compression="jpeg", planarconfig="separate")
    with open_slide(tmp_path / "p.ome.tif") as slide:
        assert np.abs(slide.read(1, 33, 21, 300, 200).astype(int) - levels[1][21:221, 33:333]).mean() < 1.5


def test_a_jfif_stream_is_ycbcr_whatever_the_tag_says(tmp_path: Path) -> None:
    """Bio-Formats writes JPEG tiles as whole JFIF files, YCbCr by definition, under the photometric tag RGB."""

    def tiles():  # type: ignore[no-untyped-def]
        for y in range(0, 600, 200):
            for x in range(0, 800, 200):
                file = io.BytesIO()
                Image.fromarray(SMOOTH[y : y + 200, x : x + 200]).save(file, "JPEG", quality=95, subsampling=0)
                yield file.getvalue().ljust(file.tell() + file.tell() % 2, b"\0")

    with tifffile.TiffWriter(tmp_path / "s.tif") as file:
        file.write(
            tiles(),
            shape=SMOOTH.shape,
            dtype=np.uint8,
            tile=(208, 208),
            photometric="rgb",
            compression="jpeg",
            metadata=None,
        )
    data = (tmp_path / "s.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "s.tif") as found:
        tags = found.pages[0].tags
    patched = bytearray(data)  # tifffile writes the tag YCbCr, and tiles of a multiple of 16 px alone
    for name, value in (("PhotometricInterpretation", 2), ("TileWidth", 200), ("TileLength", 200)):
        struct.pack_into("<H", patched, tags[name].valueoffset, value)
    (tmp_path / "s.tif").write_bytes(patched)
    with open_slide(tmp_path / "s.tif") as slide:
        assert np.abs(slide.read(0, 150, 150, 300, 300).astype(int) - SMOOTH[150:450, 150:450]).mean() < 1.5


def test_a_pyramid_of_top_level_pages_without_flags(tmp_path: Path) -> None:
    """OpenSlide takes only pages marked as reduced; a label and a macro picture of another shape are no levels."""
    others = [np.zeros((200, 300, 3), np.uint8), np.zeros((128, 128, 3), np.uint8)]
    with tifffile.TiffWriter(tmp_path / "s.tif", bigtiff=True) as file:
        for pixels in (others[0], LEVELS[0], LEVELS[2], others[1], LEVELS[1]):
            file.write(pixels, photometric="rgb", tile=(128, 128), compression="lzw", metadata=None)
    with open_slide(tmp_path / "s.tif") as slide:
        assert_coordinates(slide)
        assert slide.level_downsamples[1] == 4


@pytest.mark.parametrize(
    "options",
    [{"compression": None}, {"compression": None, "rowsperstrip": 7}, {"compression": "lzw", "rowsperstrip": 100}],
)
@pytest.mark.parametrize("bigtiff", [False, True])
def test_strips(tmp_path: Path, options: dict[str, object], bigtiff: bool) -> None:
    with tifffile.TiffWriter(tmp_path / "s.tif", bigtiff=bigtiff) as file:
        file.write(LEVELS[0], photometric="rgb", metadata=None, **options)
    with open_slide(tmp_path / "s.tif") as slide:
        assert_coordinates(slide, 1)
        assert isinstance(slide, TiffReader) and max(slide.levels[0].sizes) < 1.1 * 2**20


def test_jpeg_strips(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "s.tif") as file:
        file.write(SMOOTH, photometric="rgb", metadata=None, compression="jpeg", rowsperstrip=80)
    with open_slide(tmp_path / "s.tif") as slide:
        assert np.abs(slide.read(0, 100, 390, 500, 210).astype(int) - SMOOTH[390:, 100:600]).mean() < 1.5


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    alpha = np.full((600, 800, 1), 255, np.uint8)
    alpha[:100], alpha[100:200] = 0, 51
    pixels = np.concatenate([SMOOTH, alpha], -1)
    for kind in ("unassalpha", "unspecified", "assocalpha"):
        write_tiff(tmp_path / f"{kind}.tif", [pixels], 0.25, extrasamples=[kind])
        with open_slide(tmp_path / f"{kind}.tif") as slide:
            found = slide.read(0, 0, 0, 800, 600)
        assert (found[200:] == SMOOTH[200:]).all()
        if kind == "unspecified":
            assert (found == SMOOTH).all()
        if kind == "unassalpha":
            assert (found[:100] == 255).all()
            assert np.abs(found[100:200] - (SMOOTH[100:200] * 0.2 + 255 * 0.8)).max() <= 0.5 + 1e-6
        if kind == "assocalpha":
            assert (found[100:200] == np.minimum(SMOOTH[100:200].astype(int) + 204, 255)).all()


def test_aperio_levels_are_neither_thumbnail_nor_label_nor_macro(tmp_path: Path) -> None:
    write_aperio(tmp_path / "s.svs")
    with open_slide(tmp_path / "s.svs") as slide:
        assert isinstance(slide, TiffReader) and slide.properties["openslide.vendor"] == "aperio"
        assert_coordinates(slide)
        assert read_scale(slide.properties, None, "s").mpp == 0.252


@pytest.mark.parametrize("text", ["0,2520", "0.2520"])
def test_aperio_mpp_with_a_decimal_comma(tmp_path: Path, text: str) -> None:
    write_aperio(tmp_path / "s.svs", APERIO.replace("0.2520", text))
    with open_slide(tmp_path / "s.svs") as slide:
        scale = read_scale(slide.properties, None, "s")
    assert (scale.mpp, scale.source) == (0.252, "vendor property")


def test_nominal_magnification_is_never_a_scale(tmp_path: Path) -> None:
    write_aperio(tmp_path / "s.svs", APERIO.replace("|MPP = 0.2520", ""))
    with pytest.raises(MadError, match="`mpp` column"):
        open_aligned(tmp_path / "s.svs", TileConfig())


@pytest.mark.parametrize("compression", [33003, 33005])
def test_aperio_jpeg_2000(tmp_path: Path, compression: int) -> None:
    """33005 holds RGB; 33003 YCbCr, which the tiles are turned into here: through OpenSlide both give the slide's colours."""
    write_jpeg_2000(tmp_path / "s.svs", compression)
    with open_slide(tmp_path / "s.svs") as slide:
        assert isinstance(slide, OpenSlideReader) and slide.properties["openslide.vendor"] == "aperio"
        for x, y, width, height in [(0, 0, 300, 200), (500, 390, 300, 210)]:
            found = slide.read(0, x, y, width, height).astype(int)
            assert np.abs(found - SMOOTH[y : y + height, x : x + width]).max() <= (0 if compression == 33005 else 3)


def test_bounds_start_the_grid_and_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MIRAX, DICOM and others tell where they scanned; nothing that we can write does, so the property is set here."""
    write_aperio(tmp_path / "s.svs")
    bounds = {"x": 161, "y": 83, "width": 1200, "height": 900}
    opened = open_slide(tmp_path / "s.svs")
    opened.properties = {**opened.properties, **{f"openslide.bounds-{name}": str(v) for name, v in bounds.items()}}
    monkeypatch.setattr("mad.tiles.aligned.open_slide", lambda path, icc: opened)
    with open_aligned(tmp_path / "s.svs", TileConfig(tile_px=16, magnifications=[2.5, 10, 40])) as slide:
        assert (slide.grid.left, slide.grid.top) == (176, 96)  # the next whole pixel of every level
        assert (slide.grid.left + slide.grid.width, slide.grid.top + slide.grid.height) == (1361, 983)
        for level, downsample in enumerate((16, 4, 1)):
            x, y, from_level = decode_coordinates(slide.footprint(level, 1, 2))
            side = 256 // downsample
            assert (x == (176 + 512) // downsample + np.arange(side)).all()
            assert (y == (96 + 256) // downsample + np.arange(side)[:, None]).all()
            assert (from_level == 2 - level).all()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "options", "cause"),
    [
        (np.zeros((600, 700, 3), np.uint16), {}, "16-bit"),
        (np.zeros((600, 700), np.uint8), {"photometric": "minisblack"}, "1 sample"),
        (np.zeros((600, 700), np.uint16), {"photometric": "minisblack"}, "1 sample"),
        (np.zeros((600, 700, 3), np.float32), {}, "32-bit"),
        (np.zeros((600, 700, 4), np.uint8), {"photometric": "separated"}, "SEPARATED"),
        (np.zeros((600, 700, 3), np.uint8), {"photometric": "cielab"}, "CIELAB"),
    ],
)
def test_what_is_no_8_bit_rgb_is_refused(
    tmp_path: Path, pixels: np.ndarray, options: dict[str, object], cause: str
) -> None:
    write_tiff(tmp_path / "s.tif", [pixels], 0.25, **options)
    with pytest.raises(MadError, match=f"s.tif: .*{cause}.* export the slide as 8-bit RGB"):
        open_slide(tmp_path / "s.tif")


@pytest.mark.parametrize(
    ("shape", "axes", "cause"),
    [
        ((5, 300, 400, 3), "ZYXS", "5 focal plane"),
        ((4, 300, 400), "CYX", "4 channel"),
        ((3, 300, 400), "CYX", "3 channel"),
        ((2, 300, 400, 3), "TYXS", r"2 time"),
    ],
)
def test_stacks_and_fluorescence_are_refused(tmp_path: Path, shape: tuple[int, ...], axes: str, cause: str) -> None:
    with tifffile.TiffWriter(tmp_path / "s.ome.tif", ome=True) as file:
        photometric = "rgb" if axes[-1] == "S" else "minisblack"
        file.write(
            np.zeros(shape, np.uint8), photometric=photometric, tile=(128, 128), metadata={"axes": axes, **MICRON}
        )
    with pytest.raises(MadError, match=cause):
        open_slide(tmp_path / "s.ome.tif")


def test_a_stack_without_ome_is_refused(tmp_path: Path) -> None:
    write_tiff(tmp_path / "s.tif", [SMOOTH, SMOOTH], 0.25)
    with pytest.raises(MadError, match="2 images of the same 800 x 600 px"):
        open_slide(tmp_path / "s.tif")


def test_one_huge_strip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mad.slides.readers.layout.MAX_STRIP_BYTES", 10**6)
    with tifffile.TiffWriter(tmp_path / "s.tif") as file:
        file.write(SMOOTH, photometric="rgb", metadata=None, compression="deflate", rowsperstrip=600)
    with pytest.raises(MadError, match="vips tiffsave"):
        open_slide(tmp_path / "s.tif")


@pytest.mark.parametrize(
    "xml",
    [
        '<!DOCTYPE OME [<!ENTITY a "aaaa">]><OME>&a;</OME>',
        '<OME><Image><Pixels SizeX="800" SizeY="600" SizeC="x"/></Image></OME>',
        "<OME><Image></OME>",
    ],
)
def test_damaged_or_unsafe_ome_xml_is_an_error(tmp_path: Path, xml: str) -> None:
    write_tiff(tmp_path / "s.tif", [SMOOTH], 0.25, description=xml)
    with pytest.raises(MadError, match="damaged OME-XML"):
        open_slide(tmp_path / "s.tif")


# --- faults ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(MadError, match="none.svs: no such slide; mend its `path`"):
        open_slide(tmp_path / "none.svs")
    with pytest.raises(MadError, match="a folder, no slide"):
        open_slide(tmp_path)
    write_tiff(tmp_path / "b.tif", [SMOOTH], 0.25)
    (tmp_path / "a.txt").write_text("notes")
    with pytest.raises(MadError, match="for one .*b.tif"):
        open_slide(tmp_path)
    (tmp_path / "empty.svs").touch()
    with pytest.raises(MadError, match="an empty file"):
        open_slide(tmp_path / "empty.svs")
    (tmp_path / "text.svs").write_text("hello")
    with pytest.raises(MadError, match="neither a TIFF nor .*b'hell'.*OME-TIFF"):
        open_slide(tmp_path / "text.svs")
    (tmp_path / "none.tif").write_bytes(b"II*\x00" + bytes(4))
    with pytest.raises(MadError, match="none.tif: no slide that can be read .*no image.*is the file whole"):
        open_slide(tmp_path / "none.tif")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    write_tiff(tmp_path / "s.tif", [SMOOTH], 0.25)
    (tmp_path / "s.tif").chmod(0)
    with pytest.raises(MadError, match="mend its permissions"):
        open_slide(tmp_path / "s.tif")


def test_a_read_that_the_system_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MadError, match="Permission denied.*mend its permissions"):
        open_slide(tmp_path / "s.tif")


def test_a_file_cut_short_tells_which_tile(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tiff(tmp_path / "s.tif", LEVELS[:1], 0.25)
    data = (tmp_path / "s.tif").read_bytes()
    (tmp_path / "s.tif").write_bytes(data[: len(data) // 2])
    with open_slide(tmp_path / "s.tif") as slide:
        assert "tiles of level 0 lie beyond the file's end" in capfd.readouterr().err
        decode_coordinates(slide.read(0, 0, 0, 300, 300))
        with pytest.raises(ReadError, match="level 0, .* tile in row 4, column 5: .*cut short"):
            slide.read(0, WIDTH - 10, HEIGHT - 10, 10, 10)
        with pytest.raises(ReadError):
            slide.overview(4, 200, 200)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9, 0.97])
def test_lost_directories_are_damage_not_a_missing_scale(tmp_path: Path, share: float) -> None:
    """OpenSlide no longer knows such an Aperio slide, and then nobody reads its um/px."""
    write_aperio(tmp_path / "s.svs")
    data = (tmp_path / "s.svs").read_bytes()
    (tmp_path / "s.svs").write_bytes(data[: int(share * len(data))])
    with pytest.raises(MadError, match="is the file whole"):
        open_aligned(tmp_path / "s.svs", TileConfig())


@pytest.mark.parametrize("tag", ["ImageDescription", "TileOffsets", "SubIFDs"])
def test_lost_tags_are_damage_not_a_missing_scale(tmp_path: Path, tag: str) -> None:
    """A directory entry whose value lies beyond the file: never "no um/px", never a pyramid of fewer levels."""
    write_ome(tmp_path / "s.ome.tif", LEVELS)
    with tifffile.TiffFile(tmp_path / "s.ome.tif") as file:
        place = file.pages[0].tags[tag].offset + 12  # BigTIFF: code, type, count, then the offset of the value
    data = bytearray((tmp_path / "s.ome.tif").read_bytes())
    struct.pack_into("<Q", data, place, 2**40)
    (tmp_path / "s.ome.tif").write_bytes(data)
    with pytest.raises(MadError, match="is the file whole"):
        open_slide(tmp_path / "s.ome.tif")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small slides of two levels, per codec."""
    folder = tmp_path_factory.mktemp("fuzz")
    levels = [coordinate_pixels(300, 200, 0), coordinate_pixels(150, 100, 1)]
    write_aperio(folder / "aperio")
    for codec in ("deflate", "lzw", "jpeg"):
        write_ome(folder / codec, levels, tile=(64, 64), compression=codec)
    return {path.name: path for path in folder.iterdir()}


def right_or_error(path: Path, data: bytes) -> None:
    """Damage gives pixels or a MadError: no other exception, and no end of the process."""
    path.write_bytes(data)
    try:
        with open_slide(path) as slide:
            for level, (width, height) in enumerate(slide.level_dimensions):
                if width * height < 10**7:
                    slide.read(level, 0, 0, width, height)
    except MadError:
        pass


CODECS = st.sampled_from(["aperio", "deflate", "lzw", "jpeg"])


@given(CODECS, st.floats(0, 1))
def test_cut_anywhere(small: dict[str, Path], codec: str, share: float) -> None:
    data = small[codec].read_bytes()
    right_or_error(small[codec].with_suffix(".cut"), data[: int(share * len(data))])


@given(CODECS, st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_changed(small: dict[str, Path], codec: str, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(small[codec].read_bytes())
    for place, value in changes:
        changed[place] = value
    right_or_error(small[codec].with_suffix(".changed"), bytes(changed))


@pytest.mark.parametrize(("samples", "predictor"), [(1, 1), (3, 1), (3, 2), (4, 1), (4, 2)])
def test_lzw_is_decoded_and_its_damage_found(samples: int, predictor: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, samples)).astype(np.uint8)
    stored = pixels if predictor == 1 else imagecodecs.delta_encode(pixels, axis=1)
    data = imagecodecs.lzw_encode(np.ascontiguousarray(stored).tobytes())
    assert (decode_lzw(data, 40, 50, samples, predictor) == pixels).all()
    for damaged in (
        data[: len(data) // 2],
        data[:100] + b"\xff\xf0" + data[102:],
        bytes(len(data)),
        b"\xff" * 100,
        b"",
    ):
        with pytest.raises(OSError):
            decode_lzw(damaged, 40, 50, samples, predictor)


# --- OpenSlide's own ---------------------------------------------------------------------------------------------------


def test_openslide_places_a_level_of_an_odd_downsample_to_an_eighth_of_a_pixel(tmp_path: Path) -> None:
    """OpenSlide takes whole level-0 pixels and interpolates: at a downsample of 4.0052 a read starts up to 0.125 px beside."""

    def ramp(count: int) -> np.ndarray:  # 8 grey values per pixel
        return np.abs(np.arange(count) * 8 % 480 - 240)

    levels = [
        np.stack(np.broadcast_arrays(ramp(1543 // d), ramp(1535 // d)[:, None], 90), -1).astype(np.uint8)
        for d in (1, 4, 16)
    ]
    write_tiff(tmp_path / "s.tif", levels, 0.25)
    with OpenSlideReader(tmp_path / "s.tif") as slide, open_slide(tmp_path / "s.tif") as exact:
        for level, pixels in enumerate(levels):
            for start in range(0, pixels.shape[0] - 20, 7):
                part = pixels[start : start + 20, start : start + 20].astype(int)
                offset = 0.5 / slide.level_downsamples[level] if level else 0
                assert np.abs(slide.read(level, start, start, 20, 20) - part).max() <= 8 * offset + 2
                assert (exact.read(level, start, start, 20, 20) == part).all()


def test_dicom(tmp_path: Path) -> None:
    """Any file of the series opens the slide; coordinates and um/px come back; a folder names a file to take."""
    paths = write_dicom(tmp_path, LEVELS, "1.2.840.10008.1.2.4.90")
    for path in paths:
        with open_slide(path) as slide:
            assert isinstance(slide, OpenSlideReader) and slide.properties["openslide.vendor"] == "dicom"
            assert_coordinates(slide)
            scale = read_scale(slide.properties, None, "s")
            assert (scale.mpp, scale.source) == (pytest.approx(0.25), "vendor property")
    with pytest.raises(MadError, match=r"a folder, no slide; .*for one .*0\.dcm"):
        open_slide(tmp_path)


def test_dicom_of_jpeg_tiles(tmp_path: Path) -> None:
    levels = [SMOOTH, SMOOTH[::4, ::4]]
    with open_slide(write_dicom(tmp_path, levels, "1.2.840.10008.1.2.4.50")[0]) as slide:
        for level, pixels in enumerate(levels):
            found = slide.read(level, 13, 21, 150, 100).astype(int)
            assert np.abs(found - pixels[21:121, 13:163]).mean() < 2


def test_a_handle_that_met_an_error_is_opened_anew(tmp_path: Path) -> None:
    """OpenSlide answers every read after a failed one with the same error."""
    write_dicom(tmp_path, [SMOOTH], "1.2.840.10008.1.2.4.50")
    data = bytearray((tmp_path / "0.dcm").read_bytes())
    last = data.rfind(b"\xff\xd8\xff")
    data[last + 2 : last + 400] = bytes(398)
    (tmp_path / "0.dcm").write_bytes(data)
    with open_slide(tmp_path / "0.dcm") as slide:
        for _ in range(2):
            with pytest.raises(ReadError, match=r"0.dcm: level 0, 100 x 50 px at \(700, 550\)"):
                slide.read(0, 700, 550, 100, 50)
            assert np.abs(slide.read(0, 13, 21, 150, 100).astype(int) - SMOOTH[21:121, 13:163]).mean() < 2


def test_the_stamp_of_a_mirax_slide_tells_of_its_folder(tmp_path: Path) -> None:
    slide, pixels = tmp_path / "s.mrxs", tmp_path / "s" / "Data0000.dat"
    assert slide_stamp(slide) is None
    slide.touch()
    assert slide_stamp(slide) == file_stamp(slide)
    pixels.parent.mkdir()
    pixels.write_bytes(b"old")
    before = slide_stamp(slide)
    pixels.write_bytes(b"newer")
    assert slide_stamp(slide) != before and slide_stamp(slide)[:3] == file_stamp(slide)
    slide.rename(tmp_path / "s.svs")
    assert slide_stamp(tmp_path / "s.svs") == file_stamp(tmp_path / "s.svs")
