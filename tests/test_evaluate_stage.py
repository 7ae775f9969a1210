"""Stages `evaluate` and `report` end to end on a small fake results folder, and every way in which data can lack."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import resource
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_results import fake_config, fake_results

from mad.config import parse_config
from mad.config.evaluation import PROTOCOLS
from mad.evaluation import data
from mad.files import MadError, read_parquet, write_json, write_parquet
from mad.reporting.map_table import map_table
from mad.reporting.scale_tables import scale_table, site_table
from mad.reporting.tables import table3, table4, table5
from mad.slides.sheet import write_sheet
from mad.stages import evaluate, qc, report, shard
from mad.tiles.embeddings import read_embeddings

QUICK: dict[str, Any] = {
    "probe_steps": 60,
    "runs": 2,
    "kmeans_starts": 2,
    "sound_strengths": [1e-2],
    "bootstrap_resamples": 20,
}


def read(folder: Path, encoder: str = "mad") -> dict[str, Any]:
    """All JSON of an encoder, which must be strict JSON without NaN."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} in JSON")

    paths = {name: folder / "evaluate" / encoder / f"{name}.json" for name in PROTOCOLS}
    return {name: json.loads(path.read_text(), parse_constant=refuse) for name, path in paths.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluated encoders, one that shifts with magnification, and the report; a third encoder is absent."""
    folder = tmp_path_factory.mktemp("results")
    fake_results(folder, {"mad": 0.0, "shifted": 1.5}, columns=3, noise=2)
    cohort = read_parquet(folder / "cohort" / "slides.parquet")
    write_parquet(folder / "cohort" / "slides.parquet", cohort.assign(site=list("ABABABAB"), scanner="Scan"))
    config = fake_config(folder, ["mad", "shifted", "absent"], evaluate={"probe_steps": 300, "runs": 3})
    for encoder in ("mad", "shifted"):
        evaluate.run(config, encoder)
    write_json(folder / "train" / "mad" / "summary.json", {"final_loss": 1.0})
    (folder / "benchmarks" / "tile").mkdir(parents=True)
    (folder / "benchmarks" / "tile" / "S00.tsv").write_text("s\th:m:s\tmax_rss\tcpu_time\n3.5\t0:00:03\t120.5\t-\n")
    (folder / "benchmarks" / "report").mkdir()
    for job in ("qc", "report"):
        shutil.copy(folder / "benchmarks" / "tile" / "S00.tsv", folder / "benchmarks" / "report" / f"{job}.tsv")
    report.run(config)
    return folder


def test_every_protocol_is_ok_and_says_where_it_comes_from(whole: Path) -> None:
    for encoder in ("mad", "shifted"):
        for name, content in read(whole, encoder).items():
            assert content["status"] == "ok" and content["protocol"] == name and content["encoder"] == encoder
            assert content["sources"]["weights_sha256"] == "0" * 64 and len(content["sources"]["audit_sha256"]) == 64
            assert content["sources"]["data_digest"] == read(whole)["transfer"]["sources"]["data_digest"]
            assert content.get("classes", ["Gray Matter"])[0] == "Gray Matter" and content["rules"]


@contextmanager
def open_files(more: int) -> Iterator[None]:
    """This process may open `more` files, no further ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1000), hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(more):
            os.close(taken.pop())
        yield
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_cohort_may_have_more_slides_than_files_may_be_open(whole: Path) -> None:
    config = fake_config(whole, ["mad"])
    before = evaluate.load(config, "mad")
    with open_files(6):
        assert np.array_equal(evaluate.load(config, "mad").features, before.features)


def test_arrays_that_are_all_held_open_end_in_words(whole: Path) -> None:
    with open_files(6), pytest.raises(MadError, match=r"npy: too many open files.* may open \d+: `ulimit -n` has to"):
        _held = [read_embeddings(whole / "embed" / "mad", f"S0{number}") for number in range(8)]


def test_embeddings_that_do_not_fit_into_memory_are_not_read(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = fake_config(whole, ["mad"])
    size = evaluate.load(config, "mad").features.nbytes
    monkeypatch.setattr(data, "free_bytes", lambda device: size)
    evaluate.load(config, "mad")
    monkeypatch.setattr(data, "free_bytes", lambda device: size - 1)
    with pytest.raises(MadError, match=r"tiles, 16 float32 numbers each, take .* GB are free\..* sample\.max_pairs"):
        evaluate.load(config, "mad")


def test_keys_are_those_of_the_contract(whole: Path) -> None:
    """docs/data-contracts.md, "Evaluation": every key that its table names is in the JSON."""
    text = (Path(__file__).parents[1] / "docs" / "data-contracts.md").read_text()
    section = text[text.index("## Evaluation") : text.index("## Evidence")]
    common = re.search(r"has (`encoder`.*?`reason`, `seed`, `split_by`, `dim`, `sources`)", section, re.DOTALL)
    assert common
    found = read(whole)
    for content in found.values():
        assert set(re.findall(r"`(\w+)`", common[1])) | {"dropped", "duplicates"} <= set(content)
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .* \|$", section, re.MULTILINE)
    named = [
        (protocol, key) for protocol, keys in rows if protocol in PROTOCOLS for key in re.findall(r"`([\w.]+)`", keys)
    ]
    assert {protocol for protocol, _ in named} == set(PROTOCOLS) - {"segmentation"}
    for protocol, key in named:
        part: Any = found[protocol]
        for name in key.replace("PROBE", "paper").split("."):
            assert name in part, (protocol, key)
            part = part[name]


def test_scale_free_embeddings_win(whole: Path) -> None:
    mad, shifted = read(whole, "mad"), read(whole, "shifted")
    part = [x["transfer"]["paper"]["with_background"]["consistency"]["mean"] for x in (mad, shifted)]
    assert part[0] > part[1] + 5
    gap = [x["consistency"]["cosine"]["pair_average"]["s_pos"] for x in (mad, shifted)]
    assert gap[0] > gap[1]
    assert mad["clustering"]["global"]["ami"]["mean"] > shifted["clustering"]["global"]["ami"]["mean"]
    assert len(mad["classification"]["linear"]["macro_f1"]["values"]) == 3


def test_tables_print_what_the_json_holds(whole: Path) -> None:
    frame = pd.read_csv(whole / "report" / "tables" / "table5.csv").set_index("encoder")
    stored = read(whole, "shifted")["transfer"]["paper"]["with_background"]
    assert frame.loc["shifted", "fine iou"] == pytest.approx(stored["fine"]["mean_iou"]["mean"])
    assert frame.loc["shifted", "consistency std"] == pytest.approx(stored["consistency"]["std"])
    text = (whole / "report" / "tables" / "table5.md").read_text()
    assert f"{stored['fine']['mean_iou']['mean']:.4f} ± {stored['fine']['mean_iou']['std']:.4f}" in text
    assert "published, on other data; not comparable" in text
    assert text.index("| mad |") < text.index("| shifted |") < text.index("| absent | absent")
    assert "No intervals: 2 test patient(s), an interval needs 5." in text
    for name in ("table2", "table3", "table4", "table5", "scales", "sites", "slides", "training", "time"):
        assert {path.suffix for path in (whole / "report" / "tables").glob(f"{name}.*")} == {
            ".csv", ".md", ".tex", ".html",
        }  # fmt: skip
        assert "nan" not in (whole / "report" / "tables" / f"{name}.md").read_text().lower()
    time = (whole / "report" / "tables" / "time.md").read_text()
    assert "| tile | 1 | 3.5 | 3.5 | – | 120 |" in time
    assert "| report | 1 |" in time  # qc; what there is of this job is an earlier run's
    slides = pd.read_csv(whole / "report" / "tables" / "slides.csv")
    assert set(slides["source"]) == {"ours"} and "mpp source" in slides


@pytest.mark.parametrize("name", ["table3", "table4", "table5", "scales", "sites", "maps"])
def test_every_number_is_found_in_its_json(whole: Path, name: str) -> None:
    """Column by column: the CSV's number, spread and interval stand at the column's source; Markdown names the place."""
    reports = report.read_reports(whole, ["mad", "shifted", "absent"])
    classes = read(whole)["classification"]["classes"]
    made = {
        "table3": lambda: table3(list(reports), reports, classes),
        "table4": lambda: table4(list(reports), reports),
        "table5": lambda: table5(list(reports), reports),
        "scales": lambda: scale_table(list(reports), reports),
        "sites": lambda: site_table(list(reports), reports),
        "maps": lambda: map_table(list(reports), reports),
    }[name]()
    frame = pd.read_csv(whole / "report" / "tables" / f"{name}.csv").set_index("encoder")
    text = (whole / "report" / "tables" / f"{name}.md").read_text()
    columns = [column for block in made.blocks for column in block.columns]
    assert len({column.key for column in columns}) == len(columns) > 5
    numbers = 0
    for column in columns:
        assert f"`{'/'.join(column.source[1:])}`" in text
        for encoder in ("mad", "shifted"):
            part: Any = read(whole, encoder)[column.source[0]]
            boot: Any = part
            for key in column.source[1:]:
                part = part[int(key) if isinstance(part, list) else key]
            stored, printed = part["mean"] if isinstance(part, dict) else part, frame.loc[encoder, column.key]
            assert np.isnan(printed) if stored is None else printed == pytest.approx(column.scale * stored), column.key
            numbers += stored is not None
            if column.interval:
                for key in column.interval[: column.interval.index("intervals") + 1]:
                    boot = boot[key]
                assert boot is None and f"{column.key} low" not in frame  # two test patients
    assert numbers > len(columns)
    why = "No intervals: every map is of one slide." if name == "maps" else "an interval needs 5"
    assert why in text and "± nan" not in text


def test_notes_tell_whose_they_are(whole: Path) -> None:
    """What all encoders tell is told once; of what some tell, the notes say of whom it is."""
    encoders = ["mad", "shifted", "other"]
    found = report.read_reports(whole, ["mad", "shifted"])
    found["other"] = copy.deepcopy(found["mad"])
    classes = found["mad"]["classification"]["classes"]
    before = table3(encoders, found, classes).notes
    assert not [note for note in before if note.startswith(("mad", "shifted", "other", "all but", "NOT"))]
    assert len(before) == len(set(before))
    changed = copy.deepcopy(found)
    mine = changed["shifted"]["classification"]
    mine["sound"]["chosen_by"] = mine["sound"]["chosen_by"] + "; stopped before their optimum: 1e-05"
    mine["dropped"]["without embedding"], mine["sources"]["data_digest"], mine["probe"]["steps"] = 3000, "x", 50
    notes = table3(encoders, changed, classes).notes
    for note in (
        "shifted: Sound probes stopped before their optimum: 1e-05.",
        "shifted: 3,000 tiles without embedding are left out.",
        "NOT evaluated on the same tiles, run `mad evaluate` for all of them again: mad, other; shifted.",
        "all but shifted: The paper's probe: Adam 0.01, batch 64, 300 steps (unpublished; ours).",
        "shifted: The paper's probe: Adam 0.01, batch 64, 50 steps (unpublished; ours).",
    ):
        assert note in notes, note
    assert len(notes) == len(before) + 4


def test_half_a_row_has_a_reason(whole: Path) -> None:
    """An encoder without one of a table's protocols, be it the first, is told; what others have of it is printed."""
    encoders = ["mad", "shifted", "absent"]
    found = report.read_reports(whole, encoders)
    lacking = {"status": "not applicable", "reason": "one magnification"}
    columns = found["mad"]["sites"]["columns"]
    changed = copy.deepcopy(found)
    del changed["mad"]["clustering"]
    changed["mad"]["magnification"] = lacking
    changed["mad"]["consistency"]["transitivity"] = lacking | {"bootstrap": None}
    del changed["mad"]["sites"]["columns"]["site"]["groups"]["A"]
    classes = found["mad"]["classification"]["classes"]
    expected = {
        "mad: No clustering: clustering.json does not exist.": lambda reports: table3(encoders, reports, classes),
        "mad: No magnification: not applicable: one magnification.": lambda reports: scale_table(encoders, reports),
        "mad: No transitivity: one magnification.": lambda reports: table4(encoders, reports),
        "mad: site A: not tested, no labelled tiles.": lambda reports: site_table(encoders, reports),
    }
    assert columns["site"]["groups"]["A"]["reason"] is None
    for note, table in expected.items():
        whole_table, half = table(found), table(changed)
        assert note in half.notes and note not in whole_table.notes
        assert [block.title for block in half.blocks] == [block.title for block in whole_table.blocks], note
    nobody = {encoder: {"classification": parts["classification"]} for encoder, parts in found.items() if parts}
    assert "No clustering: clustering.json does not exist." in table3(encoders, nobody | {"absent": {}}, classes).notes


def test_intervals_are_printed_for_everything_but_what_cannot_have_one(tmp_path: Path) -> None:
    fake_results(
        tmp_path,
        {"mad": 0.4},
        columns=3,
        dim=6,
        noise=2,
        splits={f"S0{n}": "test" for n in range(3, 8)} | {"S00": "train"},
    )
    cohort = read_parquet(tmp_path / "cohort" / "slides.parquet")
    write_parquet(tmp_path / "cohort" / "slides.parquet", cohort.assign(site=["A", "B", "C", *"AAAAA"]))
    config = fake_config(tmp_path, ["mad"], evaluate=QUICK)
    evaluate.run(config, "mad")
    report.run(config)
    without = {
        "table3": "dbi",
        "table4": "chance",
        "table5": "^n ",
        "scales": "rankme|chance",
        "sites": "tiles",
    }
    for name, none in without.items():
        frame = pd.read_csv(tmp_path / "report" / "tables" / f"{name}.csv").set_index("encoder")
        mine = frame.loc["mad"].drop(["source", "absent"]).dropna()
        numbers = [key for key in mine.index if not key.endswith((" std", " low", " high"))]
        bare = {key for key in numbers if f"{key} low" not in mine}
        allowed = {key for key in numbers if re.search(none, key)} | {
            "n",
            *(k for k in numbers if k.endswith("patients")),
        }
        assert bare <= allowed, (name, bare - allowed)
        for key in set(numbers) - bare:
            assert mine[f"{key} low"] <= mine[f"{key} high"]
        text = (tmp_path / "report" / "tables" / f"{name}.md").read_text()
        assert "resamples of the 5 test patients" in text


def test_figures_are_drawn_even_without_the_slide(whole: Path) -> None:
    for name in (
        "figure3_pca.png",
        "figure4_segmentation.png",
        "scale_matrix.png",
        "confusion.png",
        "confusion_linear.png",
    ):
        assert (whole / "report" / "figures" / name).stat().st_size > 20_000


def test_maps_of_a_slide_that_left_the_cohort_are_left_out(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    shutil.copytree(whole, results)
    (gone,) = read_parquet(results / "evaluate" / "mad" / "segmentation.parquet")["slide_id"].unique()
    slides = read_parquet(results / "cohort" / "slides.parquet")
    write_parquet(results / "cohort" / "slides.parquet", slides[slides["slide_id"] != gone])
    report.run(fake_config(results, ["mad", "shifted", "absent"]))
    assert f"maps of {gone} are left out" in capsys.readouterr().err
    assert not list((results / "report" / "maps").rglob("*.geojson"))
    assert (results / "report" / "figures" / "figure4_segmentation.png").stat().st_size < 20_000


def test_maps_hold_every_dense_tile_once(whole: Path) -> None:
    painted = read_parquet(whole / "evaluate" / "mad" / "segmentation.parquet")
    tiles = read_parquet(whole / "tile" / "S06.parquet")
    assert sorted(painted["tile_id"]) == sorted(tiles.loc[tiles["magnification"] >= 10, "tile_id"])
    assert (painted["predicted"] == painted["label"]).mean() > 0.7


def test_table_2_counts_the_shards(whole: Path) -> None:
    shards = pd.concat([read_parquet(path) for path in sorted((whole / "shard").glob("*.parquet"))])
    grand = pd.read_csv(whole / "report" / "tables" / "table2.csv").set_index("tissue class").loc["Grand Total"]
    assert grand["unique"] == shards["tile_id"].nunique()
    assert grand["total"] == (shards["role"] == "child").sum() + (shards["role"] == "standalone").sum()


def test_tables_of_slides_are_held_one_after_the_other(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cohort's tables together are tens of GB."""
    for part in ("cohort", "tile", "shard"):
        shutil.copytree(whole / part, tmp_path / part)
    held: list[Any] = []
    most = 0

    def read(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
        nonlocal most
        table = read_parquet(path, columns)
        if path.parent.name in ("tile", "shard"):
            held.append(weakref.ref(table))
            most = max(most, sum(ref() is not None for ref in held))
        return table

    for stage in (report, qc, shard):
        monkeypatch.setattr(stage, "read_parquet", read)
    report.run(fake_config(tmp_path, []))
    slides = sorted(path.stem for path in (tmp_path / "shard").glob("*.parquet"))
    assert len(held) == 2 * len(slides) >= 10 and most <= 4
    rows = [{"slide_id": name, "path": name, "patient_id": name, "split": "train"} for name in slides]
    write_sheet(tmp_path / "slides.tsv", rows)
    held.clear()
    most = 0
    shard.run_cohort(parse_config({"results": str(tmp_path), "cohort": {"sheet": str(tmp_path / "slides.tsv")}}))
    assert len(held) == len(slides) and most <= 2
    found = pd.concat(read_parquet(tmp_path / "shard" / f"{name}.parquet") for name in slides).query("status == 'ok'")
    content = "\n".join(found["kind"] + found["tile_id"] + found["sha256"])
    summary = json.loads((tmp_path / "shard" / "cohort.json").read_text())
    assert summary["sha256"] == hashlib.sha256(content.encode()).hexdigest()
    assert sum(summary["tiles"].values()) == len(found)


def test_same_input_same_bytes(whole: Path, tmp_path: Path) -> None:
    for part in ("cohort", "tile", "shard", "embed"):
        shutil.copytree(whole / part, tmp_path / part)
    evaluate.run(fake_config(tmp_path, ["mad"], evaluate={"probe_steps": 300, "runs": 3}), "mad")
    for name in (*(f"{protocol}.json" for protocol in PROTOCOLS), "pca.parquet", "segmentation.parquet"):
        assert (tmp_path / "evaluate" / "mad" / name).read_bytes() == (
            whole / "evaluate" / "mad" / name
        ).read_bytes(), name


def one(folder: Path, **options: Any) -> dict[str, Any]:
    fake_results(folder, {"mad": 0.0}, **({"columns": 2, "patients": 5, "dim": 6} | options))
    config = fake_config(folder, ["mad"], evaluate=QUICK)
    evaluate.run(config, "mad")
    report.run(config)
    return read(folder)


def test_no_labels_at_all(tmp_path: Path) -> None:
    found = one(tmp_path, labelled=False)
    for protocol in ("classification", "clustering", "transfer", "segmentation"):
        assert found[protocol]["status"] == "not applicable" and found[protocol]["reason"]
    assert (
        found["consistency"]["status"] == "ok" and found["consistency"]["cosine"]["pair_average"]["delta_sem"] is None
    )
    assert len(read_parquet(tmp_path / "evaluate" / "mad" / "segmentation.parquet")) == 0
    assert "mad: not applicable" in (tmp_path / "report" / "tables" / "table3.md").read_text()
    assert "Unlabelled" in (tmp_path / "report" / "tables" / "table2.md").read_text()


def test_no_40x(tmp_path: Path) -> None:
    found = one(tmp_path, finest=1)
    assert found["classification"]["status"] == "ok"
    assert "10x-40x" in found["consistency"]["reason"]
    transfer, tables = found["transfer"], tmp_path / "report" / "tables"
    assert transfer["status"] == "ok" and transfer["table5"]["reason"] == "no labelled test tiles at 40x"
    assert set(transfer["matrix"]) == {"2.5x", "10x"} and transfer["matrix"]["10x"]["2.5x"] is not None
    assert "mad: not applicable: no labelled test tiles at 40x." in (tables / "table5.md").read_text()
    assert "Mean IoU, trained on 2.5x" in (tables / "scales.md").read_text()
    assert found["segmentation"]["status"] == "not applicable"
    assert len(read_parquet(tmp_path / "evaluate" / "mad" / "pca.parquet")) == 0


def test_no_validation_patients(tmp_path: Path) -> None:
    found = one(tmp_path, splits={"S02": "train"})
    assert found["classification"]["sound"]["chosen_by"].startswith("fixed")
    assert found["classification"]["sound"]["strength"] == 1e-3


def test_block_split_is_said_on_every_table(tmp_path: Path) -> None:
    one(tmp_path, split_by="block")
    for name in ("table2", "table3", "table4", "table5", "scales", "maps"):
        for suffix in ("md", "tex", "html"):
            text = (tmp_path / "report" / "tables" / f"{name}.{suffix}").read_text()
            assert "Not patient-held-out" in text, (name, suffix)
            if suffix == "tex":  # a block by itself, too
                assert text.count("Not patient-held-out") == text.count(r"\end{tabular}") > 0


def test_missing_slide_and_tiles_are_counted_and_broken_numbers_refused(tmp_path: Path) -> None:
    fake_results(tmp_path, {"mad": 0.0}, columns=2, patients=6, dim=6)
    (tmp_path / "shard" / "S00.parquet").unlink()
    embed = tmp_path / "embed" / "mad"
    features = np.load(embed / "S01.npy")
    np.save(embed / "S01.npy", features[:-1])
    rows = read_parquet(embed / "S01.parquet")
    write_parquet(embed / "S01.parquet", rows.iloc[:-1])
    config = fake_config(tmp_path, ["mad"], evaluate=QUICK)
    evaluate.run(config, "mad")
    assert read(tmp_path)["classification"]["dropped"] == {"without embedding": 1}
    assert read(tmp_path)["classification"]["patients"]["train"] == 2
    reports = report.read_reports(tmp_path, ["mad"])
    for made in (table3(["mad"], reports, []), table4(["mad"], reports), table5(["mad"], reports)):
        assert "1 tiles without embedding are left out." in made.notes
    for broken, more in (([3], ""), ([3, 7], r" \(and of 1 more\)")):
        features[broken] = np.nan if more else np.inf
        np.save(embed / "S01.npy", features[:-1])
        with pytest.raises(MadError, match=rf"slide S01: the embedding of tile {rows['tile_id'][3]}{more} holds NaN"):
            evaluate.run(config, "mad")


def test_duplicates_are_named_and_not_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_results(tmp_path, {"mad": 0.0}, columns=2, patients=6, dim=6)
    config = fake_config(tmp_path, ["mad"], evaluate=QUICK)
    before = evaluate.load(config, "mad")
    shard = {slide: read_parquet(tmp_path / "shard" / f"{slide}.parquet") for slide in ("S00", "S05")}
    child = shard["S05"].loc[shard["S05"]["kind"].eq("10x-40x") & shard["S05"]["role"].eq("child"), "tile_id"].iloc[0]
    for slide, table in shard.items():
        same = table["tile_id"] == child.replace("S05", slide)
        digest = table["sha256"].astype(object).where(~same, "f" * 64).astype("string")
        write_parquet(tmp_path / "shard" / f"{slide}.parquet", table.assign(sha256=digest, blur=np.float32(90)))
    evaluate.run(config, "mad")
    found = read(tmp_path)["consistency"]
    expected = {"tiles": 2, "excluded_from_test": 1, "uniform": 0, "slides": ["S00 (train) and S05 (test): 1 tile(s)"]}
    assert found["duplicates"] == expected and found["dropped"]["duplicate of another tile"] == 1
    assert "same pixels: S00 (train) and S05 (test): 1 tile(s)" in capsys.readouterr().err
    after = evaluate.load(config, "mad")
    assert set(before.tiles["tile_id"]) - set(after.tiles["tile_id"]) == {child}
    assert len(after.pairs) == len(before.pairs) - 1
    names = after.tiles["tile_id"].to_numpy(str)
    assert all(names[c].startswith(names[p].split("_L")[0]) for p, c in after.pairs[["parent", "child"]].to_numpy())
    assert np.array_equal(after.features, before.features[(before.tiles["tile_id"] != child).to_numpy()])


def test_contradictions_are_refused(tmp_path: Path) -> None:
    fake_results(tmp_path, {"mad": 0.0}, columns=1, patients=4, dim=4)
    config = fake_config(tmp_path, ["mad"], evaluate=QUICK)
    with pytest.raises(MadError, match="run `mad embed`"):
        evaluate.run(config, "other")
    cohort = read_parquet(tmp_path / "cohort" / "slides.parquet")
    write_parquet(tmp_path / "cohort" / "slides.parquet", cohort.assign(patient_id="same"))
    with pytest.raises(MadError, match="patient same has tiles in two splits"):
        evaluate.run(config, "mad")
    shard = read_parquet(tmp_path / "shard" / "S00.parquet")
    child = shard.loc[shard["tile_id"].str.contains("_L2_"), "tile_id"].iloc[0]
    other = shard.assign(split=shard["split"].where(shard["tile_id"] != child, "test"))
    write_parquet(tmp_path / "shard" / "S00.parquet", other)
    write_parquet(tmp_path / "cohort" / "slides.parquet", cohort.assign(split_by="block"))
    with pytest.raises(MadError, match="slide S00: the coarsest tile 0_0 and the tiles inside it are in two splits"):
        evaluate.run(config, "mad")
    write_parquet(tmp_path / "shard" / "S00.parquet", shard)
    write_parquet(tmp_path / "cohort" / "slides.parquet", cohort)
    with pytest.raises(MadError, match=r"label\.classes does not list"):
        evaluate.run(fake_config(tmp_path, ["mad"], label={"classes": ["Tumour"], "background": None}), "mad")
    np.save(tmp_path / "embed" / "mad" / "S00.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(MadError, match="3, 4"):
        evaluate.run(config, "mad")
    shutil.rmtree(tmp_path / "cohort")
    with pytest.raises(MadError, match="run `mad cohort`"):
        report.run(config)
