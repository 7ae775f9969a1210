"""The synthetic cohort: sheet, layout, pixels, annotation, and what it must not give away."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import pyvips
import shapely
import tifffile

from mad.config.synthetic import SyntheticConfig
from mad.files import MadError, sha256_file
from mad.slides.synthetic.annotate import class_polygons
from mad.slides.synthetic.checks import check_cohort
from mad.slides.synthetic.cohort import TARGET, sheet_rows
from mad.slides.synthetic.fields import band_pass, blend_weights, uniform_field, without_area_mean
from mad.slides.synthetic.layout import CELL_PX, CLASSES, GLASS, layout
from mad.slides.synthetic.render import render
from mad.slides.synthetic.slide import write_slide
from mad.slides.synthetic.tiles import TILE_PX, read_tiles, texture_features

SMALL = SyntheticConfig(patients=4, width=2688, height=1792)
SLIDE = "S02"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small slide."""
    folder = tmp_path_factory.mktemp("synthetic")
    write_slide(SMALL, SLIDE, folder)
    return folder


@pytest.fixture(scope="module")
def levels(written: Path) -> list[np.ndarray]:
    with tifffile.TiffFile(written / f"{SLIDE}.tiff") as tiff:
        return [page.asarray() for page in tiff.pages]


# --- the sheet


def test_sheet_of_twelve_patients() -> None:
    rows = sheet_rows(SyntheticConfig())
    assert Counter(row["split"] for row in rows) == {"train": 8, "val": 1, "test": 3}
    assert Counter(row[TARGET] for row in rows) == {"0": 6, "1": 6}
    for split in ("train", "test"):
        assert {row[TARGET] for row in rows if row["split"] == split} == {"0", "1"}
        assert len({row["scanner"] for row in rows if row["split"] == split}) == 2
    by_scanner = Counter((row["scanner"], row[TARGET]) for row in rows)
    assert len(by_scanner) == 4 and max(by_scanner.values()) - min(by_scanner.values()) <= 2
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", row["slide_id"]) for row in rows)
    assert len({row["patient_id"] for row in rows}) == len({row["slide_id"] for row in rows}) == 12
    assert rows[0]["path"] == "S01.tiff" and rows[0]["annotation"] == "S01.geojson"


@pytest.mark.parametrize("patients", [1, 2, 3, 4, 7, 30, 120])
def test_sheet_of_any_size(patients: int) -> None:
    rows = sheet_rows(SyntheticConfig(patients=patients))
    assert len(rows) == patients
    assert {row["split"] for row in rows} >= ({"train", "val", "test"} if patients >= 3 else {"train"})
    fixed = [{key: value for key, value in row.items() if key != "split"} for row in rows]
    larger = sheet_rows(SyntheticConfig(patients=patients + 5))[:patients]
    assert fixed == [{key: value for key, value in row.items() if key != "split"} for row in larger]


def test_sheet_imports_nothing_heavy() -> None:
    program = (
        "import sys; before = set(sys.modules); import mad.slides.synthetic.cohort;"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in "
        "('numpy', 'cv2', 'scipy', 'sklearn', 'tifffile', 'pandas', 'torch', 'pydantic')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- textures


def test_uniform_field_is_uniform() -> None:
    values = uniform_field(np.random.default_rng(0), (400, 400), 4.0)
    assert np.abs(np.quantile(values, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.05


@pytest.mark.parametrize("angle", [0.0, 0.7, np.pi / 2])
def test_stripes_run_along_their_angle(angle: float) -> None:
    texture = band_pass(np.random.default_rng(1), 256, 12.0, angle)
    dy, dx = np.gradient(texture)
    along, across = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    assert across.std() > 3 * along.std()
    assert texture.std() == pytest.approx(1, abs=1e-3)


def test_fibrils_vanish_at_10x() -> None:
    raw = band_pass(np.random.default_rng(2), 256, 8.9)
    clean = without_area_mean(raw)
    seen = [cv2.resize(texture, (64, 64), interpolation=cv2.INTER_AREA).std() for texture in (raw, clean)]
    assert seen[0] > 0.5 and seen[1] < 0.05


def test_blend_keeps_variance_and_period() -> None:
    period = np.geomspace(4, 16, 50, dtype=np.float32)[None]
    order = np.full_like(period, 0.3)
    weights = blend_weights(period, {"none": 1 - order, "along": order}, (4.0, 8.0, 16.0))
    assert sum(weight**2 for weight in weights.values()) == pytest.approx(np.ones((1, 50)), abs=1e-4)
    assert weights[4.0, "none"][0, 0] > 0.9 and weights[16.0, "none"][0, -1] > 0.9


# --- the layout


@pytest.mark.parametrize("slide_id", ["S01", "S07", "S12"])
def test_every_class_can_win_10x_tiles(slide_id: str) -> None:
    classes = layout(SyntheticConfig(), slide_id).classes
    side = TILE_PX * 4 // CELL_PX
    grid = classes.reshape(classes.shape[0] // side, side, classes.shape[1] // side, side)
    shares = np.stack([(grid == number).mean((1, 3)) for number in range(GLASS + 1)])
    winners = np.bincount(shares.argmax(0).ravel(), minlength=GLASS + 1)
    assert winners.min() >= 8, winners
    assert 0.15 < (classes == GLASS).mean() < 0.27


def test_layers_follow_depth() -> None:
    truth = layout(SyntheticConfig(), "S03")
    depths = [np.median(truth.depth_um[truth.classes == number]) for number in range(4)]
    assert depths == sorted(depths)


def test_latents_are_shared_or_drawn_anew() -> None:
    coupled, null = (layout(SyntheticConfig(decoupled=value), "S05") for value in (False, True))
    assert np.array_equal(coupled.architecture, coupled.cells)
    assert np.array_equal(coupled.architecture, null.architecture)
    assert np.array_equal(coupled.classes, null.classes) and np.array_equal(coupled.band, null.band)
    assert np.array_equal(coupled.plaques, null.plaques)
    correlation = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(null.architecture, null.cells, strict=True)]
    assert np.abs(correlation).max() < 0.4  # a few dozen independent places per slide


@pytest.mark.parametrize("index", range(1, 7))
def test_target_is_where_the_plaques_lie(index: int) -> None:
    config = SyntheticConfig()
    slide_id = f"S{index:02d}"
    truth = layout(config, slide_id)
    at = (truth.plaques[:, 1::-1] / 4).astype(int)
    inside = truth.band[at[:, 0], at[:, 1]]
    positive = sheet_rows(config)[index - 1][TARGET] == "1"
    assert len(inside) == 6
    assert (inside > 0.9).all() if positive else (inside < 0.1).all()
    area = truth.band.sum() / truth.tissue.sum()
    assert 0.02 < area < 0.08


def test_unknown_slides_are_named() -> None:
    for slide_id in ("S13", "S00", "slide", "../S01"):
        with pytest.raises(MadError, match=re.escape(slide_id)):
            layout(SyntheticConfig(), slide_id)


# --- pixels


def test_bytes_are_the_same_on_every_call(written: Path, tmp_path: Path) -> None:
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2 if threads == 1 else 1)
        write_slide(SMALL, SLIDE, tmp_path)
    finally:
        cv2.setNumThreads(threads)
    for name in (f"{SLIDE}.tiff", f"{SLIDE}.geojson"):
        assert sha256_file(tmp_path / name) == sha256_file(written / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{SLIDE}.geojson", f"{SLIDE}.tiff"]


def test_openslide_and_libvips_read_the_pyramid(written: Path) -> None:
    path = written / f"{SLIDE}.tiff"
    with openslide.OpenSlide(path) as slide:
        assert slide.level_downsamples == (1, 4, 16)
        assert slide.level_dimensions[0] == (SMALL.width, SMALL.height)
        for axis in "xy":
            assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(0.25)
        seen = np.array(slide.read_region((448, 448), 1, (112, 112)))[..., :3]
    for page in range(3):
        image = pyvips.Image.new_from_file(str(path), page=page)
        assert image.width * 4**page == SMALL.width
        assert 1000 / image.xres == pytest.approx(0.25 * 4**page)  # xres is in pixels per millimetre
    vips = pyvips.Image.new_from_file(str(path), page=1).crop(112, 112, 112, 112).numpy()
    assert np.abs(seen.astype(int) - vips).max() <= 2


def test_levels_are_area_averages(levels: list[np.ndarray]) -> None:
    for level in (1, 2):
        height, width = levels[level].shape[:2]
        average = cv2.resize(levels[0], (width, height), interpolation=cv2.INTER_AREA).astype(float)
        difference = levels[level] - average
        assert np.abs(difference.mean()) < 0.3
        assert np.abs(difference).mean() < 4
        # a shift by one pixel would be seen at once
        assert np.abs(difference).mean() < 0.6 * np.abs(levels[level] - np.roll(average, 1, 1)).mean()


def test_rendered_pixels_survive_the_file(levels: list[np.ndarray]) -> None:
    picture = render(SMALL, SLIDE, layout(SMALL, SLIDE)).astype(float)
    assert np.abs(picture - levels[0]).mean() < 4
    assert np.abs((picture - levels[0]).mean((0, 1))).max() < 0.5  # red is red


def test_glass_is_white_and_tissue_is_stained(levels: list[np.ndarray]) -> None:
    classes = layout(SMALL, SLIDE).classes
    glass = cv2.erode((classes == GLASS).astype(np.uint8), np.ones((3, 3))) > 0
    tissue = cv2.erode((classes != GLASS).astype(np.uint8), np.ones((3, 3))) > 0
    grey = cv2.resize(levels[0], classes.shape[::-1], interpolation=cv2.INTER_AREA).astype(float)
    assert grey[glass].min() > 225
    red, green, blue = grey[tissue].mean(0)
    assert green < blue < 235 and green < red < 235


def test_decoupling_moves_cells_only(levels: list[np.ndarray]) -> None:
    null_config = SMALL.model_copy(update={"decoupled": True})
    null = render(null_config, SLIDE, layout(null_config, SLIDE))
    shrink = [cv2.resize(x, None, fx=1 / 4, fy=1 / 4, interpolation=cv2.INTER_AREA) for x in (null, levels[0])]
    coarse = np.corrcoef(shrink[0].ravel(), shrink[1].ravel())[0, 1]
    tissue = layout(SMALL, SLIDE).tissue > 0
    at40 = [
        (x.astype(float) - cv2.resize(s, x.shape[1::-1], interpolation=cv2.INTER_LINEAR))[8::16, 8::16][tissue]
        for x, s in zip((null, levels[0]), shrink, strict=True)
    ]
    fine = np.corrcoef(at40[0].ravel(), at40[1].ravel())[0, 1]
    assert coarse > 0.97
    assert fine < coarse - 0.1


# --- the annotation


def test_polygons_say_what_the_layout_says(written: Path) -> None:
    collection = json.loads((written / f"{SLIDE}.geojson").read_text())
    truth = layout(SMALL, SLIDE).classes
    x, y = np.meshgrid(*(np.arange(n) * CELL_PX + CELL_PX / 2 for n in truth.shape[::-1]))
    raster = np.full(truth.shape, GLASS)
    names = set()
    for feature in collection["features"]:
        assert feature["type"] == "Feature"
        assert feature["properties"]["objectType"] == "annotation"
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.is_valid and shape.area > 0
        name = feature["properties"]["classification"]["name"]
        names.add(name)
        raster[shapely.contains_xy(shape, x, y)] = CLASSES.index(name)
    assert names == set(CLASSES)
    assert (raster == truth).mean() > 0.985
    assert len({feature["id"] for feature in collection["features"]}) == len(collection["features"])


def test_polygons_cover_without_overlap_and_keep_holes() -> None:
    truth = layout(SyntheticConfig(), "S01")
    shapes = class_polygons(truth)
    overlap = sum(a.intersection(b).area for n, a in enumerate(shapes) for b in shapes[:n])
    assert overlap < 1
    covered = shapely.union_all(shapes).area / CELL_PX**2
    assert covered == pytest.approx(truth.tissue.sum(), rel=0.005)
    assert sum(len(part.interiors) for shape in shapes for part in shapely.get_parts(shape)) >= 1


# --- the checks


def test_children_tile_their_parent(written: Path) -> None:
    tiles = read_tiles(SMALL, SLIDE, written)
    means = tiles.child_colour[..., :3].mean(1)
    assert np.abs(means - tiles.parents.colour[:, :3]).max() < 1.5
    assert len(tiles.children.label) == 4 * len(tiles.parents.label)
    fully = tiles.parents.tissue == 1
    assert np.corrcoef(tiles.parents.cells[fully, 0], tiles.parents.architecture[fully, 0])[0, 1] > 0.999


def test_texture_features_see_texture_and_not_stain() -> None:
    def described(period: float, absorption: tuple[float, float, float]) -> np.ndarray:
        texture = 1 + 0.3 * band_pass(np.random.default_rng(3), 224, period)[None, :TILE_PX, :TILE_PX, None]
        return texture_features((255 * np.exp(-texture * np.array(absorption))).astype(np.uint8))[0]

    pale, dark, other = (
        described(20, (0.2, 0.5, 0.3)),
        described(20, (0.4, 0.8, 0.5)),
        described(9, (0.2, 0.5, 0.3)),
    )
    assert np.abs(pale - dark)[:6].max() < 1
    assert np.abs(pale - other)[:6].max() > 2


def test_check_needs_patients_and_slides(tmp_path: Path) -> None:
    with pytest.raises(MadError, match="patients"):
        check_cohort(SyntheticConfig(patients=2), tmp_path)
    with pytest.raises(MadError, match=r"S01\.tiff"):
        check_cohort(SyntheticConfig(patients=4), tmp_path)


def test_a_small_cohort_passes_and_a_tinted_one_fails(tmp_path: Path) -> None:
    config = SyntheticConfig(patients=5, width=5376, height=1792)
    for row in sheet_rows(config):
        write_slide(config, row["slide_id"], tmp_path)
    found = check_cohort(config, tmp_path)
    json.dumps(found, allow_nan=False)
    assert found["passed_each"]["colour_f1"], found["colour_f1"]
    assert found["passed_each"]["colour_retrieval"], found["colour_retrieval"]
    assert found["passed_each"]["classes_separable"], found["texture_f1"]
    for row in sheet_rows(config):
        _tint_classes(config, row["slide_id"], tmp_path)
    assert not check_cohort(config, tmp_path)["passed_each"]["colour_f1"]


def _tint_classes(config: SyntheticConfig, slide_id: str, folder: Path) -> None:
    """Darken each class of a written slide by its own amount: what a cohort with a colour leak looks like."""
    from mad.slides.synthetic.slide import write_pyramid

    truth = layout(config, slide_id)
    shade = np.kron(truth.pick((1.0, 0.9, 0.8, 0.7), glass=1.0), np.ones((CELL_PX, CELL_PX), np.float32))
    picture = tifffile.imread(folder / f"{slide_id}.tiff", key=0)
    write_pyramid(folder / f"{slide_id}.tiff", (picture * shade[..., None]).astype(np.uint8), config.quality)
