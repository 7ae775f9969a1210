"""Tiles from elsewhere: a CSV of images through the protocols, and every fault of such a table by its own name."""

import itertools

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from mad.cli import app
from mad.evaluation.duplicates import UNIFORM
from mad.evaluation.tile_table import check_images, embedded_tiles, image_facts, read_image, uniform_twins
from mad.evaluation.tile_table import read_tile_table as read_any
from mad.files import MadError, read_json, to_json
from mad.reporting.scale_figure import scale_figure

FRACTIONS = {"train": 0.5, "val": 0.0, "test": 0.5}
LADDER = {"magnifications": [2.5, 10, 40], "tolerance": 0.12}
LABELS = {"dark": 60, "bright": 180}
SPLITS = {"A": "train", "B": "train", "C": "test", "D": "test"}


def read_tile_table(path):
    return read_any(path, fractions=FRACTIONS, seed=0, **LADDER)


COLOUR = {"name": "colour", "spec": "colour"}


def read_text(folder, text):
    (folder / "tiles.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_tile_table(folder / "tiles.csv")


def facts_of(table, folder):
    """Of what is in the files now."""
    return pd.DataFrame([image_facts(read_image(folder / name)) for name in table["path"]])


def check(table, folder):
    """The side, of what is in the files now."""
    return check_images(table, facts_of(table, folder))


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


def evaluate_table(folder, encoder="colour", encoders=(COLOUR,), **changes):
    """The command on `folder`/tiles.csv: where it wrote, the JSON of every protocol, and what it told."""
    evaluate = {
        "probe_steps": 200,
        "probe_lr": 0.01,
        "kmeans_starts": 2,
        "bootstrap_resamples": 20,
        "knn_k": 3,
    } | changes
    config = {"results": str(folder), "encoders": list(encoders), "evaluate": evaluate}
    (folder / "config.json").write_text(to_json(config))
    given = ["evaluate", encoder, "--config", str(folder / "config.json"), "--tiles", str(folder / "tiles.csv")]
    result = CliRunner().invoke(app, [*given, "--out", str(folder / "out")])
    assert result.exit_code == 0, result.output
    out = folder / "out" / encoder
    protocols = ("classification", "clustering", "consistency", "transfer", "magnification")
    return out, {name: read_json(out / f"{name}.json") for name in protocols}, result.output


def test_a_table_of_images_runs_every_protocol(tmp_path):
    table = make_table(tmp_path)
    folder, reports, _ = evaluate_table(tmp_path)
    assert {name: report["status"] for name, report in reports.items()} == dict.fromkeys(reports, "ok")
    assert reports["classification"]["sound"]["macro_f1"]["mean"] == 1.0  # brightness tells the classes apart
    assert reports["transfer"]["sound"]["with_background"]["fine"]["mean_iou"]["mean"] == 1.0
    assert reports["consistency"]["transition"] == "10x-40x"
    assert reports["consistency"]["counts"] | {"parents": 12, "children": 48} == reports["consistency"]["counts"]
    assert set(reports["transfer"]["matrix"]) == {"10x", "40x"}
    vectors = np.load(folder / "embeddings.npy")
    with Image.open(tmp_path / table["path"][0]) as image:
        assert vectors[0, :3] == pytest.approx(np.asarray(image).mean(axis=(0, 1)) / 255, abs=1e-5)
    assert (tmp_path / "out" / "tables" / "table5.md").exists()


def test_encoders_of_the_same_tiles_and_settings_stand_in_one_table(tmp_path, monkeypatch):
    (tmp_path / "flat.py").write_text(
        "import numpy as np\n\ndef encoder(tile_px):\n    return lambda tiles: np.ones((len(tiles), 2), np.float32)\n"
    )
    monkeypatch.chdir(tmp_path)
    encoders = [{"name": "flat", "spec": "python:flat:encoder"}, COLOUR, {"name": "again", "spec": "colour"}]

    def rows(encoder, **changes):
        _, _, told = evaluate_table(tmp_path, encoder, encoders, **changes)
        table = pd.read_csv(tmp_path / "out" / "tables" / "table3.csv")
        return table.loc[table["source"] == "ours", "encoder"].tolist(), told

    make_table(tmp_path)
    assert rows("colour")[0] == ["colour"]
    assert rows("flat")[0] == ["flat", "colour"]
    text = (tmp_path / "out" / "tables" / "table3.md").read_text().split("## Sound probe")[1]
    flat, colour = (next(line for line in text.splitlines() if line.startswith(f"| {n} ")) for n in ("flat", "colour"))
    assert "**1.0000" in colour and "**" not in flat
    encoders.pop(0)
    assert rows("again")[0] == ["colour", "again", "flat"], "those that left the configuration come last"
    found, told = rows("again", knn_k=5)
    assert found == ["again"] and "colour: not compared: other tiles or settings" in told
    assert rows("again")[0] == ["colour", "again", "flat"]
    pixels = np.random.default_rng(1).integers(100, 150, (24, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "A" / "dark0.png")
    assert rows("again")[0] == ["again"]


def test_glass_in_two_splits_is_counted_in_every_json(tmp_path):
    table = make_table(tmp_path)
    for split in ("train", "test"):
        Image.new("RGB", (24, 24), "white").save(tmp_path / table["path"][table["split"] == split].iloc[-1])
    _, reports, _ = evaluate_table(tmp_path, probe_steps=5, runs=1)
    assert [report["duplicates"] for report in reports.values()] == [{"uniform": 2}] * len(reports)


def test_without_parents_table_5_and_the_scale_matrix_are_there(tmp_path):
    make_table(tmp_path).drop(columns="parent").to_csv(tmp_path / "tiles.csv", index=False)
    folder, reports, told = evaluate_table(tmp_path)
    transfer = reports["transfer"]
    assert transfer["table5"] == {"status": "ok", "reason": None, "paired": False}
    assert transfer["n"] == {"coarse": 12, "fine": 48} and transfer["patients"]["test"] == 2
    sound = transfer["sound"]["with_background"]
    assert sound["coarse"]["mean_iou"]["mean"] == sound["fine"]["mean_iou"]["mean"] == 1.0
    assert transfer["sound"]["agreement"]["mean"] is None and sound["consistency"]["mean"] is None
    assert transfer["matrix"] == {trained: {"10x": 1.0, "40x": 1.0} for trained in ("10x", "40x")}
    assert reports["consistency"]["status"] == "not applicable" and "consistency: not applicable" in told
    text = (folder.parent / "tables" / "table5.md").read_text()
    assert "consistency: null: a ratio of scores on the same tissue, which needs aligned pairs." in text
    row = next(line for line in text.split("## Sound probe")[1].splitlines() if line.startswith("| colour"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["1.0000"] * 6 + ["–", "–"]


def test_the_scale_matrix_stands_where_table_5_lacks_a_magnification(tmp_path):
    table = make_table(tmp_path).drop(columns="parent")
    table["mpp"] = table["mpp"].replace(0.25, 4.0)
    table.to_csv(tmp_path / "tiles.csv", index=False)
    folder, reports, told = evaluate_table(tmp_path)
    reason = "no labelled test tiles at 40x"
    assert reports["transfer"]["status"] == "ok" and set(reports["transfer"]["matrix"]) == {"2.5x", "10x"}
    assert reports["transfer"]["matrix"]["2.5x"]["10x"] == 1.0 and f"Table 5: not applicable: {reason}" in told
    assert f"colour: not applicable: {reason}." in (folder.parent / "tables" / "table5.md").read_text()
    assert "Tested on 2.5x" in (folder.parent / "tables" / "scales.md").read_text()
    scale_figure({"colour": reports}, tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as image:
        assert image.height > 300, "a panel, not a line that says there is none"


def test_a_second_call_embeds_nothing_and_evaluates_anew(tmp_path):
    make_table(tmp_path)
    folder, before, _ = evaluate_table(tmp_path)
    written = (folder / "embeddings.npy").stat().st_mtime_ns
    _, after, told = evaluate_table(tmp_path, knn_k=5, runs=2)
    assert "120 of 120 images are as they were" in told and "120 of 120 different tiles were embedded before" in told
    assert (folder / "embeddings.npy").stat().st_mtime_ns == written
    assert before["transfer"]["matrix"] == after["transfer"]["matrix"] and after["transfer"]["runs"] == 2


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("path", None, "lines with no path: 3"),
        ("path", "A/dark0.png", "a path that an earlier line has: 3"),
        ("mpp", "fine", "a mpp that is no positive number: 3"),
        ("patient_id", "", "no patient_id: 3"),
        ("split", "training", "a split that is none of train, val, test: 3"),
        ("parent", "nowhere.png", "a parent that is no path of the table: 3"),
        ("parent", "B/dark0.png", "a parent of another patient or slide: 3"),
        ("parent", "A/dark0_0.png", "a parent that is no coarser tile: 3"),
        ("parent", "A/dark0_1.png", "a parent that is no coarser tile: 3"),
        ("mpp", "inf", "a mpp that is no positive number: 3"),
        ("mpp", "0.5", r"a mpp of no magnification in tile.magnifications \(2.5, 10, 40; put it there\): 3"),
    ],
)
def test_a_faulty_line_is_named(tmp_path, column, value, message):
    table = make_table(tmp_path).astype(object)
    table.loc[1, column] = value
    table.to_csv(tmp_path / "tiles.csv", index=False)
    with pytest.raises(MadError, match=message):
        read_tile_table(tmp_path / "tiles.csv")


@pytest.mark.parametrize("spelling", ["./{}", "A/../{}", "../here/{}", "{home}/{}"])
def test_a_file_has_one_name_however_it_is_spelt(tmp_path, spelling):
    folder = tmp_path / "here"
    folder.mkdir()

    def spell(name):
        return spelling.format(name, home=folder)

    table = make_table(folder)
    twice = pd.concat([table, table.iloc[[1]].assign(path=spell(table["path"][1]))])
    twice.to_csv(folder / "tiles.csv", index=False)
    with pytest.raises(MadError, match=f"a path that an earlier line has: {len(table) + 2}$"):
        read_tile_table(folder / "tiles.csv")
    table.assign(path=table["path"].map(spell)).to_csv(folder / "tiles.csv", index=False)
    read = read_tile_table(folder / "tiles.csv")
    assert read["path"].tolist() == table["path"].tolist() and check(read, folder) == 24
    table.assign(parent=table["parent"].map(spell, na_action="ignore")).to_csv(folder / "tiles.csv", index=False)
    assert read_tile_table(folder / "tiles.csv")["parent"].dropna().tolist() == table["parent"].dropna().tolist()


def test_files_outside_the_folder_keep_their_whole_path(tmp_path):
    (tmp_path / "here").mkdir()
    read = read_text(tmp_path / "here", "path,mpp,label,patient_id\n../there/a.png,1,x,P\n/b.png,1,x,P\n")
    assert read["path"].tolist() == [str(tmp_path / "there" / "a.png"), "/b.png"]


def test_empty_lines_are_passed_over_and_the_others_keep_their_numbers(tmp_path):
    head = "path,mpp,label,patient_id\n"
    assert read_text(tmp_path, head + "a,1,x,P\n\n,,,\nb,1,x,P\n , ,,\n\n")["path"].tolist() == ["a", "b"]
    with pytest.raises(MadError, match="lines with no patient_id: 5$"):
        read_text(tmp_path, head + "a,1,x,P\n\n,,,\nb,1,x,\n,,,\n")
    with pytest.raises(MadError, match="no line below its header"):
        read_text(tmp_path, head + ",,,\n")


def test_missing_columns_and_files(tmp_path):
    with pytest.raises(MadError, match="no such table"):
        read_tile_table(tmp_path / "tiles.csv")
    (tmp_path / "tiles.csv").write_text("path,label\na.png,x\n")
    with pytest.raises(MadError, match="has no column patient_id, mpp"):
        read_tile_table(tmp_path / "tiles.csv")


def test_images_that_are_missing_of_another_size_or_seen_twice(tmp_path):
    table = make_table(tmp_path)
    assert check(table, tmp_path) == 24
    twin = table["path"][table["split"] == "test"].iloc[0]
    (tmp_path / twin).write_bytes((tmp_path / table["path"][0]).read_bytes())
    with pytest.raises(
        MadError, match=f"1 pair.* show the same pixels in two splits: {twin} and {table['path'][0]}; remove"
    ):
        check(table, tmp_path)
    Image.new("RGB", (24, 20)).save(tmp_path / twin)
    with pytest.raises(MadError, match=f"{twin}: 24 x 20 px; all tiles of a table are squares of one size"):
        check(table, tmp_path)
    (tmp_path / twin).write_text("no image")
    with pytest.raises(MadError, match="cannot be read as an image"):
        check(table, tmp_path)


def test_twins_in_two_splits_are_named_together_and_glass_is_none(tmp_path):
    table = make_table(tmp_path)
    train, test = (table["path"][table["split"] == split].tolist() for split in ("train", "test"))
    for name in (*train[:3], *test[:2]):
        Image.new("RGB", (24, 24), "white").save(tmp_path / name)
    faint = np.full((24, 24, 3), 240, np.uint8)
    faint[:9] = 241  # not of one colour, but far from any structure
    for name in (train[3], test[3]):
        Image.fromarray(faint).save(tmp_path / name)
    assert image_facts(faint)["blur"] < UNIFORM and check(table, tmp_path) == 24
    Image.new("RGB", (24, 24), "black").save(tmp_path / train[4])  # without a twin
    for name in train[5:7]:
        Image.new("RGB", (24, 24), "red").save(tmp_path / name)  # within one split
    assert uniform_twins(table, facts_of(table, tmp_path)) == 3 + 2 + 2
    for a, b in zip(train[10:22], test[10:22], strict=True):
        (tmp_path / b).write_bytes((tmp_path / a).read_bytes())
    with pytest.raises(MadError, match="12 pair") as fault:
        check(table, tmp_path)
    named = [f"{b} and {a}" for a, b in zip(train[10:22], test[10:22], strict=True)]
    assert [pair in str(fault.value) for pair in named] == [True] * 10 + [False] * 2 and " and 2 more;" in str(
        fault.value
    )


def test_patients_are_drawn_to_splits_where_the_table_has_none(tmp_path):
    rows = [{"path": f"{n}.png", "magnification": 10, "label": "x", "patient_id": f"P{n // 2}"} for n in range(60)]
    pd.DataFrame(rows).to_csv(tmp_path / "tiles.tsv", sep="\t", index=False)
    table = read_tile_table(tmp_path / "tiles.tsv")
    assert set(table["split"]) == {"train", "test"}
    assert (table.groupby("patient_id")["split"].nunique() == 1).all()
    assert (table["magnification"] == 10).all() and (table["slide_id"] == table["patient_id"]).all()


def test_pairs_are_parents_and_their_children(tmp_path):
    table = make_table(tmp_path)
    read = read_tile_table(tmp_path / "tiles.csv")
    data = embedded_tiles(read, np.zeros((len(read), 2), np.float32), None)
    assert set(data.pairs["kind"]) == {"10x-40x"} and len(data.pairs) == table["parent"].notna().sum()
    names = data.tiles["tile_id"].to_numpy()
    for parent, child in zip(data.pairs["parent"], data.pairs["child"], strict=True):
        assert names[child].startswith(names[parent].removesuffix(".png"))


def test_a_patient_in_two_splits_is_refused(tmp_path):
    with pytest.raises(MadError, match="patient A has tiles in two splits"):
        read_text(tmp_path, "path,mpp,label,patient_id,split\na,1,x,A,train\nb,1,x,A,test\n")


def test_text_is_stripped_and_labels_are_as_written(tmp_path):
    head = "Path , MPP,label,patient_id,slide_id,split,parent,\n"
    read = read_text(tmp_path, head + "a ,1,None, P01,,train,,\nb,.25,NA,P01 , ,train , a ,\nc,1, ,P02,S2,test,,\n")
    assert read["patient_id"].tolist() == ["P01", "P01", "P02"] and read["slide_id"].tolist() == ["P01", "P01", "S2"]
    assert read["label"].dropna().tolist() == ["None", "NA"] and read["parent"].dropna().tolist() == ["a"]
    with pytest.raises(MadError, match="a slide_id that two patients share: 2, 3"):
        read_text(tmp_path, "path,mpp,label,patient_id,slide_id\na,1,x,P1,S\nb,1,x,P2,S\nc,1,x,P3,\n")
    with pytest.raises(MadError, match="a parent of another patient or slide: 3"):
        read_text(tmp_path, "path,mpp,label,patient_id,slide_id,parent\na,1,x,P,S,\nb,.25,x,P,T,a\n")


def test_scales_are_those_of_the_ladder(tmp_path):
    read = read_text(tmp_path, "path,mpp,label,patient_id\na,1.01,x,P\nb,0.23,x,P\nc,4.4,x,P\n")
    assert read["magnification"].tolist() == [10, 40, 2.5]
    with pytest.raises(MadError, match=r"a magnification of no magnification in tile.magnifications .*: 3"):
        read_text(tmp_path, "path,magnification,label,patient_id\na,10,x,P\nb,20,x,P\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a table"),
        ("path,mpp,label,patient_id\na,1,\u00e4,P\n".encode("latin-1"), "save it as UTF-8"),
        ("path,mpp,label,patient_id\na,1,x,P,Q\n", "Expected 4 fields in line 2, saw 5"),
        ("path,mpp,label,patient_id,MPP,mpp\na,1,x,P,1,2\n", "more than one column mpp"),
        ("path,mpp,label,patient_id\n", "no line below its header"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, message):
    with pytest.raises(MadError, match=message):
        read_text(tmp_path, text)


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "L", "RGBA", "P", "1", "CMYK"])
def test_images_that_are_not_of_8_bits_are_refused(tmp_path, mode):
    path = tmp_path / "tile.tif"
    Image.new(mode, (4, 4)).save(path)
    if mode in ("L", "RGBA", "P", "1"):
        assert read_image(path).shape == (4, 4, 3)
    else:
        with pytest.raises(MadError, match=f"is an image of mode {mode}; tiles are 8-bit"):
            read_image(path)
