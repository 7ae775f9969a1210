"""QuPath GeoJSON in the forms that QuPath and its scripts write."""

import gzip
import json
from pathlib import Path

import pytest

from mad.files import MadError
from mad.slides.annotations import in_slide_frame, read_geojson

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
    (region,) = read_geojson(path)
    assert region.name == "Gray Matter"
    assert region.geometry.area == 100 * 100 - 20 * 20  # the hole is kept


def test_classes_shapes_and_repairs(tmp_path: Path) -> None:
    features = [
        feature(BOWTIE, "crossed"),
        feature([SQUARE, [[[200, 0], [300, 0], [300, 50], [200, 0]]]], {"names": ["Tumor", "Edge"]}, "MultiPolygon"),
        feature(SQUARE, None),
        feature([5, 5], {"name": "point"}, "Point"),
        {**feature(SQUARE, {"name": "empty"}), "geometry": None},
    ]
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    regions = read_geojson(path)
    assert [region.name for region in regions] == ["crossed", "Edge"]
    assert all(region.geometry.is_valid and region.geometry.area > 0 for region in regions)
    assert regions[1].geometry.area == 10_000 + 2_500


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
    regions = read_geojson(path)
    assert in_slide_frame(regions, (0, 0, 800, 600), (800, 600)) == regions
    (moved,) = in_slide_frame(regions, (1000, 2000, 500, 400), (5000, 6000))
    assert moved.geometry.bounds == (1000, 2000, 1100, 2100) and moved.geometry.area == regions[0].geometry.area
