"""Tiles from elsewhere: a CSV of images through the protocols, and every fault of such a table by its own name."""

import itertools

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from mad.cli import app
from mad.evaluation.tile_table import check_images, embedded_tiles, read_tile_table
from mad.files import MadError, read_json, to_json

FRACTIONS = {"train": 0.5, "val": 0.0, "test": 0.5}
LABELS = {"dark": 60, "bright": 180}
SPLITS = {"A": "train", "B": "train", "C": "test", "D": "test"}


def make_table(folder, *, side=24):
    """Parents at 1 um/px and four children at .25 each: two classes told apart by brightness, four patients."""
    rng = np.random.default_rng(0)
    rows = []
    for patient, label, number in itertools.product(SPLITS, LABELS, range(3)):
        parent = f"{patient}/{label}{number}.png"
        for name, mpp, of in [
            (parent, 1.0, None),
            *((f"{patient}/{label}{number}_{k}.png", 0.25, parent) for k in range(4)),
        ]:
            pixels = np.clip(rng.normal(LABELS[label], 15, (side, side, 3)), 0, 255).astype(np.uint8)
            (folder / patient).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / name)
            rows.append(
                {
                    "path": name,
                    "mpp": mpp,
                    "label": label,
                    "patient_id": patient,
                    "parent": of,
                    "split": SPLITS[patient],
                }
            )
    table = pd.DataFrame(rows)
    table.to_csv(folder / "tiles.csv", index=False)
    return table


def test_a_table_of_images_runs_every_protocol(tmp_path):
    table = make_table(tmp_path)
    evaluate = {"probe_steps": 200, "probe_lr": 0.01, "kmeans_starts": 2, "bootstrap_resamples": 20, "knn_k": 3}
    config = {"results": str(tmp_path), "encoders": [{"name": "colour", "spec": "colour"}], "evaluate": evaluate}
    (tmp_path / "config.json").write_text(to_json(config))
    given = ["evaluate", "colour", "--config", str(tmp_path / "config.json"), "--tiles", str(tmp_path / "tiles.csv")]
    result = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "colour"
    reports = {
        name: read_json(folder / f"{name}.json") for name in ("classification", "clustering", "consistency", "transfer")
    }
    assert {name: report["status"] for name, report in reports.items()} == dict.fromkeys(reports, "ok")
    assert reports["classification"]["sound"]["macro_f1"]["mean"] == 1.0  # brightness tells the classes apart
    assert reports["transfer"]["sound"]["with_background"]["fine"]["mean_iou"]["mean"] == 1.0
    assert reports["consistency"]["transition"] == "10x-40x"
    assert reports["consistency"]["counts"] | {"parents": 12, "children": 48} == reports["consistency"]["counts"]
    assert set(reports["transfer"]["matrix"]) == {"10x", "40x"}
    vectors = np.load(folder / "embeddings.npy")
    with Image.open(tmp_path / table["path"][0]) as image:
        assert vectors[0, :3] == pytest.approx(np.asarray(image).mean(axis=(0, 1)) / 255, abs=1e-5)
    assert (folder / "tables" / "table5.md").exists()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("path", None, "lines with no path: 3"),
        ("path", "A/dark0.png", "a path that an earlier line has: 3"),
        ("mpp", "fine", "a mpp that is no positive number: 3"),
        ("patient_id", "", "no patient_id: 3"),
        ("split", "training", "a split that is none of train, val, test: 3"),
        ("parent", "nowhere.png", "a parent that is no path of the table: 3"),
        ("patient_id", "C", "patient C has tiles in two splits"),
    ],
)
def test_a_faulty_line_is_named(tmp_path, column, value, message):
    table = make_table(tmp_path).astype(object)
    table.loc[1, column] = value
    table.to_csv(tmp_path / "tiles.csv", index=False)
    with pytest.raises(MadError, match=message):
        read_tile_table(tmp_path / "tiles.csv", fractions=FRACTIONS, seed=0)


def test_missing_columns_and_files(tmp_path):
    with pytest.raises(MadError, match="no such table"):
        read_tile_table(tmp_path / "tiles.csv", fractions=FRACTIONS, seed=0)
    (tmp_path / "tiles.csv").write_text("path,label\na.png,x\n")
    with pytest.raises(MadError, match="has no column patient_id, mpp"):
        read_tile_table(tmp_path / "tiles.csv", fractions=FRACTIONS, seed=0)


def test_images_that_are_missing_of_another_size_or_seen_twice(tmp_path):
    table = make_table(tmp_path)
    assert check_images(table, tmp_path) == 24
    twin = table["path"][table["split"] == "test"].iloc[0]
    (tmp_path / twin).write_bytes((tmp_path / table["path"][0]).read_bytes())
    with pytest.raises(MadError, match="show the same pixels in two splits"):
        check_images(table, tmp_path)
    Image.new("RGB", (24, 20)).save(tmp_path / twin)
    with pytest.raises(MadError, match="24 x 20 px; all tiles of a table are squares of one size"):
        check_images(table, tmp_path)
    (tmp_path / twin).write_text("no image")
    with pytest.raises(MadError, match="cannot be read as an image"):
        check_images(table, tmp_path)


def test_patients_are_drawn_to_splits_where_the_table_has_none(tmp_path):
    rows = [{"path": f"{n}.png", "magnification": 10, "label": "x", "patient_id": f"P{n // 2}"} for n in range(60)]
    pd.DataFrame(rows).to_csv(tmp_path / "tiles.tsv", sep="\t", index=False)
    table = read_tile_table(tmp_path / "tiles.tsv", fractions=FRACTIONS, seed=0)
    assert set(table["split"]) == {"train", "test"}
    assert (table.groupby("patient_id")["split"].nunique() == 1).all()
    assert (table["magnification"] == 10).all() and (table["slide_id"] == table["patient_id"]).all()


def test_pairs_are_parents_and_their_children(tmp_path):
    table = make_table(tmp_path)
    read = read_tile_table(tmp_path / "tiles.csv", fractions=FRACTIONS, seed=0)
    data = embedded_tiles(read, np.zeros((len(read), 2), np.float32), None)
    assert set(data.pairs["kind"]) == {"10x-40x"} and len(data.pairs) == table["parent"].notna().sum()
    names = data.tiles["tile_id"].to_numpy()
    for parent, child in zip(data.pairs["parent"], data.pairs["child"], strict=True):
        assert names[child].startswith(names[parent].removesuffix(".png"))
