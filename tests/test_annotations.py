"""QuPath GeoJSON in the forms that QuPath and its scripts write, its faults, and what is told of a file."""

import gzip
import json
import math
import os
from pathlib import Path

import pytest
import shapely

from mad.config.model import LabelConfig
from mad.files import MadError
from mad.slides.annotations import (
    Region,
    in_slide_frame,
    is_mask,
    num_off_slide,
    open_mask,
    read_annotation,
    read_geojson,
)
from mad.tiles.annotated import annotated_raster
from mad.tiles.labels import NO_CLASS
from mad.tiles.pyramid import Grid, Ladder

SQUARE = [[[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]]
HOLED = [*SQUARE, [[20, 20], [40, 20], [40, 40], [20, 40], [20, 20]]]
BOWTIE = [[[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]]


def feature(coordinates: object, classification: object, kind: str = "Polygon") -> dict[str, object]:
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"classification": classification} if classification else {},
    }


@pytest.mark.parametrize("form", ["collection", "list", "single", "gzip"])
def test_every_container_reads_alike(tmp_path: Path, form: str) -> None:
    one = feature(HOLED, {"name": "Gray Matter"})
    content: object = {"collection": {"type": "FeatureCollection", "features": [one]}, "list": [one]}.get(form, one)
    path = tmp_path / ("a.geojson.gz" if form == "gzip" else "a.geojson")
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if form == "gzip" else data)
    (region,) = read_geojson(path).regions
    assert region.name == "Gray Matter"
    assert region.geometry.area == 100 * 100 - 20 * 20  # the hole is kept


def test_classes_shapes_and_repairs(tmp_path: Path) -> None:
    features = [
        feature(BOWTIE, "crossed"),
        feature([SQUARE, [[[200, 0], [300, 0], [300, 50], [200, 0]]]], {"names": ["Edge"]}, "MultiPolygon"),
        feature(SQUARE, None),
        feature([5, 5], {"name": "point"}, "Point"),
        feature([[[0, 0], [9, 9], [5, 5], [0, 0]]], {"name": "a line drawn as a polygon"}),
        {**feature(SQUARE, {"name": "empty"}), "geometry": None},
    ]
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    annotation = read_geojson(path)
    regions = annotation.regions
    assert [region.name for region in regions] == ["crossed", "Edge"]
    assert all(region.geometry.is_valid and region.geometry.area > 0 for region in regions)
    assert regions[1].geometry.area == 10_000 + 2_500
    assert (annotation.num_repaired, annotation.num_unnamed, annotation.num_without_area) == (1, 1, 3)


def test_a_derived_class_is_named_as_qupath_shows_it(tmp_path: Path) -> None:
    """QuPath of today, QuPath before version 0.4 (all of a class, its parent within), other programs."""
    old = {"parentClass": {"parentClass": {"name": "Tumor", "colorRGB": -1}, "name": "Edge"}, "name": "Necrosis"}
    classes = [{"names": ["Tumor", "Necrosis"], "color": [1, 2, 3]}, {"names": ["Stroma", "Necrosis"]}, old]
    classes += [{"name": "Tumor", "colorRGB": -1}, "Tumor: Necrosis", {}, {"names": []}]  # type: ignore[list-item]
    found = read_geojson(write(tmp_path / "a.geojson", *(feature(SQUARE, each) for each in classes)))
    names = [region.name for region in found.regions]
    assert names == ["Tumor: Necrosis", "Stroma: Necrosis", "Tumor: Edge: Necrosis", "Tumor", "Tumor: Necrosis"]
    assert found.num_unnamed == 2
    label = LabelConfig(classes=["Tumor", "Necrosis"], background=None, rename={"Tumor: Necrosis": "Necrosis"})
    grid = Grid(Ladder((10.0, 40.0)), 32.0, 512, 384)
    frame = {"bounds": (0, 0, 512, 384), "size": (512, 384)}
    _, facts, _ = annotated_raster(tmp_path / "a.geojson", label, grid, 8, **frame)  # type: ignore[arg-type]
    assert facts is not None and facts["areas"] == {"Necrosis": 2, "Tumor": 1}
    assert facts["unknown"] == {"Stroma: Necrosis": 1, "Tumor: Edge: Necrosis": 1}


def test_objects_inside_objects_count_like_all_others(tmp_path: Path) -> None:
    """Exports of QuPath's hierarchy: `FeatureCollection.wrap(objects, true)`."""
    inner, middle, outer = feature(SQUARE, {"name": "A"}), feature(HOLED, {"name": "B"}), feature(SQUARE, {"name": "C"})
    middle["properties"] |= {"childObjects": [inner, feature(SQUARE, None)]}  # type: ignore[operator]
    outer["properties"] |= {"childObjects": [middle]}  # type: ignore[operator]
    found = read_geojson(write(tmp_path / "a.geojson", outer, feature(SQUARE, {"name": "D"})))
    assert [(region.name, region.geometry.area) for region in found.regions] == [
        *(("C", 10_000), ("B", 9600), ("A", 10_000), ("D", 10_000))
    ]
    assert found.num_unnamed == 1


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"features": [{"properties": {"classification": "A"}}]}'])
def test_other_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(text)
    with pytest.raises(MadError, match="a.geojson: no QuPath GeoJSON"):
        read_geojson(path)
    with pytest.raises(MadError, match="leave the cell empty"):
        read_geojson(tmp_path / "none.geojson")


def test_damaged_gzip_is_refused_by_name(tmp_path: Path) -> None:
    data = gzip.compress(json.dumps([feature(SQUARE, {"name": "A"})] * 50).encode())
    for number, broken in enumerate([data[:-12], data[:40] + bytes([data[40] ^ 255]) + data[41:]]):
        path = tmp_path / f"{number}.geojson.gz"
        path.write_bytes(broken)
        with pytest.raises(MadError, match="no QuPath GeoJSON"):
            read_geojson(path)


def test_coordinates_of_cropped_slides_start_at_their_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps([feature(HOLED, {"name": "A"})]))
    annotation = read_geojson(path)
    assert in_slide_frame(annotation, (0, 0, 800, 600), (800, 600)) == annotation
    (moved,) = in_slide_frame(annotation, (1000, 2000, 500, 400), (5000, 6000)).regions
    assert moved.geometry.bounds == (1000, 2000, 1100, 2100)
    assert moved.geometry.area == annotation.regions[0].geometry.area


def write(path: Path, *features: object) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_collections_heights_and_open_rings(tmp_path: Path) -> None:
    collection = {
        "type": "GeometryCollection",
        "geometries": [
            {"type": "Polygon", "coordinates": HOLED},
            {"type": "Point", "coordinates": [1, 2]},
            {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": SQUARE}]},
        ],
    }
    features = [
        {"geometry": collection, "properties": {"classification": "nested"}},
        feature([[[0, 0, 7], [10, 0, 7], [10, 10, 7], [0, 10, 7]]], "open, with heights"),
        feature([[[0, 0], [10, 0, 5], [10, 10], [0, 0]]], "mixed"),
        feature([*SQUARE, [[1, 1], [2, 2]]], "a hole of two points"),
    ]
    found = read_geojson(write(tmp_path / "a.geojson", *features))
    assert [region.geometry.area for region in found.regions] == [10_000, 100, 50, 10_000]
    assert found.num_repaired == 1 and found.num_without_area == 0  # the collection's parts overlap


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "the file is empty"),
        ("[" * 100_000, "recursion"),
        ('{"features": ' * 5000, "recursion|Expecting"),
        (
            json.dumps([feature([[[0, 0], [1e300, 0], [0, 1]]], "A")]),
            "a coordinate is not finite, or beyond 1e[+]09 px",
        ),
        (json.dumps([feature([[[0, 0], [math.nan, 0], [0, 1]]], "A")]), "not finite"),
        (json.dumps([feature([[[0, 0], [-math.inf, 0], [0, 1]]], "A")]), "not finite"),
        (json.dumps([feature([[[0, 0], [10**400, 0], [0, 1]]], "A")]), "too large"),
        (json.dumps([feature([[[0, 0], ["ten", 0], [0, 1]]], "A")]), "ten"),
        (json.dumps([feature([[[0], [1], [2]]], "A")]), "fewer than two numbers"),
        (json.dumps([feature(SQUARE, {"name": 7})]), "the class name 7 is no text"),
        (json.dumps([feature(SQUARE, ["A", "B"])]), "is no text"),
        (json.dumps([feature(SQUARE, {"names": ["A", 7]})]), "the class name 7 is no text"),
        (json.dumps([feature(SQUARE, "half a \ud83d")]), "surrogates not allowed"),
        (json.dumps([feature(SQUARE, "A", kind="Circle")]), "a geometry of type 'Circle'"),
        ("{}", "a feature lacks 'geometry'"),
    ],
)
def test_faults_are_refused_with_their_cause(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(text)
    with pytest.raises(MadError, match=rf"a.geojson: no QuPath GeoJSON \(.*({cause}).*\); export it"):
        read_geojson(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    for data in (b'[{"properties": "\xff\xfe"}]', b"\x89PNG\r\n\x1a\n", gzip.compress(b"[]")):
        path.write_bytes(data)
        with pytest.raises(MadError, match="no QuPath GeoJSON .*codec"):
            read_geojson(path)


@pytest.mark.parametrize("name", ["a.geojson", "a.xml.gz", "a.png"])
def test_what_cannot_be_opened_is_refused_with_its_mend(tmp_path: Path, name: str) -> None:
    def read(path: Path) -> object:
        return open_mask(path, (9, 9)) if is_mask(path) else read_annotation(path)

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).mkdir()
    with pytest.raises(MadError, match=f"{name}: no file but a folder.*mend its `annotation`"):
        read(tmp_path / "folder" / name)
    os.mkfifo(tmp_path / f"pipe-{name}")  # opening it would wait for ever
    with pytest.raises(MadError, match="no file but a folder or a device"):
        read(tmp_path / f"pipe-{name}")
    with pytest.raises(MadError, match="cannot be opened .File name too long.*mend its path, or let this user read it"):
        read(tmp_path / ("x" * 300 + name))
    if os.geteuid():
        (tmp_path / name).touch(0o000)
        with pytest.raises(MadError, match="cannot be opened .Permission denied.*let this user read it"):
            read(tmp_path / name)


def test_areas_off_the_slide_are_counted() -> None:
    boxes = {
        "inside": (10, 10, 90, 40),
        "to the very border": (0, 0, 100, 50),
        "a pen's width over": (-0.9, 5, 100.9, 50.5),
        "partly": (50, 20, 150, 40),
        "around": (-50, -50, 300, 300),
        "beside": (200, 0, 300, 50),
        "touching": (100, 0, 140, 50),
        "before": (-30, -30, -5, -5),
    }
    regions = [Region(name, shapely.box(*box)) for name, box in boxes.items()]
    notch = shapely.Polygon(
        [(-10, -10), (120, -10), (120, 80), (110, 80), (110, -5), (-10, -5)]
    )  # around the corner, outside
    assert num_off_slide([*regions, Region("notch", notch)], (100, 50)) == (4, 2)
    assert num_off_slide([], (100, 50)) == (0, 0)


def test_findings_are_facts_and_warnings(tmp_path: Path) -> None:
    grid = Grid(Ladder((10.0, 40.0)), 32.0, 512, 384, left=64, top=0)
    label = LabelConfig(classes=["A", "B"], background=None, rename={"tumour": "A"})
    far = [[[2000, 0], [2100, 0], [2100, 100], [2000, 0]]]
    path = write(
        tmp_path / "a.geojson",
        feature(SQUARE, "tumour"),
        feature(SQUARE, "A"),
        feature(BOWTIE, "B"),
        feature(far, "B"),
        feature([[[500, 300], [900, 300], [900, 350], [500, 300]]], "B"),
        feature(SQUARE, "Other"),
        feature(SQUARE, None),
        feature([1, 1], "A", "Point"),
    )
    raster, facts, warnings = annotated_raster(path, label, grid, 8, bounds=(64, 0, 512, 384), size=(576, 384))
    assert (raster[:25, :25] == 0).all() and (raster == 0).sum() == 25 * 25  # 100 px of 4 px each, from the bounds on
    assert facts == {
        "path": str(path),
        "kind": "polygons",
        "areas": {"A": 2, "B": 3},
        "unknown": {"Other": 1},
        "repaired": 1,
        "without_class": 1,
        "without_area": 1,
        "off_slide": 1,
        "partly_off_slide": 1,
    }
    assert [warning.split(":")[0] for warning in warnings] == [
        "annotation classes not in label.classes, left out",
        "1 of 6 annotated areas lie wholly off the slide",
        "1 annotated area(s) reach beyond the slide, cut at its border",
        "1 self-crossing annotated area(s) repaired",
        "1 annotated area(s) without a class left out",
    ]
    assert "{'Other': 1}; map them with label.rename" in warnings[0]
    raster, none, warnings = annotated_raster(None, label, grid, 8, bounds=(64, 0, 512, 384), size=(576, 384))
    assert (raster == NO_CLASS).all() and none is None and warnings == []


def test_many_unknown_classes_are_listed_in_part(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", *(feature(SQUARE, f"class {n}") for n in [*range(40), 33]))
    frame = {"bounds": (0, 0, 512, 384), "size": (512, 384)}
    _, facts, (warning,) = annotated_raster(path, LabelConfig(), Grid(Ladder((40.0,)), 32.0, 512, 384), 8, **frame)  # type: ignore[arg-type]
    assert facts is not None and len(facts["unknown"]) == 40
    assert "{'class 33': 2, 'class 0': 1," in warning and "and 30 more" in warning
