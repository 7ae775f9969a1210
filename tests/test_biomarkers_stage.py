import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_slides import DIM, LADDER, fake_slides, slide_config

from mad.config import Config, parse_config
from mad.config.biomarkers import TargetConfig
from mad.files import MadError, read_json, read_parquet, write_parquet
from mad.slides.sheet import write_sheet
from mad.stages import biomarkers, mix
from mad.stages.cohort import cohort_table
from mad.stages.slide_tokens import SlideTokens


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A cohort of 40 patients with an untrained mixer's tokens."""
    results = tmp_path_factory.mktemp("biomarkers")
    fake_slides(results)
    config = slide_config(results)
    entry = config.mixer("mixer")
    from mad.models.mixer import save_mixer
    from mad.training.region_data import mean_and_std, read_regions

    slides = [read_regions(config, entry, f"S{n:02d}") for n in range(40)]
    mixer = mix.build_mixer(entry, mix.freeze_mixer(config, entry), DIM).eval()
    mean, std = mean_and_std(slides, 2)
    mixer.mean.copy_(mean)
    mixer.std.copy_(std)
    folder = results / "mix" / "mixer"
    save_mixer(mixer, folder / mix.WEIGHTS, {})
    for slide in slides:
        mix.write_tokens(mixer, slide, folder)
    from mad.files import write_json

    write_json(folder / "summary.json", {"status": "ok", "encoder": "enc"})
    return config


def _run(config: Config, target: str, aggregator: str) -> dict:
    biomarkers.run(config, target, aggregator)
    return read_json(Path(config.results) / "biomarkers" / target / f"{aggregator}.json")


def rewrite(sheet: Path, column: str, cells: dict[int, str]) -> None:
    """Put other cells into some lines of a sheet."""
    table = pd.read_csv(sheet, sep="\t", dtype=str, keep_default_na=False)
    table.loc[list(cells), column] = list(cells.values())
    write_sheet(sheet, table.to_dict("records"))


def test_a_target_that_is_there_is_found_and_its_tiles_with_it(made: Config):
    report = _run(made, "fine", "abmil-fine")
    metric = report["by_share"]["1"]["metrics"]["auroc"]
    assert metric["value"] > 0.9 and metric["interval"][0] > 0.75
    assert report["patients"] == report["slides"] == 40 and report["class_slides"] == {"0": 20, "1": 20}
    assert len(report["heads"]) == 5 and report["heads"][0]["fit"] + report["heads"][0]["val"] == 32
    folder = Path(made.results) / "biomarkers" / "fine"
    predictions = read_parquet(folder / "abmil-fine.parquet")
    full = predictions[predictions["share"] == 1]
    assert len(full) == 40 and (full["tokens"] == 48).all()
    assert (predictions[predictions["share"] == 0.5]["tokens"] == 24).all()
    attention = read_parquet(folder / "attention" / "abmil-fine.parquet")
    assert attention.groupby("slide_id")["attention"].sum().to_numpy() == pytest.approx(np.ones(40), abs=1e-5)
    store = np.load(Path(made.results) / "embed" / "enc" / "dense" / "S01.npy")
    bag = SlideTokens(made, made.biomarkers.aggregator("abmil-fine")).read("S01")
    shown = attention[attention["slide_id"] == "S01"]
    assert shown["name"].tolist() == bag.names.tolist()
    bearing = store[bag.rows, 0] > 3
    assert shown["attention"][bearing].mean() > 2 * shown["attention"][~bearing].mean()


def test_a_target_drawn_by_lot_is_not_found(made: Config):
    metric = _run(made, "lots", "abmil-fine")["by_share"]["1"]["metrics"]["auroc"]
    assert metric["interval"][0] < 0.5 < metric["interval"][1]
    metric = _run(made, "lots", "mean")["by_share"]["1"]["metrics"]["auroc"]
    assert metric["interval"][0] < 0.5 < metric["interval"][1]


def test_what_is_not_in_the_coarse_tiles_is_not_found_there(made: Config):
    metric = _run(made, "fine", "abmil-coarse")["by_share"]["1"]["metrics"]["auroc"]
    assert metric["interval"][0] < 0.5 < metric["interval"][1]


def test_a_number_is_found_by_the_mean(made: Config):
    metrics = _run(made, "level", "mean")["by_share"]["1"]["metrics"]
    assert metrics["r2"]["value"] > 0.8 and metrics["spearman"]["value"] > 0.9


def test_every_aggregator_has_the_same_folds(made: Config):
    folder = Path(made.results) / "biomarkers" / "fine"
    for name in ("abmil-fine", "mma-region"):
        biomarkers.run(made, "fine", name)
    one, other = (
        read_parquet(folder / f"{name}.parquet").query("share == 1").set_index("slide_id")[["repeat", "fold", "truth"]]
        for name in ("abmil-fine", "mma-region")
    )
    assert one.sort_index().equals(other.sort_index())
    assert one["fold"].nunique() == 5


def test_the_same_seed_gives_the_same_bytes(made: Config):
    folder = Path(made.results) / "biomarkers" / "fine"
    contents = []
    for _ in range(2):
        biomarkers.run(made, "fine", "mma")
        contents.append([(folder / name).read_bytes() for name in ("mma.json", "mma.parquet", "attention/mma.parquet")])
    assert contents[0] == contents[1]


def test_what_a_row_is_set_against_changes_nothing_that_it_learns(made: Config):
    """Neither its files nor the digest by which the workflow knows it: the key decides a column of the report alone."""
    rows = [entry.model_dump() for entry in made.biomarkers.aggregators]
    values = made.model_dump()
    values["biomarkers"]["aggregators"] = [{**row, "against": "mean" if row["name"] == "mma" else None} for row in rows]
    other, folder = parse_config(values), Path(made.results) / "biomarkers" / "fine"
    contents = []
    for config in (made, other):
        biomarkers.run(config, "fine", "mma")
        contents.append([(folder / name).read_bytes() for name in ("mma.json", "mma.parquet", "attention/mma.parquet")])
    assert contents[0] == contents[1]
    before, after = (config.biomarkers.aggregator("mma") for config in (made, other))
    assert before != after and before.identity() == after.identity()
    assert set(before.model_dump()) - set(before.identity()) == {"against"}
    rule = (Path(__file__).parents[1] / "workflow" / "rules" / "biomarkers.smk").read_text()
    assert (
        "AGGREGATORS[wildcards.aggregator].identity()" in rule and "AGGREGATORS[wildcards.aggregator].model" not in rule
    )


def test_tokens_of_every_kind(made: Config):
    read = {e.name: SlideTokens(made, e).read("S03") for e in made.biomarkers.aggregators}
    assert {name: len(bag) for name, bag in read.items()} == {
        "abmil-fine": 48, "abmil-coarse": 3, "mean": 51, "mma": 51, "mma-region": 3,
    }  # fmt: skip
    assert set(read["mean"].kind) == {0, 1} and set(read["mma-region"].kind) == {2}
    assert set(read["mma-region"].names) == set(read["abmil-coarse"].names)


def test_fewer_tiles_are_a_part_of_more_and_are_mixed_anew(made: Config):
    for name in ("abmil-fine", "mma"):
        tokens = SlideTokens(made, made.biomarkers.aggregator(name))
        sizes = {share: set(tokens.read("S03", share).names) for share in (1.0, 0.7, 0.5, 0.1)}
        assert sizes[0.1] < sizes[0.5] < sizes[0.7] < sizes[1.0]
    coarse = {name for name in sizes[1.0] if "_L0_" in name}
    assert len(coarse) == 3 and coarse < sizes[0.1] and len(sizes[0.5]) == 3 + 24
    whole, part = tokens.read("S03"), tokens.read("S03", 0.5)
    again = tokens._mixed("S03", 0.9999)  # nothing is dropped, but mixed anew
    assert np.allclose(whole.take(), again[0][again[1]["token"] == "tile"], atol=1e-5)
    place = {name: n for n, name in enumerate(whole.names)}
    common = whole.take()[[place[name] for name in part.names]]
    assert not np.allclose(common, part.take(), atol=1e-4)


def test_slides_without_tissue_or_value_are_left_out(tmp_path: Path):
    fake_slides(tmp_path)
    config = slide_config(tmp_path)
    rewrite(tmp_path / "slides.tsv", "fine", {3: "", 4: "  "})
    dense = tmp_path / "embed" / "enc" / "dense"
    np.save(dense / "S07.npy", np.zeros((0, DIM), np.float32))
    write_parquet(dense / "S07.parquet", read_parquet(dense / "S07.parquet")[:0])
    report = _run(config, "fine", "mean")
    assert report["slides"] == 37 and report["without_tokens"] == ["S07"]


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize(
    "name, folder, mend",
    [
        ("mean", "embed/enc/dense", r"run `mad embed` for encoder 'enc' again"),
        ("mma", "mix/mixer", "run `mad mix mixer` again"),
    ],
)
def test_a_slide_whose_file_is_lost_names_the_command_that_makes_it(
    made: Config, name: str, folder: str, mend: str, kind: str
):
    path = Path(made.results) / folder / f"S03.{kind}"
    kept = path.rename(path.with_suffix(".kept"))
    try:
        with pytest.raises(MadError, match=mend):
            SlideTokens(made, made.biomarkers.aggregator(name)).read("S03")
    finally:
        kept.rename(path)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_words_for_no_value_are_neither_classes_nor_faults(tmp_path: Path, task: str, capsys: pytest.CaptureFixture):
    fake_slides(tmp_path)
    column = "fine" if task == "classification" else "level"
    cells = ["NA", "n/a", "NA", " nan ", "[Not Available]", "", " ", ".", "<NA>", "Unknown"]
    rewrite(tmp_path / "slides.tsv", column, dict(enumerate(cells)))
    report = _run(slide_config(tmp_path), column, "mean")
    told = {"": 2, ".": 1, "<NA>": 1, "NA": 2, "Unknown": 1, "[Not Available]": 1, "n/a": 1, "nan": 1}
    assert report["without_value"] == told and report["slides"] == 30
    assert report["classes"] == (["0", "1"] if task == "classification" else None)
    said = f"10 slides have no value of {column} and are left out: 2 empty, 1 '.', 1 '<NA>', 2 'NA', 1 'Unknown'"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "cells, named",
    [
        (["Positive", "positive", "Negative"], "'Positive', 'positive'"),
        (["1", "1.0", "0"], "'1', '1.0'"),
        (["grade 1", "Grade  1", "TRUE", "True"], "'Grade  1', 'grade 1'; 'TRUE', 'True'"),
    ],
)
def test_a_class_in_two_spellings_is_refused(cells: list[str], named: str):
    table = pd.DataFrame({"slide_id": [f"S{n}" for n in range(len(cells))], "her2": cells})
    with pytest.raises(MadError) as caught:
        biomarkers.read_target(table, TargetConfig(name="t", column="her2"))
    assert f"column her2 of the cohort sheet spells a class in several ways: {named}; write" in str(caught.value)


def test_more_words_for_no_value():
    cells = ["[Not Evaluated]", "N.A.", "not_available", "Not tested", "Indeterminate", "Positive"]
    table = pd.DataFrame({"slide_id": list("abcdef"), "her2": cells})
    _, task, without_value = biomarkers.read_target(table, TargetConfig(name="t", column="her2"))
    assert task.classes == ["Indeterminate", "Positive"] and list(without_value) == sorted(cells[:4])


def test_a_slide_under_two_patients_is_named(made: Config, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert _run(made, "fine", "mean")["copies"] == _run(made, "fine", "mma")["copies"] == []
    capsys.readouterr()
    fake_slides(tmp_path)
    config, dense = slide_config(tmp_path), tmp_path / "embed" / "enc" / "dense"
    splits = biomarkers.target_folds(
        config,
        config.biomarkers.target("fine"),
        cohort_table(config).assign(value=lambda table: table["fine"]),
    )
    together = sorted(patient[1:] for patient in splits[0].test)
    apart = sorted(patient[1:] for patient in splits[1].test)
    for original, copy in ((together[0], apart[0]), (together[1], together[2])):
        np.save(dense / f"{copy}.npy", np.load(dense / f"{original}.npy"))
    glass = np.load(dense / f"{together[3]}.npy")
    glass[:2] = 0
    np.save(dense / f"{together[3]}.npy", glass)
    other = np.load(dense / f"{apart[1]}.npy")
    other[0] = 0
    np.save(dense / f"{apart[1]}.npy", other)
    pair = sorted([together[0], apart[0]])
    assert _run(config, "fine", "mean")["copies"] == [{"slides": pair, "tokens": 51}]
    said = f"WARNING: 51 equal tokens on {pair[0]} and {pair[1]}, of two patients"
    assert said in capsys.readouterr().err


def test_a_class_that_loses_its_slides_is_named_with_target_row_and_fold(tmp_path: Path):
    fake_slides(tmp_path)
    rewrite(tmp_path / "slides.tsv", "fine", {n: "rare" if n < 5 else "common" for n in range(40)})
    dense = tmp_path / "embed" / "enc" / "dense"
    for slide in ("S00", "S01", "S02", "S03"):
        np.save(dense / f"{slide}.npy", np.zeros((0, DIM), np.float32))
        write_parquet(dense / f"{slide}.parquet", read_parquet(dense / f"{slide}.parquet")[:0])
    with pytest.raises(
        MadError, match="biomarkers fine mean: repeat 0, fold .: no slide of class 'rare' is left to fit on"
    ):
        biomarkers.run(slide_config(tmp_path), "fine", "mean")


def test_none_and_minus_are_classes(tmp_path: Path):
    """As in a score of plaques (none, sparse, moderate, frequent) and a stain (-, +)."""
    table = pd.DataFrame({"slide_id": list("abcd"), "score": ["none", "sparse", "-", "+"]})
    slides, task, without_value = biomarkers.read_target(table, TargetConfig(name="t", column="score"))
    assert len(slides) == 4 and task.classes == ["+", "-", "none", "sparse"] and without_value == {}


def test_the_reference_lists_the_words_for_no_value() -> None:
    meaning = TargetConfig.model_fields["column"].description or ""
    listed = {word.casefold() for word in re.findall(r"`([^`]+)`", meaning.partition(")")[0])}
    assert listed == biomarkers.MISSING - {""}


def test_faults_are_named(made: Config, tmp_path: Path):
    def changed(**target: str) -> Config:
        return slide_config(Path(made.results), biomarkers={"targets": [{"name": "t", **target}]})

    with pytest.raises(MadError, match="wants column 'her2'; the cohort sheet has .*'fine'"):
        biomarkers.run(changed(column="her2"), "t", "mean")
    with pytest.raises(MadError, match="is a regression, but patient_id of slide S00 is 'PS00'"):
        biomarkers.run(changed(column="patient_id", task="regression"), "t", "mean")
    with pytest.raises(MadError, match="5 folds need 5 patients of every class"):
        biomarkers.run(changed(column="patient_id"), "t", "mean")
    with pytest.raises(MadError, match="no entry named 'x'; there are"):
        biomarkers.run(made, "x", "mean")
    fake_slides(tmp_path)
    with pytest.raises(MadError, match="run `mad mix mixer` first"):
        biomarkers.run(slide_config(tmp_path), "fine", "mma")


def test_an_absent_encoder_is_told(tmp_path: Path):
    from mad.files import write_json

    fake_slides(tmp_path, patients=2)
    write_json(tmp_path / "embed" / "enc" / "audit.json", {"status": "absent", "reason": "gated"})
    assert _run(slide_config(tmp_path), "fine", "mean")["reason"] == "gated"
    for table in ("mean.parquet", "attention/mean.parquet"):  # declared, as those of any other
        assert read_parquet(tmp_path / "biomarkers" / "fine" / table).empty


@pytest.mark.parametrize(
    "change, message",
    [
        ({"aggregators": [{"name": "a", "encoder": "none"}]}, "asks for encoder 'none'"),
        ({"aggregators": [{"name": "a", "mixer": "none"}]}, "asks for mixer 'none'"),
        ({"aggregators": [{"name": "a", "mixer": "mixer", "encoder": "enc"}]}, "either `encoder` or `mixer`"),
        ({"aggregators": [{"name": "a", "encoder": "enc", "tokens": "region"}]}, "only a mixer has region tokens"),
        ({"baseline": "x"}, "baseline 'x' is none of the aggregators"),
        (
            {"aggregators": [{"name": "a", "encoder": "enc", "against": "b"}]},
            r"'a' is set against 'b', .* other aggregators \[\]",
        ),
        (
            {"aggregators": [{"name": "a", "encoder": "enc", "against": "a"}]},
            "'a' is set against 'a', which is none of the other",
        ),
        ({"folds": 4}, "folds"),
    ],
)
def test_configuration_faults_are_named(tmp_path: Path, change: dict, message: str):
    with pytest.raises(MadError, match=message):
        slide_config(tmp_path, biomarkers=change)


def test_the_baseline_is_found(tmp_path: Path):
    assert slide_config(tmp_path).biomarkers.compared_with == "abmil-fine"
    assert slide_config(tmp_path, biomarkers={"baseline": "mean"}).biomarkers.compared_with == "mean"
    assert tuple(slide_config(tmp_path).tile.magnifications) == LADDER
