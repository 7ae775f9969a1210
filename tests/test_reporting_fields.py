"""The picture of a field and its children."""

import hashlib

import cv2
import fakes
import numpy as np
import pandas as pd

from mad.files import read_parquet
from mad.reporting.fields import SHOWN, choose_fields, draw_fields, lowest_parents
from mad.tiles.store import TileStore


def test_fields_of_several_slides_are_drawn(tmp_path):
    fakes.write_cohort(tmp_path, pairs=5)
    store = TileStore(tmp_path)
    tables = [read_parquet(tmp_path / "shard" / f"{slide}.parquet") for slide in store.slides]
    chosen = choose_fields(pd.concat([lowest_parents(table) for table in tables], ignore_index=True), "10x-40x")
    assert len(chosen) == SHOWN == len({name.rsplit("_L", 1)[0] for name in chosen})
    for table, first in zip(tables, sorted(chosen), strict=True):
        mine = table.loc[(table["kind"] == "10x-40x") & (table["role"] == "parent"), "tile_id"]
        ranked = sorted(mine, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        assert len(ranked) > SHOWN and first == ranked[0]
        assert choose_fields(lowest_parents(table), "10x-40x") == ranked[:SHOWN]
    draw_fields([(name, *store.pair(name)) for name in chosen], "10x-40x", tmp_path / "fields.png")
    image = cv2.imread(str(tmp_path / "fields.png"))
    assert image.shape[1] == 1540 and (image == (0, 212, 255)).all(axis=2).sum() > 1000  # block borders, BGR


def test_without_a_field_the_picture_is_empty(tmp_path):
    draw_fields([], "5x-20x", tmp_path / "fields.png")
    assert np.unique(cv2.imread(str(tmp_path / "fields.png"))[200:]).tolist() == [255]
