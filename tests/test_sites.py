"""Leave one site out: which tiles train and test, scores against scikit-learn, what is not applicable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_results import fake_config, fake_results
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from sklearn.preprocessing import StandardScaler

from mad.config.evaluation import EvaluationConfig
from mad.evaluation import sites
from mad.evaluation.data import Embedded, NotApplicableError
from mad.evaluation.sites import evaluate_sites
from mad.files import read_parquet, write_parquet
from mad.reporting.scale_tables import site_table
from mad.stages.evaluate import load

CONFIG = EvaluationConfig(sound_strength=1e-2, bootstrap_resamples=60, min_patients=2)
SITES = ["A", "B", "A", "B", "A", "B", "A", "B"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    """Eight patients, four of them tested, none to validate with, two sites in turn; one scanner."""
    folder = tmp_path_factory.mktemp("results")
    splits = {f"S0{n}": "test" for n in range(4, 8)} | {"S03": "train"}
    fake_results(folder, {"mad": 0.3}, columns=2, noise=4, splits=splits)
    cohort = read_parquet(folder / "cohort" / "slides.parquet")
    write_parquet(folder / "cohort" / "slides.parquet", cohort.assign(site=SITES, scanner="Scan"))
    return load(fake_config(folder, ["mad"]), "mad")


def reference(data: Embedded, train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    scaler = StandardScaler().fit(data.features[train])
    model = LogisticRegression(C=100 / len(train), max_iter=3000).fit(
        scaler.transform(data.features[train]), data.codes[train]
    )
    truth, guess = data.codes[test], model.predict(scaler.transform(data.features[test]))
    return {
        "macro_f1": f1_score(truth, guess, labels=np.unique(truth), average="macro"),
        "accuracy": accuracy_score(truth, guess),
        "balanced_accuracy": balanced_accuracy_score(truth, guess),
    }


def test_equals_scikit_learn_on_the_sites_own_rows(data: Embedded) -> None:
    report = evaluate_sites(data, CONFIG, seed=0)
    site = data.tiles["site"].to_numpy(str)
    groups = report["columns"]["site"]["groups"]
    train, test = data.rows("train"), data.rows("test")
    for name in "AB":
        mine = test[site[test] == name]
        for kind, rows in {"left_out": train[site[train] != name], "seen": train}.items():
            for key, value in reference(data, rows, mine).items():
                assert groups[name][kind][key] == pytest.approx(value, abs=0.01)
            assert groups[name][kind]["train_tiles"] == len(rows)
        assert groups[name]["tiles"] == len(mine) == sum(groups[name]["counts"]["test"].values())
        assert groups[name]["patients"] == 2
    for kind in ("left_out", "seen"):
        mean = np.mean([groups[name][kind]["macro_f1"] for name in "AB"])
        assert report["columns"]["site"][kind]["macro_f1"] == pytest.approx(mean)
    drop = np.mean([groups[name]["seen"]["accuracy"] - groups[name]["left_out"]["accuracy"] for name in "AB"])
    assert report["columns"]["site"]["drop"]["accuracy"] == pytest.approx(drop)
    assert set(report["columns"]["site"]["bootstrap"]["intervals"]) >= {"drop macro_f1", "left_out accuracy"}
    assert groups["A"]["left_out"]["bootstrap"]["intervals"]["macro_f1"] is not None


def test_no_patient_is_on_two_sides(data: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A patient with slides of both sites, and a split by block: their tiles train nowhere that they are tested."""
    patients = data.tiles["patient_id"].replace({"PS00": "PS05", "PS02": "PS04"})  # trained on and tested
    mixed = replace(data, tiles=data.tiles.assign(patient_id=patients), split_by="block")
    seen: list[set[str]] = []
    fit = sites._fit

    def spy(data, rows, config, device):
        seen.append({*data.patients[rows["train"]], *data.patients[rows["val"]]})
        return fit(data, rows, config, device)

    tested: list[set[str]] = []
    test = sites._test

    def watch(data, fitted, rows, device):
        tested.append(set(data.patients[rows]))
        return test(data, fitted, rows, device)

    monkeypatch.setattr(sites, "_fit", spy)
    monkeypatch.setattr(sites, "_test", watch)
    evaluate_sites(mixed, CONFIG, seed=0)
    assert len(seen) == len(tested) == 4 and set().union(*tested) >= {"PS04", "PS05"}
    per_site = [tested[0], tested[2]]
    for trained, of in zip(seen, [per_site[0], per_site[0], per_site[1], per_site[1]], strict=True):
        assert trained and not trained & of


def test_a_site_that_alone_can_validate_costs_both_probes_the_choice(data: Embedded) -> None:
    split = data.tiles["split"].astype("string").where(data.tiles["slide_id"] != "S00", "val")  # of site A
    one = replace(data, tiles=data.tiles.assign(split=split))
    config = EvaluationConfig(sound_strength=0.5, bootstrap_resamples=60)  # none of those to choose from
    report = {
        **evaluate_sites(one, config, seed=0),
        "status": "ok",
        "split_by": "patient",
        "sources": {"data_digest": "d"},
    }
    groups = report["columns"]["site"]["groups"]
    for kind in ("left_out", "seen"):
        assert (
            groups["A"][kind]["strength"] == 0.5
            and "the other sites have no labelled val" in groups["A"][kind]["chosen_by"]
        )
        assert groups["B"][kind]["strength"] in config.sound_strengths
    notes = site_table(["mad"], {"mad": {"sites": report}}).notes
    note = next(note for note in notes if note.startswith("L2 strength of site A"))
    assert "left out / seen: mad 0.5 / 0.5 (fixed: the other sites have no" in note


def test_not_applicable_says_what_the_sheet_lacks(data: Embedded) -> None:
    columns = evaluate_sites(data, CONFIG, seed=0)["columns"]
    assert columns["scanner"]["status"] == "not applicable"
    assert columns["scanner"]["reason"] == "the cohort sheet names 'Scan' alone as scanner of labelled slides"
    bare = replace(data, tiles=data.tiles.drop(columns=["site", "scanner"]))
    with pytest.raises(NotApplicableError, match="names none as site .*; .* names none as scanner"):
        evaluate_sites(bare, CONFIG, seed=0)
    with pytest.raises(NotApplicableError):
        evaluate_sites(replace(data, tiles=data.tiles.assign(code=-1)), CONFIG, seed=0)


def test_slides_without_a_site_neither_train_nor_test(data: Embedded) -> None:
    unnamed = (data.tiles["slide_id"] == "S07").to_numpy()
    some = replace(data, tiles=data.tiles.assign(site=data.tiles["site"].where(~unnamed, None)))
    report = evaluate_sites(some, CONFIG, seed=0)["columns"]["site"]
    assert report["unnamed"] == unnamed.sum() and report["groups"]["B"]["patients"] == 1
    assert report["groups"]["B"]["left_out"]["bootstrap"]["reason"] == "1 test patient(s), an interval needs 2"


def test_a_site_without_test_tiles_is_named(data: Embedded) -> None:
    site = data.tiles["site"].where(data.tiles["slide_id"] != "S00", "C")
    report = evaluate_sites(replace(data, tiles=data.tiles.assign(site=site)), CONFIG, seed=0)["columns"]["site"]
    assert report["groups"]["C"] == {"reason": "no labelled test tiles of its own", "left_out": None, "seen": None}
    only = replace(data, tiles=data.tiles.assign(site=np.where(data.tiles["split"] == "train", "A", "B")))
    alone = evaluate_sites(only, CONFIG, seed=0)["columns"]["site"]
    assert (
        alone["groups"]["A"]["reason"] == "no labelled test tiles of its own" and alone["groups"]["B"]["reason"] is None
    )


def test_constant_embeddings_score_one_class(data: Embedded) -> None:
    report = evaluate_sites(replace(data, features=np.ones_like(data.features)), CONFIG, seed=0)["columns"]["site"]
    assert report["groups"]["A"]["left_out"]["balanced_accuracy"] == pytest.approx(1 / 5, abs=0.06)


def test_sites_of_a_table_of_tiles(tmp_path: Path) -> None:
    from mad.evaluation.tile_table import embedded_tiles, read_tile_table

    lines = [f"{n}.png,1,{'xy'[n % 2]},P{n // 2},{'train' if n < 8 else 'test'},{'AB'[n // 2 % 2]}" for n in range(16)]
    (tmp_path / "tiles.csv").write_text("path,mpp,label,patient_id,split,site\n" + "\n".join(lines) + "\n")
    table = read_tile_table(tmp_path / "tiles.csv", fractions={}, seed=0, magnifications=[10], tolerance=0.1)
    data = embedded_tiles(table, np.eye(16, 3, dtype=np.float32), None)
    assert evaluate_sites(data, CONFIG, seed=0)["columns"]["site"]["groups"].keys() == {"A", "B"}
