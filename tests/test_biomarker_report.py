"""Comparison, tables, figures and attention maps of a small cross-validation."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from fake_slides import fake_slides, slide_config

from mad.config import Config
from mad.evaluation.biomarkers import difference
from mad.files import MadError, read_json, read_parquet, write_json
from mad.reporting.biomarker_table import biomarker_table, tile_table
from mad.slides.synthetic.slide import write_pyramid
from mad.stages import biomarker_report, biomarkers

AGGREGATORS = [
    {"name": "abmil-fine", "encoder": "enc", "tokens": "finest"},
    {"name": "abmil-all", "encoder": "enc", "tokens": "all"},
    {"name": "mean", "encoder": "enc", "tokens": "all", "head": "mean", "against": "abmil-all"},
    {"name": "gone", "encoder": "other", "against": "mean"},
    {"name": "against-gone", "encoder": "enc", "head": "mean", "against": "gone"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    results = tmp_path_factory.mktemp("report")
    slide = results / "slide.tiff"
    picture = np.full((896, 896, 3), 200, np.uint8)
    picture[448:, :448] = (150, 90, 160)
    write_pyramid(slide, picture, 90)
    fake_slides(results, patients=20, path=str(slide))
    write_json(results / "embed" / "other" / "audit.json", {"status": "absent", "reason": "weights are gated"})
    config = slide_config(
        results,
        encoders=[{"name": "enc", "spec": "colour"}, {"name": "other", "spec": "colour"}],
        biomarkers={
            "targets": [{"name": "fine", "column": "fine"}, {"name": "level", "column": "level", "task": "regression"}],
            "aggregators": AGGREGATORS,
            "steps": 30,
            "map_slides": 2,
        },
    )
    for target in config.biomarkers.targets:
        for entry in config.biomarkers.aggregators:
            biomarkers.run(config, target.name, entry.name)
    biomarker_report.run(config)
    return config


def test_the_comparison_is_paired_with_the_baseline(made: Config):
    found = read_json(Path(made.results) / "report" / "biomarkers.json")
    assert found["baseline"] == "abmil-fine" and list(found["targets"]) == ["fine", "level"]
    fine = found["targets"]["fine"]
    assert fine["class_slides"] == {"0": 10, "1": 10} and fine["metric"] == "auroc"
    lines = fine["aggregators"]
    assert lines["gone"] == {"absent": "weights are gated"}
    assert "difference" not in lines["abmil-fine"]["by_share"]["1"]
    for name in ("abmil-all", "mean"):
        for share in ("1", "0.5"):
            numbers = lines[name]["by_share"][share]
            gap = numbers["difference"]["metrics"]["auroc"]
            base = lines["abmil-fine"]["by_share"]["1"]["metrics"]["auroc"]["value"]
            assert gap["value"] == pytest.approx(numbers["metrics"]["auroc"]["value"] - base)
            assert gap["interval"][0] <= gap["value"] <= gap["interval"][1]
    half = lines["mean"]["by_share"]["0.5"]
    whole = lines["mean"]["by_share"]["1"]["metrics"]["auroc"]["value"]
    assert half["drop"]["metrics"]["auroc"]["value"] == pytest.approx(half["metrics"]["auroc"]["value"] - whole)


def test_a_row_is_paired_with_the_one_that_it_is_set_against(made: Config):
    """On the same draws and at the same share; where that row is absent there is nothing to tell."""
    folder = Path(made.results) / "biomarkers" / "fine"
    lines = read_json(Path(made.results) / "report" / "biomarkers.json")["targets"]["fine"]["aggregators"]
    for share in ("1", "0.5"):
        mean, other = (
            read_parquet(folder / f"{name}.parquet").query(f"share == {share}") for name in ("mean", "abmil-all")
        )
        gap = lines["mean"]["by_share"][share]["against"]
        assert gap == difference(mean, other, ["0", "1"], resamples=200, min_patients=5, seed=made.seed)
        low, high = gap["metrics"]["auroc"]["interval"]
        assert low < high
    assert lines["mean"]["against"] == "abmil-all" and lines["against-gone"]["against"] == "gone"
    others = [
        lines[name]["by_share"][share] for name in lines if name not in ("mean", "gone") for share in ("1", "0.5")
    ]
    assert len(others) == 6 and not any("against" in numbers for numbers in others)
    table = pd.read_csv(Path(made.results) / "report" / "tables" / "biomarkers.csv").set_index("aggregator")
    gap = lines["mean"]["by_share"]["1"]["against"]["metrics"]["auroc_pooled"]
    line = table.loc["mean"]
    assert line["fine against"] == "abmil-all" and table["fine against"].notna().sum() == 1
    assert [line[f"fine auroc_pooled against{end}"] for end in ("", " low", " high")] == pytest.approx(
        [gap["value"], *gap["interval"]]
    )
    tiles = pd.read_csv(Path(made.results) / "report" / "tables" / "biomarkers_tiles.csv")
    assert tiles["fine against"].notna().tolist() == [False] * 4 + [True] * 2 + [False] * 2


def test_without_such_rows_the_tables_have_no_such_columns(made: Config):
    found = read_json(Path(made.results) / "report" / "biomarkers.json")
    for table in (biomarker_table, tile_table):
        assert "against" in table(found).frame().filter(like="against").columns[0]
    for part in found["targets"].values():
        for line in part["aggregators"].values():
            for numbers in line.get("by_share", {}).values():
                numbers.pop("against", None)
    for table in (biomarker_table, tile_table):
        assert table(found).frame().filter(like="against").empty


def test_slides_without_a_value_are_told_by_their_words(made: Config):
    found = read_json(Path(made.results) / "report" / "biomarkers.json")
    assert [part["without_value"] for part in found["targets"].values()] == [{}, {}]
    assert "have no value" not in biomarker_table(found).markdown()
    found["targets"]["fine"]["without_value"] = {"": 1, "NA": 2}
    assert "- fine: 3 slides have no value (empty: 1, NA: 2) and are left out." in biomarker_table(found).markdown()


def test_slides_that_are_there_twice_and_shares_without_effect_are_noted(made: Config):
    found = read_json(Path(made.results) / "report" / "biomarkers.json")
    lines = found["targets"]["fine"]["aggregators"]
    assert lines["mean"]["copies"] == [] and "WARNING" not in biomarker_table(found).markdown()
    lines["mean"]["copies"] = [{"slides": ["A1", "B1"], "tokens": 12}]
    said = "- fine: WARNING: 1 pair(s) of slides of two patients have equal tokens, one trained on while the other is tested"
    assert f"{said} (A1 and B1)" in biomarker_table(found).markdown()
    assert "the same tiles at every share" not in tile_table(found).markdown()
    for numbers in lines["mean"]["by_share"].values():
        numbers["tiles"] = 3.0
    assert "- mean, fine: the same tiles at every share" in tile_table(found).markdown()


def test_tables_print_what_the_comparison_holds(made: Config):
    folder = Path(made.results) / "report"
    found = read_json(folder / "biomarkers.json")
    table = pd.read_csv(folder / "tables" / "biomarkers.csv").set_index("aggregator")
    metric = found["targets"]["fine"]["aggregators"]["mean"]["by_share"]["1"]["metrics"]["auroc"]
    line = table.loc["mean"]
    assert [line["fine auroc"], line["fine auroc low"], line["fine auroc high"]] == pytest.approx(
        [metric["value"], *metric["interval"]]
    )
    assert line["fine slides"] == line["fine patients"] == 20 and line["fine tokens"] == 51
    assert "weights are gated" in table.loc["gone", "absent"]
    text = (folder / "tables" / "biomarkers.md").read_text()
    assert "## fine (column fine; 0: 10, 1: 10)" in text and "## level (column level; a number)" in text
    assert "| AUROC less abmil-fine |" in text and "| gone | absent |" in text
    tiles = pd.read_csv(folder / "tables" / "biomarkers_tiles.csv")
    names = tiles["aggregator, share of finest tiles"].tolist()
    assert names == [
        f"{name}, {share} %" for name in ("abmil-fine", "abmil-all", "mean", "against-gone") for share in (100, 50)
    ]
    assert tiles["fine tiles"].tolist() == [48, 24, 51, 27, 51, 27, 51, 27]


def test_pictures_are_drawn(made: Config):
    folder = Path(made.results) / "report" / "figures"
    for name in ("biomarkers", "biomarkers_tiles", "attention_abmil-fine", "attention_abmil-all"):
        image = cv2.imread(str(folder / f"{name}.png"))
        assert image is not None and image.shape[1] > 300 and image.std() > 5
    assert not (folder / "attention_mean.png").exists()


def test_maps_are_of_the_first_positive_slides(made: Config):
    title, maps = biomarker_report.attention_maps(made, made.biomarkers.aggregator("abmil-all"))
    assert title == "abmil-all, fine" and [each.slide_id for each in maps] == ["S01", "S03"]
    assert maps[0].caption.startswith("S01\nfine: 1\npredicted: ")
    assert len(maps[0].tokens) == 51 and maps[0].tokens["attention"].sum() == pytest.approx(1, abs=1e-5)
    assert maps[0].thumbnail is not None and list(maps[0].extent) == [0, 896, 896, 0] and maps[0].mpp == 0.25
    assert set(maps[0].tokens.groupby("kind")["side"].unique().str[0]) == {448, 112}


def test_other_folds_are_refused(made: Config):
    path = Path(made.results) / "biomarkers" / "fine" / "mean.parquet"
    before = path.read_bytes()
    table = read_parquet(path)
    table["fold"] = (table["fold"] + 1) % 5
    table.to_parquet(path)
    with pytest.raises(MadError, match="abmil-fine and mean tested slide S00 in different folds"):
        biomarker_report.run(made)
    path.write_bytes(before)


def test_what_was_not_run_is_named(made: Config):
    path = Path(made.results) / "biomarkers" / "level" / "mean.json"
    kept = path.rename(path.with_suffix(".away"))
    with pytest.raises(MadError, match="run `mad biomarkers level mean` first"):
        biomarker_report.run(made)
    kept.rename(path)
