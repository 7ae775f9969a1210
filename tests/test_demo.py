"""What `make demo` must show, on its own results: mechanics, never that a method wins."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mad.files import read_json
from mad.tiles.pyramid import Ladder, parse_tile_id

RESULTS = Path(__file__).parents[1] / "results"
pytestmark = pytest.mark.skipif(
    not (RESULTS / "report" / "tables" / "table5.md").exists(),
    reason="results/ holds no finished demo: run `make demo`",
)
RUNS, ENCODERS = ["mad", "dinov2"], ["mad", "dinov2", "random", "colour"]


@pytest.mark.parametrize("run", RUNS)
def test_training_learned_and_did_not_collapse(run: str) -> None:
    summary = read_json(RESULTS / "train" / run / "summary.json")
    metrics = pd.read_json(RESULTS / "train" / run / "metrics.jsonl", lines=True)
    loss = metrics["dino"].to_numpy()
    assert len(loss) == summary["steps"] and np.isfinite(loss).all()
    tenth = len(loss) // 10
    assert loss[-tenth:].mean() < summary["ln_k"], "the loss ended at or above ln K: uniform collapse"
    assert loss[-tenth:].mean() < loss[:tenth].mean(), "the loss did not fall"
    assert summary["health"]["rankme"] > 10, "rank collapse"
    assert not summary["collapsed"]


def test_runs_had_equal_steps_seeds_and_tiles() -> None:
    mad, dinov2 = (read_json(RESULTS / "train" / run / "recipe.json") for run in RUNS)
    differ = {key for key in mad["run"] if mad["run"][key] != dinov2["run"][key]}
    assert differ == {"name", "method"}
    assert mad["seed"] == dinov2["seed"]
    summaries = [read_json(RESULTS / "train" / run / "summary.json") for run in RUNS]
    assert summaries[0]["data_digest"] == summaries[1]["data_digest"]


def test_pairs_are_aligned_and_patients_disjoint() -> None:
    slides = pd.read_parquet(RESULTS / "cohort" / "slides.parquet").set_index("slide_id")
    assert slides.groupby("patient_id")["split"].nunique().max() == 1
    assert slides["split"].value_counts()[["train", "val", "test"]].tolist() == [8, 1, 3]
    ladder = Ladder((2.5, 10.0, 40.0))
    for slide_id, split in slides["split"].items():
        shards = pd.read_parquet(RESULTS / "shard" / f"{slide_id}.parquet")
        assert set(shards["split"]) == {split}
        children = shards[shards["role"] == "child"]
        for row in children.sample(50, random_state=0).itertuples():
            parent = parse_tile_id(row.sample_id)[1]
            assert parse_tile_id(row.tile_id)[1] == ladder.children(parent)[row.position]


def test_every_table_and_figure_is_there_with_every_row() -> None:
    report = RESULTS / "report"
    for table in ("table3", "table4", "table5"):
        text = (report / "tables" / f"{table}.md").read_text()
        assert all(f"| {encoder} |" in text for encoder in ENCODERS), table
        assert "absent" not in text and "not applicable" not in text
        assert (report / "tables" / f"{table}.csv").stat().st_size > 200
    assert "Grand Total" in (report / "tables" / "table2.md").read_text()
    sizes = {"figure3_pca": 50_000, "figure4_segmentation": 50_000, "scale_matrix": 20_000, "confusion": 20_000}
    sizes["confusion_linear"] = 20_000
    for figure, least in sizes.items():
        assert (report / "figures" / f"{figure}.png").stat().st_size > least


def test_the_viewer_shows_the_annotation_with_the_maps() -> None:
    (page,) = (RESULTS / "report" / "viewer" / "pages").glob("*.html")
    layers = RESULTS / "report" / "viewer" / "layers" / page.stem
    maps = {f"{name}{m}" for name in ("labels.", *(f"{e}_" for e in ENCODERS)) for m in ("10x", "40x")}
    assert {path.stem for path in layers.glob("*.png")} == maps
    drawn = {f["properties"]["classification"]["name"] for f in read_json(layers / "annotation.geojson")["features"]}
    assert drawn == {"Gray Matter", "White Matter", "Leptomeninges", "Superficial Cortex"}


def test_the_cohort_passed_its_own_checks() -> None:
    check = read_json(RESULTS / "synthetic" / "check.json")
    assert check["passed"], check["passed_each"]


def test_the_documented_python_runs_on_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/shards.md, one after the other."""
    pytest.importorskip("webdataset")
    monkeypatch.chdir(RESULTS.parent)
    blocks = re.findall(r"^```python\n(.*?)^```", (RESULTS.parent / "docs" / "shards.md").read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) > 2 and names["parent"].shape == (112, 112, 3) and len(names["children"]) == 16


def test_every_key_of_a_training_is_in_the_contract() -> None:
    page = (RESULTS.parent / "docs" / "data-contracts.md").read_text()
    named = set(re.findall(r"`(\w+)`", page[page.index("## Run") : page.index("## Embeddings")]))
    for run in RUNS:
        for name in ("summary", "identity"):
            assert set(read_json(RESULTS / "train" / run / f"{name}.json")) - named <= {"recipe"}
    painted = pd.read_parquet(RESULTS / "evaluate" / "mad" / "pca.parquet")
    (columns,) = re.findall(r"^`pca.parquet`.*$", page, re.M)
    assert set(painted) <= set(re.findall(r"`(\w+)`", columns))
