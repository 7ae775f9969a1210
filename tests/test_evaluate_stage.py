"""Stages `evaluate` and `report` end to end on a small fake results folder, and every way in which data can lack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_results import fake_config, fake_results

from mad.files import MadError, read_parquet, write_json, write_parquet
from mad.stages import evaluate, report

PROTOCOLS = ("classification", "clustering", "consistency", "transfer", "segmentation")
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
    config = fake_config(folder, ["mad", "shifted", "absent"], evaluate={"probe_steps": 300, "runs": 3})
    for encoder in ("mad", "shifted"):
        evaluate.run(config, encoder)
    write_json(folder / "train" / "mad" / "summary.json", {"final_loss": 1.0})
    (folder / "benchmarks" / "tile").mkdir(parents=True)
    (folder / "benchmarks" / "tile" / "S00.tsv").write_text("s\th:m:s\tmax_rss\tcpu_time\n3.5\t0:00:03\t120.5\t-\n")
    report.run(config)
    return folder


def test_every_protocol_is_ok_and_says_where_it_comes_from(whole: Path) -> None:
    for encoder in ("mad", "shifted"):
        for name, content in read(whole, encoder).items():
            assert content["status"] == "ok" and content["protocol"] == name and content["encoder"] == encoder
            assert content["sources"]["weights_sha256"] == "0" * 64 and len(content["sources"]["audit_sha256"]) == 64
            assert content["sources"]["data_digest"] == read(whole)["transfer"]["sources"]["data_digest"]
            assert content["classes"][0] == "Gray Matter" and content["rules"]


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
    for name in ("table2", "table3", "table4", "table5", "scales", "slides", "training", "time"):
        assert {path.suffix for path in (whole / "report" / "tables").glob(f"{name}.*")} == {".csv", ".md", ".tex"}
        assert "nan" not in (whole / "report" / "tables" / f"{name}.md").read_text().lower()
    assert "| tile | 1 | 3.5 | 3.5 | – | 120 |" in (whole / "report" / "tables" / "time.md").read_text()


def test_figures_are_drawn_even_without_the_slide(whole: Path) -> None:
    for name in ("figure3_pca.png", "figure4_segmentation.png"):
        assert (whole / "report" / "figures" / name).stat().st_size > 20_000


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
    assert "mad is absent: not applicable" in (tmp_path / "report" / "tables" / "table3.md").read_text()
    assert "Unlabelled" in (tmp_path / "report" / "tables" / "table2.md").read_text()


def test_no_40x(tmp_path: Path) -> None:
    found = one(tmp_path, finest=1)
    assert found["classification"]["status"] == "ok"
    assert "10x-40x" in found["consistency"]["reason"] and "10x-40x" in found["transfer"]["reason"]
    assert len(read_parquet(tmp_path / "evaluate" / "mad" / "pca.parquet")) == 0


def test_no_validation_patients(tmp_path: Path) -> None:
    found = one(tmp_path, splits={"S02": "train"})
    assert found["classification"]["sound"]["chosen_by"].startswith("fixed")
    assert found["classification"]["sound"]["strength"] == 1e-3


def test_block_split_is_said_on_every_table(tmp_path: Path) -> None:
    one(tmp_path, split_by="block")
    for number in (2, 3, 4, 5):
        assert "Not patient-held-out" in (tmp_path / "report" / "tables" / f"table{number}.md").read_text()


def test_missing_slide_and_tiles_are_counted_and_broken_numbers_left_out(tmp_path: Path) -> None:
    fake_results(tmp_path, {"mad": 0.0}, columns=2, patients=6, dim=6)
    (tmp_path / "shard" / "S00.parquet").unlink()
    embed = tmp_path / "embed" / "mad"
    features = np.load(embed / "S01.npy")
    features[3] = np.nan
    np.save(embed / "S01.npy", features[:-1])
    write_parquet(embed / "S01.parquet", read_parquet(embed / "S01.parquet").iloc[:-1])
    evaluate.run(fake_config(tmp_path, ["mad"], evaluate=QUICK), "mad")
    assert read(tmp_path)["classification"]["dropped"] == {"without embedding": 1, "embedding not finite": 1}
    assert read(tmp_path)["classification"]["patients"]["train"] == 2


def test_contradictions_are_refused(tmp_path: Path) -> None:
    fake_results(tmp_path, {"mad": 0.0}, columns=1, patients=4, dim=4)
    config = fake_config(tmp_path, ["mad"], evaluate=QUICK)
    with pytest.raises(MadError, match="run `mad embed`"):
        evaluate.run(config, "other")
    cohort = read_parquet(tmp_path / "cohort" / "slides.parquet")
    write_parquet(tmp_path / "cohort" / "slides.parquet", cohort.assign(patient_id="same"))
    with pytest.raises(MadError, match="patient same has tiles in two splits"):
        evaluate.run(config, "mad")
    write_parquet(tmp_path / "cohort" / "slides.parquet", cohort)
    with pytest.raises(MadError, match=r"label\.classes does not list"):
        evaluate.run(fake_config(tmp_path, ["mad"], label={"classes": ["Tumour"], "background": None}), "mad")
    np.save(tmp_path / "embed" / "mad" / "S00.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(MadError, match="3, 4"):
        evaluate.run(config, "mad")
    shutil.rmtree(tmp_path / "cohort")
    with pytest.raises(MadError, match="run `mad cohort`"):
        report.run(config)
