"""The annotation as a layer: vertices where they were drawn, holes, names, and what becomes of masks and of too many vertices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mad.config.model import LabelConfig
from mad.files import MadError, read_json
from mad.reporting import annotation_layer
from mad.reporting.annotation_layer import MAX_SIDE, outlines, painted_grid, write_annotation
from mad.slides.annotations import Region

LABEL = LabelConfig(
    classes=["a", "b", "glass"], background="glass", rename={"A": "a"}, colours={"a": "#0072b2", "b": "#e69f00"},
    mask_values={1: "a", 7: "b"},
)  # fmt: skip
SIZE = (9000, 8000)


def slide_of(*bounds: int, downsample: float = 4.0) -> dict[str, Any]:
    """What `slide.json` tells, as far as it matters."""
    return {"bounds": list(bounds or (0, 0, *SIZE)), "size": list(SIZE), "downsample": downsample}


def write_geojson(path: Path, *areas: tuple[str, shapely.Geometry]) -> Path:
    features = [
        {"type": "Feature", "geometry": shapely.geometry.mapping(area), "properties": {"classification": {"name": name}}}
        for name, area in areas
    ]  # fmt: skip
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def asap_outline(polygon: shapely.Polygon) -> str:
    points = "".join(
        f'<Coordinate Order="{n}" X="{x}" Y="{y}"/>' for n, (x, y) in enumerate(polygon.exterior.coords[:-1])
    )
    text = f'<Annotation Name="1" PartOfGroup="b" Type="Polygon"><Coordinates>{points}</Coordinates></Annotation>'
    return f"<ASAP_Annotations><Annotations>{text}</Annotations></ASAP_Annotations>"


def areas_of(
    folder: Path, told: dict[str, Any], corner: tuple[int, ...] = (0, 0)
) -> list[tuple[str, shapely.Geometry]]:
    """Class and area in level-0 px of the slide, as the page reads them."""
    return [
        (
            feature["properties"]["classification"]["name"],
            shapely.transform(shapely.geometry.shape(feature["geometry"]), lambda points: points + corner),
        )
        for feature in read_json(folder / told["geojson"])["features"]
    ]


def star(random: np.random.Generator, centre: np.ndarray, inner: float, outer: float) -> np.ndarray:
    """Vertices [n, 2] around a centre, in hundredths of a pixel."""
    angles = np.linspace(0, 2 * np.pi, random.integers(3, 12), endpoint=False) + random.uniform(0, 0.1)
    radii = random.uniform(inner, outer, len(angles))
    return np.round(centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1), 2)


@settings(max_examples=60)
@given(seed=st.integers(0, 9999), cropped=st.booleans(), asap=st.booleans())
def test_a_vertex_lies_where_it_was_drawn(
    tmp_path_factory: pytest.TempPathFactory, seed: int, cropped: bool, asap: bool
) -> None:
    """To a millionth of a pixel, whichever corner the file counts from, also where the slide shows its bounds alone."""
    random, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("a")
    bounds = (1000, 500, 4000, 3000) if cropped else (0, 0, *SIZE)
    centre = random.uniform(1500, 4000, 2)
    polygon = shapely.Polygon(star(random, centre, 300, 900), [] if asap else [star(random, centre, 20, 70)])
    if asap:  # counts from the slide's corner
        (path := folder / "drawn.xml").write_text(asap_outline(polygon))
    else:  # QuPath counts from the corner of the bounds
        path = write_geojson(
            folder / "drawn.geojson", ("b", shapely.transform(polygon, lambda points: points - bounds[:2]))
        )
    told = write_annotation(folder, path, LABEL, slide_of(*bounds))
    assert told is not None
    ((name, found),) = areas_of(folder, told, bounds[:2])
    assert name == "b" and len(found.interiors) == (0 if asap else 1)
    assert shapely.equals_exact(shapely.normalize(found), shapely.normalize(polygon), tolerance=1e-6)


def test_classes_are_those_of_the_tiles(tmp_path: Path) -> None:
    box = shapely.box
    path = write_geojson(
        tmp_path / "drawn.geojson",
        ("A", box(0, 0, 100, 100)), ("unknown", box(50, 50, 70, 70)), ("b", box(0, 0, 9, 9) | box(20, 0, 29, 9)),
    )  # fmt: skip
    told = write_annotation(tmp_path, path, LABEL, slide_of())
    assert (
        told is not None
        and told["note"] == "2 areas"
        and told["name"] == "annotation"
        and told["magnification"] is None
    )
    areas = areas_of(tmp_path, told)
    assert [name for name, _ in areas] == ["a", "b"] and areas[1][1].area == 162
    colours = [
        feature["properties"]["classification"]["color"]
        for feature in read_json(tmp_path / told["geojson"])["features"]
    ]
    assert colours == [[0, 0x72, 0xB2], [0xE6, 0x9F, 0]]

    path = write_geojson(tmp_path / "none.geojson", ("unknown", box(0, 0, 100, 100)))
    assert write_annotation(tmp_path / "none", path, LABEL, slide_of()) is None and not (tmp_path / "none").exists()
    with pytest.raises(MadError, match="no such annotation"):
        write_annotation(tmp_path, tmp_path / "gone.geojson", LABEL, slide_of())


def test_shells_and_holes_run_opposite_ways(tmp_path: Path) -> None:
    """The page tells inside from outside by the winding number, also where areas of one class overlap."""
    for turn in (1, -1):
        ring, hole = [(0, 0), (90, 0), (90, 90), (0, 90)][::turn], [(30, 30), (60, 30), (60, 60), (30, 60)]
        path = write_geojson(tmp_path / "drawn.geojson", ("a", shapely.Polygon(ring, [hole])))
        told = write_annotation(tmp_path, path, LABEL, slide_of())
        assert told is not None
        ((_, found),) = areas_of(tmp_path, told)
        assert found.exterior.is_ccw and not found.interiors[0].is_ccw


def wavy(num_vertices: int) -> shapely.Polygon:
    angle = np.linspace(0, 2 * np.pi, num_vertices, endpoint=False)
    radius = 1000 + 0.4 * np.sin(angle * num_vertices / 4)
    return shapely.Polygon(np.stack([2000 + radius * np.cos(angle), 3000 + radius * np.sin(angle)], axis=1))


def test_a_simplified_outline_is_off_by_what_the_page_says() -> None:
    """Also where GEOS takes away the end of a ring, after what lay beside it."""
    rng = np.random.default_rng(0)
    regions = []
    for _ in range(60):
        angle = np.linspace(0, 2 * np.pi, 600, endpoint=False)
        waves = sum(rng.uniform(0, 60) / k * np.sin(k * angle + rng.uniform(0, 7)) for k in range(1, 40))
        ring = (800 + waves + rng.normal(0, 1, 600)) * np.stack([np.cos(angle), np.sin(angle)])
        regions.append(Region("a", shapely.MultiPolygon([shapely.Polygon(ring.T)])))
    for reach in (0.5, 2.0, 8.0):
        found, told = outlines(regions, reach)
        assert told == reach and shapely.get_num_coordinates(found).sum() < 60 * 600
        for region, drawn in zip(regions, found, strict=True):
            assert shapely.hausdorff_distance(region.geometry.boundary, drawn.boundary) <= reach


def test_too_many_vertices_are_simplified_to_half_a_pixel_of_the_picture(tmp_path: Path) -> None:
    polygon = wavy(30_000)
    told = write_annotation(tmp_path, write_geojson(tmp_path / "drawn.geojson", ("a", polygon)), LABEL, slide_of())
    assert told is not None and told["note"] == "1 area, simplified by at most 2 px" and told["picture"] is None
    ((_, found),) = areas_of(tmp_path, told)
    assert shapely.get_num_coordinates(found) < 1000
    assert shapely.hausdorff_distance(found.exterior, polygon.exterior) <= 2


@pytest.mark.parametrize("downsample", [1.0, 2.5])
def test_what_stays_too_much_is_painted_with_the_class_of_each_centre(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downsample: float
) -> None:
    monkeypatch.setattr(annotation_layer, "MAX_VERTICES", 8)
    ring = shapely.Polygon(shapely.box(300, 200, 500, 360).exterior, [shapely.box(350, 250, 400, 300).exterior])
    areas = [("b", ring), ("a", shapely.box(480, 340, 560, 420))]  # they overlap: a wins
    bounds = (210, 120, 400, 330)
    path = write_geojson(
        tmp_path / "d.geojson", *((n, shapely.transform(a, lambda p: p - bounds[:2])) for n, a in areas)
    )
    told = write_annotation(tmp_path, path, LABEL, slide_of(*bounds, downsample=downsample))
    assert told is not None and told["geojson"] is None and "2 areas, too many vertices" in told["note"]
    image = np.asarray(Image.open(tmp_path / told["picture"]).convert("RGBA"))
    left, top, width, height = told["extent"]
    assert (left, top) == bounds[:2] and width / image.shape[1] == height / image.shape[0] == downsample
    y, x = ((np.indices(image.shape[:2]) + 0.5) * downsample) + np.array([top, left])[:, None, None]
    expected = np.zeros_like(image)
    expected[shapely.contains_xy(areas[0][1], x, y)] = (0xE6, 0x9F, 0, 255)
    expected[shapely.contains_xy(areas[1][1], x, y)] = (0, 0x72, 0xB2, 255)
    assert (image == expected).all() and (expected[..., 3] == 0).any()


def test_a_mask_is_painted_and_its_unknown_values_are_not(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).choice(np.array([0, 1, 7, 9], np.uint8), (80, 90))
    Image.fromarray(mask).save(tmp_path / "mask.png")
    told = write_annotation(tmp_path, tmp_path / "mask.png", LABEL, slide_of(downsample=20))
    assert told is not None and told["note"] == "a mask: painted, a cell of 20 px"
    image = np.asarray(Image.open(tmp_path / told["picture"]).convert("RGBA"))
    assert image.shape == (400, 450, 4) and told["extent"] == [0, 0, 9000, 8000]
    colours = {1: (0, 0x72, 0xB2, 255), 7: (0xE6, 0x9F, 0, 255)}
    for value in np.unique(mask):
        assert (image[np.kron(mask == value, np.ones((5, 5), bool))] == colours.get(value, (0, 0, 0, 0))).all()
    Image.fromarray(np.full((80, 90), 9, np.uint8)).save(tmp_path / "mask.png")
    assert write_annotation(tmp_path, tmp_path / "mask.png", LABEL, slide_of()) is None


def test_a_painted_annotation_stays_small() -> None:
    grid = painted_grid({"bounds": [0, 0, 200_000, 50_000], "downsample": 4.0})
    assert max(grid.level_shape(0)) == MAX_SIDE
    assert painted_grid(slide_of()).finest_px == 4
