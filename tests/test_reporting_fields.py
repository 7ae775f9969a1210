"""The picture of a field and its children."""

import cv2
import fakes
import numpy as np

from mad.reporting.fields import SHOWN, choose_fields, draw_fields
from mad.tiles.store import TileStore


def test_fields_of_several_slides_are_drawn(tmp_path):
    fakes.write_cohort(tmp_path, pairs=3)
    store = TileStore(tmp_path)
    chosen = choose_fields(store, "10x-40x")
    assert len(chosen) == SHOWN == len({name.rsplit("_L", 1)[0] for name in chosen})
    assert chosen == choose_fields(store, "10x-40x") and all("_L1_" in name for name in chosen)
    draw_fields([(name, *store.pair(name)) for name in chosen], "10x-40x", tmp_path / "fields.png")
    image = cv2.imread(str(tmp_path / "fields.png"))
    assert image.shape[1] == 1540 and (image == (0, 212, 255)).all(axis=2).sum() > 1000  # block borders, BGR


def test_without_a_field_the_picture_is_empty(tmp_path):
    draw_fields([], "5x-20x", tmp_path / "fields.png")
    assert np.unique(cv2.imread(str(tmp_path / "fields.png"))[200:]).tolist() == [255]
