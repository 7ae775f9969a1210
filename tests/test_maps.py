"""Scores of maps against definitions written out, and the polygons of a map."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from shapely.geometry import shape
from skimage.measure import label as components

from mad.files import read_json
from mad.metrics.confusion import class_iou
from mad.metrics.maps import boundary_f, cell_numbers, fragments, pixel_confusion
from mad.reporting.map_polygons import write_map

RASTERS = arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(-1, 2))


def edges(raster):
    found = []
    for (r, c), value in np.ndenumerate(raster):
        for r2, c2 in ((r + 1, c), (r, c + 1)):
            inside = r2 < raster.shape[0] and c2 < raster.shape[1]
            if inside and value >= 0 and raster[r2, c2] >= 0 and raster[r2, c2] != value:
                found.append(((r + r2) / 2, (c + c2) / 2))
    return found


def by_definition(truth, predicted, tolerance):
    outside = (truth < 0) | (predicted < 0)
    true, guess = edges(np.where(outside, -1, truth)), edges(np.where(outside, -1, predicted))
    if not true or not guess:
        return float(len(true) == len(guess))

    def near(these, those):
        return np.mean([min(np.hypot(a - c, b - d) for c, d in those) <= tolerance for a, b in these])

    precision, recall = near(guess, true), near(true, guess)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@given(st.data())
def test_boundary_f_follows_its_definition(data):
    truth = data.draw(RASTERS)
    predicted = data.draw(arrays(np.int64, truth.shape, elements=st.integers(-1, 2)))
    tolerance = data.draw(st.sampled_from([0.0, 0.8, 1.0, 2.0]))
    assert boundary_f(truth, predicted, tolerance) == pytest.approx(by_definition(truth, predicted, tolerance))
    assert boundary_f(truth, truth) == 1.0


@given(RASTERS)
def test_fragments_are_the_regions_of_one_class(raster):
    assert fragments(raster) == components(raster, background=-1, connectivity=1).max()


def test_a_shifted_border_is_within_one_tile_and_not_within_none():
    truth, shifted = np.zeros((4, 6), int), np.zeros((4, 6), int)
    truth[:, 3:], shifted[:, 4:] = 1, 1
    assert boundary_f(truth, shifted, 1.0) == 1.0 and boundary_f(truth, shifted, 0.9) == 0.0


def test_pixels_of_a_border_tile_count_by_their_share():
    shares = np.array([[1, 0, 0], [0.7, 0.2, 0], [0, 0, 0.5]])
    matrix = pixel_confusion(shares, np.array([0, 0, 1]), 3)
    np.testing.assert_allclose(matrix, [[1.7, 0, 0], [0.2, 0, 0], [0, 0.5, 0]])
    pixels = np.concatenate([np.repeat([[0, 0]], 170, 0), np.repeat([[1, 0]], 20, 0), np.repeat([[2, 1]], 50, 0)])
    counted = np.zeros((3, 3))
    np.add.at(counted, tuple(pixels.T), 1)
    np.testing.assert_allclose(class_iou(matrix), class_iou(counted))


def test_the_polygons_of_a_map_are_its_tiles(tmp_path):
    """Areas, holes and colours, as QuPath reads them."""
    cells = np.array([["a", "a", "a"], ["a", "b", "a"], ["a", "a", "a"], ["b", "b", None]], object)
    rows, columns = np.indices(cells.shape)
    tiles = pd.DataFrame(
        {"x": 100 + 50 * columns.ravel(), "y": 10 + 50 * rows.ravel(), "side": 50, "predicted": cells.ravel()}
    )
    path = tmp_path / "map.geojson"
    write_map(path, tiles, {"a": "#ff0000", "b": "#0000ff", "c": "#00ff00"})
    collection = read_json(path)
    assert collection["type"] == "FeatureCollection" and json.loads(path.read_text()) == collection
    features = {feature["properties"]["classification"]["name"]: feature for feature in collection["features"]}
    assert set(features) == {"a", "b"}
    assert features["a"]["properties"]["classification"]["color"] == [255, 0, 0]
    ring, islands = shape(features["a"]["geometry"]), shape(features["b"]["geometry"])
    assert ring.is_valid and ring.geom_type == "Polygon" and len(ring.interiors) == 1 and ring.area == 8 * 2500
    assert islands.geom_type == "MultiPolygon" and islands.area == 3 * 2500
    assert ring.intersection(islands).area == 0 and ring.bounds == (100, 10, 250, 160)


@given(st.floats(100, 2000), st.integers(1, 400), st.data())
def test_cells_are_counted_right_however_tiles_are_rounded(step, count, data):
    cells = data.draw(st.lists(st.integers(0, count), min_size=1, max_size=30))
    starts = np.round(37.4 + np.array(cells) * step)
    assert cell_numbers(starts, round(step)).tolist() == (np.array(cells) - min(cells)).tolist()


def test_tiles_at_rounded_pixels_leave_no_gaps(tmp_path):
    """On a large slide off the pixel grid, where the error of a rounded side would add up to half a tile and more."""
    step, count = 221.52, 400
    starts = np.round(np.arange(count) * step)
    tiles = pd.DataFrame({"x": np.tile(starts, 3), "y": np.repeat(starts[:3], count), "side": 222, "predicted": "a"})
    write_map(tmp_path / "map.geojson", tiles, {"a": "#ff0000"}, origin=(1000, 500))
    (feature,) = read_json(tmp_path / "map.geojson")["features"]
    band = shape(feature["geometry"])
    assert band.geom_type == "Polygon" and not band.interiors and len(band.exterior.coords) == 5
    assert band.bounds == (-1000, -500, starts[-1] + 222 - 1000, starts[2] + 222 - 500)
    raster = np.full((3, count), -1)
    raster[cell_numbers(tiles["y"], 222), cell_numbers(tiles["x"], 222)] = 0
    assert fragments(raster) == 1 and (raster == 0).all()
