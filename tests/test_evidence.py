"""The evidence table: seeds written out, sums per patient that decide every number, and the patient x seed bootstrap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_results import fake_config, fake_results
from sklearn.metrics import f1_score, jaccard_score
from typer.testing import CliRunner

from mad.cli.base import app
from mad.config import Config, load_config, parse_config
from mad.config.recipe import freeze_recipe
from mad.evaluation import evidence
from mad.evaluation.bootstrap import patient_draws
from mad.evaluation.by_patient import SPACES, STATISTICS, classification_statistics, iou_statistics
from mad.evaluation.consistency import evaluate_consistency, test_pairs
from mad.evaluation.data import Embedded
from mad.evaluation.evidence import Measured, compare, seed_draws
from mad.evaluation.transfer import transfer_scores
from mad.files import MadError, read_json, read_parquet, write_parquet
from mad.metrics.confusion import confusion_matrix
from mad.metrics.cosine import unit
from mad.metrics.rankme import rankme
from mad.reporting.evidence import evidence_table
from mad.reporting.tables import NOT_RANKED
from mad.slides.sheet import cohort_rows
from mad.stages import evaluate
from mad.stages import evidence as stage

test_pairs.__test__ = False  # type: ignore[attr-defined]
ROOT = Path(__file__).parents[1]
ENCODERS = {"mad-s0": 0.0, "mad-s1": 0.2, "mad-s2": 0.1, "dino-s0": 1.5, "dino-s1": 1.2, "colour": 0.6}
GROUPS = {"mad": ["mad-s0", "mad-s1", "mad-s2"], "dino": ["dino-s0", "dino-s1"], "colour": ["colour"]}
EVALUATE: dict[str, Any] = {"probe_steps": 60, "runs": 2, "kmeans_starts": 1, "sound_strengths": [1e-2]}
RUN = {"name": "mad", "method": "mad", "seeds": [0, 3]}


def seeded(**changes: Any) -> Config:
    value: dict[str, Any] = {
        "runs": [
            RUN,
            {"name": "dino", "method": "dinov2", "seeds": [3, 0]},
            {**RUN, "name": "more", "init": "run:dino"},
            {"name": "alone", "method": "dinov2", "seed": 9},
        ],
        "encoders": [
            {"name": "best", "spec": "run:mad", "batch": 7},
            {"name": "more", "spec": "run:more"},
            {"name": "untrained", "spec": "random:dino"},
            {"name": "one", "spec": "run:dino-s3"},
            {"name": "alone", "spec": "run:alone"},
            {"name": "colour", "spec": "colour"},
        ],
    }
    return parse_config(value | changes)


def test_seeds_become_runs_and_encoders() -> None:
    config = seeded()
    assert [(run.name, run.seed) for run in config.runs] == [
        ("mad-s0", 0), ("mad-s3", 3), ("dino-s3", 3), ("dino-s0", 0), ("more-s0", 0), ("more-s3", 3), ("alone", 9),
    ]  # fmt: skip
    assert [config.run(f"more-s{seed}").init for seed in (0, 3)] == ["run:dino-s0", "run:dino-s3"]
    assert [(e.name, e.spec) for e in config.encoders] == [
        ("best-s0", "run:mad-s0"), ("best-s3", "run:mad-s3"), ("more-s0", "run:more-s0"), ("more-s3", "run:more-s3"),
        ("untrained-s3", "random:dino-s3"), ("untrained-s0", "random:dino-s0"), ("one", "run:dino-s3"), ("alone", "run:alone"),
        ("colour", "colour"),
    ]  # fmt: skip
    assert config.encoder("best-s3").batch == 7
    assert config.evidence.groups["untrained"] == ["untrained-s3", "untrained-s0"]
    assert config.evidence.groups["colour"] == ["colour"] and next(iter(config.evidence.groups)) == "best"
    assert parse_config(config.model_dump(mode="json")) == config


def test_a_seeded_run_has_the_recipe_of_the_same_run_written_out() -> None:
    plain = parse_config({"runs": [{"name": "mad-s3", "method": "mad", "seed": 3}]})
    assert freeze_recipe(seeded(), "mad-s3") == freeze_recipe(plain, "mad-s3")
    assert "seeds" not in freeze_recipe(plain, "mad-s3")["run"]


def test_groups_are_kept_where_they_are_given_and_none_without_seeds() -> None:
    given = {"baseline": "a", "groups": {"a": ["best-s0"], "b": ["one", "colour"]}}
    assert seeded(evidence=given).evidence.model_dump() == given
    assert seeded(evidence={"baseline": "colour"}).evidence.baseline == "colour"
    assert parse_config({"encoders": [{"name": "colour", "spec": "colour"}]}).evidence.groups == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": [RUN, {"name": "mad-s3", "method": "mad"}]}, "runs: two entries become 'mad-s3'"),
        ({"runs": [RUN], "encoders": [{"name": "e", "spec": "run:mad"}] * 2}, "encoders: two entries become 'e-s0'"),
        ({"runs": [{**RUN, "seeds": [1, 1]}]}, r"'mad': seeds are different whole numbers.*got \[1, 1\]"),
        ({"runs": [{**RUN, "seeds": []}]}, "seeds are different whole numbers"),
        ({"runs": [{**RUN, "seeds": 3}]}, "seeds are different whole numbers"),
        ({"runs": [{**RUN, "seed": 1}]}, "has `seed` and `seeds`"),
        ({"runs": [RUN, {**RUN, "name": "b", "init": "run:mad", "seeds": [0, 1]}]}, r"'b' starts from 'mad'.*seeds \[1\]"),
        ({"runs": [RUN, {"name": "b", "method": "mad", "init": "run:mad"}]}, "give it `seeds` too.*'mad-s0', 'mad-s3'"),
        ({"runs": [RUN, {**RUN, "name": "b", "stpes": 1}]}, r"1 wrong key.*\n  runs.1.stpes: no such key, did you mean 'steps'"),
        ({"runs": [{"method": "mad", "seeds": [1]}]}, "runs.0.name: Field required"),
        ({"encoders": [], "evidence": {"groups": {"a": ["b"]}}}, r"evidence.groups.a names \['b'\]"),
        ({"evidence": {"baseline": "dinov2"}}, "baseline 'dinov2' is none of the groups"),
        ({"evidence": {"groups": {"a": ["one", "one"]}}}, "groups.a names an encoder twice"),
    ],
)  # fmt: skip
def test_faults_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MadError, match=message):
        seeded(**({"encoders": []} | changes if "runs" in changes else changes))


@pytest.mark.parametrize(("name", "methods", "encoders"), [("evidence", 27, 57), ("evidence-null", 12, 34)])
def test_shipped_configurations(name: str, methods: int, encoders: int) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.evidence.baseline == "dinov2" and len(config.evidence.groups) == methods
    assert len(config.encoders) == encoders and {run.seed for run in config.runs} == {0, 1, 2}
    others = {run.steps for run in config.runs if "-flops-" not in run.name and "-long-" not in run.name}
    assert others == {500} and config.synthetic.decoupled == (name == "evidence-null")
    splits = [row.split for row in cohort_rows(config)]
    assert [splits.count(side) for side in ("train", "val", "test")] == [16, 2, 6]
    starts = {run.name: run.init for run in config.runs if run.init != "random"}
    assert name == "evidence-null" or starts["mad-continued-s2"] == starts["dinov2-continued-s2"] == "run:dinov2-s2"


def test_more_tiles_come_with_the_same_runs_and_other_test_patients() -> None:
    few, more = (load_config(ROOT / "configs" / f"{name}.yaml") for name in ("evidence", "evidence-tiles"))
    known = {run.name: run for run in few.runs}
    assert all(run == known[run.name] for run in more.runs) and len(more.runs) == 6
    sides = [
        {side: {row.slide_id for row in cohort_rows(config) if row.split == side} for side in ("train", "val", "test")}
        for config in (few, more)
    ]
    assert sides[0]["train"] < sides[1]["train"] and len(sides[1]["train"]) == 2 * len(sides[0]["train"])
    assert not sides[1]["test"] & set.union(*sides[0].values()) and len(sides[1]["test"]) == 6
    trained = [entry.spec for entry in more.encoders if entry.spec.startswith("local-dir:")]
    assert trained == [
        f"local-dir:{few.results}/train/{run}-s{n}/encoder"
        for run in ("dinov2", "tri", "tri-shuffled")
        for n in range(3)
    ]
    assert {spec.split("/")[-2] for spec in trained} <= set(known)


def test_synthetic_patients_may_be_split_otherwise() -> None:
    with pytest.raises(MadError, match="leave none of the 4 patients to train on; got 1 and 3"):
        parse_config({"synthetic": {"patients": 4, "val_patients": 1, "test_patients": 3}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six evaluated encoders on six test slides of five patients."""
    folder = tmp_path_factory.mktemp("results")
    splits = {f"S0{number}": "test" for number in range(2, 8)} | {"S00": "train", "S01": "train"}
    fake_results(folder, ENCODERS, columns=3, dim=8, splits=splits, noise=2)
    cohort = read_parquet(folder / "cohort" / "slides.parquet")
    cohort["patient_id"] = cohort["patient_id"].replace({"PS03": "PS02"})
    write_parquet(folder / "cohort" / "slides.parquet", cohort)
    for name in ENCODERS:
        evaluate.run(configured(folder), name)
    return folder


def configured(folder: Path, **evidence_section: Any) -> Config:
    section = {"baseline": "dino", "groups": GROUPS} | evidence_section
    return fake_config(folder, list(ENCODERS), evaluate=EVALUATE, evidence=section)


def measured(folder: Path, name: str) -> Measured:
    return stage.load(folder, name, read_json(folder / "evaluate" / name / "consistency.json"))


def stored(report: dict[str, Any], name: str) -> float | None:
    """The number of a protocol's JSON that a statistic's name is the path of."""
    part: Any = report
    for key in name.split(" "):
        part = part[key]
    return part["mean"] if isinstance(part, dict) else part


@pytest.mark.parametrize(
    ("protocol", "num"), [("consistency", 2 * (3 * 15 + 8)), ("transfer", 6 * (2 * 7 + 1)), ("classification", 4 * 3)]
)
def test_weights_of_one_give_the_number_of_the_json(folder: Path, protocol: str, num: int) -> None:
    for name in ("mad-s1", "dino-s0"):
        report = read_json(folder / "evaluate" / name / f"{protocol}.json")
        found = STATISTICS[protocol](measured(folder, name).sums[protocol], np.ones((1, 5)))
        assert len(found) == num
        for key, values in found.items():
            expected = stored(report, key)
            if expected is None:  # two coarsest tiles per slide leave no negative of the same class there
                assert key.startswith("transitivity") and np.isnan(values[0]), key
                continue
            # Counts of tiles are whole numbers and give the very same double; other sums differ in the order of adding.
            tolerance = 0 if protocol == "transfer" else 1e-12
            assert values[0] == pytest.approx(expected, rel=tolerance, abs=0), key


def test_json_holds_no_sums_and_the_side_file_is_the_same_again(folder: Path) -> None:
    before = (folder / "evaluate" / "colour" / "patients.npz").read_bytes()
    evaluate.run(configured(folder), "colour")
    assert (folder / "evaluate" / "colour" / "patients.npz").read_bytes() == before
    for protocol in STATISTICS:
        assert "by_patient" not in read_json(folder / "evaluate" / "colour" / f"{protocol}.json")


def test_arrays_are_those_of_the_contract(folder: Path) -> None:
    """docs/data-contracts.md, `patients.npz`: five patients, two runs of five classes, one run of the sound probe."""
    square, vector = (2, 5, 5), (2, 5)
    expected: dict[str, tuple[int, ...]] = {f"{protocol}.patients": (5,) for protocol in STATISTICS}
    for pairs in ("consistency.", "consistency.transitivity "):
        for space in SPACES:
            expected |= {f"{pairs}{space} {which}": square for which in ("same", "diff")}
            expected |= {f"{pairs}{space} {which}": vector for which in ("pos", "same_slide same", "same_slide diff")}
        for way in ("child_to_parent", "parent_to_child"):
            expected |= {f"{pairs}retrieval {way}": (3, 5), f"{pairs}retrieval {way} at_5": vector}
    for probe, runs in (("paper", 2), ("sound", 1)):
        expected[f"transfer.{probe} coarse"] = (5, runs, 5, 5)
        for suffix in ("", "_matched", "_coral"):
            expected[f"transfer.{probe}{suffix} fine"] = (5, runs, 5, 5)
            expected[f"transfer.{probe}{suffix} agree"] = (5, runs)
    expected |= {"transfer.children": (5,), "transfer.background": ()}
    for name, runs in {"linear": 2, "knn": 2, "whole_bank": 1, "sound": 1}.items():
        expected[f"classification.{name}"] = (5, runs, 5, 5)
    with np.load(folder / "evaluate" / "mad-s0" / "patients.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays.files} == expected


def copies(weights: list[int], patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a sample in which each patient occurs `weights` times, and to which drawn copy each row belongs."""
    names = np.unique(patients)
    drawn = [name for name, weight in zip(names, weights, strict=True) for _ in range(weight)]
    rows = [np.flatnonzero(patients == name) for name in drawn]
    return np.concatenate(rows), np.repeat(np.arange(len(drawn)), [len(part) for part in rows])


def test_cosines_and_retrieval_equal_the_definition_on_repeated_patients(folder: Path) -> None:
    """Every pair of a drawn parent and a drawn child, one by one; two copies of one patient make no pairs with each other."""
    data, weights = evaluate.load(configured(folder), "mad-s1"), [2, 0, 1, 3, 1]
    report = evaluate_consistency(data, configured(folder).evaluate, seed=0)
    found = STATISTICS["consistency"](report["by_patient"], np.array([weights], float))
    pairs, _ = test_pairs(data, (10, 40))
    parent_rows, child_rows = np.unique(pairs["parent"]), pairs["child"].to_numpy()
    means = [data.features[rows].mean(0, dtype=np.float64) for rows in (parent_rows, child_rows)]
    centres = {"cosine": (None, None), "centred": (sum(means) / 2,) * 2, "centred_each": tuple(means)}
    p, p_copy = copies(weights, data.patients[parent_rows])
    c, c_copy = copies(weights, data.patients[child_rows])
    parents, children, owner = parent_rows[p], child_rows[c], pairs["parent"].to_numpy()[c]
    slide = data.tiles["slide_id"].to_numpy(str)
    same_copy = p_copy[:, None] == c_copy[None]
    same_slide = same_copy & (slide[parents][:, None] == slide[children][None])
    other_patient = data.patients[parents][:, None] != data.patients[children][None]
    aligned = same_copy & (parents[:, None] == owner[None])
    same_class = data.codes[parents][:, None] == data.codes[children][None]
    allowed = {"pair_average": same_copy | other_patient, "same_slide": same_slide, "other_patient": other_patient}
    for space in SPACES:
        cosine = unit(data.features[parents], centres[space][0]) @ unit(data.features[children], centres[space][1]).T
        for average, mask in allowed.items():
            expected = {
                "s_pos": cosine[aligned].mean(),
                "s_neg_same": cosine[mask & ~aligned & same_class].mean(),
                "s_neg_diff": cosine[mask & ~aligned & ~same_class].mean(),
            }
            for key, value in expected.items():
                assert found[f"{space} {average} {key}"][0] == pytest.approx(value, rel=1e-9), (space, average, key)
            hier = expected["s_pos"] - expected["s_neg_same"]
            assert found[f"{space} {average} delta_hier"][0] == pytest.approx(hier, abs=1e-9)
    cosine = np.where(same_slide, unit(data.features[parents]) @ unit(data.features[children]).T, -np.inf)
    hit = np.take_along_axis(aligned, cosine.argmax(0)[None], 0).mean()
    assert found["retrieval child_to_parent at_1"][0] == pytest.approx(hit)
    hit = np.take_along_axis(aligned, cosine.argmax(1)[:, None], 1).mean()
    assert found["retrieval parent_to_child at_1"][0] == pytest.approx(hit)
    chance = (aligned.sum(1) / same_slide.sum(1)).mean()
    assert found["retrieval parent_to_child chance"][0] == pytest.approx(chance)


def test_scores_equal_scikit_learn_on_repeated_patients(folder: Path) -> None:
    data, weights = evaluate.load(configured(folder), "mad-s0"), [0, 2, 1, 1, 1]
    generator = np.random.default_rng(0)
    rows = {"coarse": data.rows("test", 10), "fine": data.rows("test", 40)}
    truth = {side: data.codes[each] for side, each in rows.items()}
    predicted = {
        side: np.where(generator.random((2, len(codes))) < 0.6, codes, generator.integers(0, 5, (2, len(codes))))
        for side, codes in truth.items()
    }
    parent_of_fine = np.full(len(rows["fine"]), -1)
    patients = {side: data.patients[each] for side, each in rows.items()}
    sums = transfer_scores(
        predicted, truth, patients, data, configured(folder).evaluate, parent_of_fine=parent_of_fine, seed=0
    )["by_patient"]
    found = iou_statistics(sums["coarse"], sums["fine"], np.array([weights], float))
    iou = {}
    for side in rows:
        kept, _ = copies(weights, patients[side])
        labels = sorted(set(truth[side][kept]))
        options: dict[str, Any] = {"labels": labels, "average": "macro", "zero_division": 0}
        iou[side] = np.mean([jaccard_score(truth[side][kept], run[kept], **options) for run in predicted[side]])
        assert found[f"{side} mean_iou"][0] == pytest.approx(iou[side])
        f1 = np.mean([f1_score(truth[side][kept], run[kept], **options) for run in predicted[side]])
        assert classification_statistics({"knn": sums[side]}, np.array([weights], float))["knn macro_f1"][
            0
        ] == pytest.approx(f1)
    assert found["consistency"][0] == pytest.approx(100 * iou["fine"] / iou["coarse"])


def by_hand(groups: dict[str, list[Measured]], key: str, resamples: int, seed: int) -> dict[str, list[float]]:
    """Resample after resample: the drawn patients' confusion matrices added up, encoder by encoder."""
    draws = patient_draws(len(groups["a"][0].sums["classification"]["knn"]), resamples, seed)
    found: dict[str, list[float]] = {group: [] for group in groups}
    for number, patients in enumerate(draws):
        for group, members in groups.items():
            chosen = np.repeat(np.arange(len(members)), seed_draws(group, len(members), resamples, seed)[number])
            values = []
            for encoder in (members[place] for place in chosen):
                knn = encoder.sums["classification"]["knn"]
                rows = [matrix for matrix, weight in zip(knn, patients, strict=True) for _ in range(weight)]
                values.append(classification_statistics({"knn": np.stack([sum(rows)])}, np.ones((1, 1)))[key][0])
            found[group].append(float(np.mean(values)))
    return found


def fake_groups(patients: int = 6, shift: float = 0.0) -> dict[str, list[Measured]]:
    """Two groups of three and two encoders and a single one, that get different shares of 40 tiles per patient right."""
    generator = np.random.default_rng(1)
    hard = generator.uniform(0.3, 0.9, patients)
    groups = {}
    for group, shares in {"a": [0.0, 0.03, -0.05], "b": [-0.1, -0.2], "one": [shift]}.items():
        groups[group] = []
        for place, share in enumerate(shares):
            truth = np.tile(np.arange(4), 10)
            knn = []
            for patient in range(patients):
                right = np.random.default_rng(patient).random(len(truth)) < hard[patient] + share
                knn.append([confusion_matrix(truth, np.where(right, truth, (truth + 1) % 4), 4)])
            sums = {"classification": {"knn": np.array(knn), "patients": np.array([f"P{n}" for n in range(patients)])}}
            groups[group].append(Measured(name=f"{group}-s{place}", sums=sums, facts={"rankme fine": 5.0 + place}))
    return groups


def test_intervals_equal_a_loop_over_resamples() -> None:
    groups, key = fake_groups(), "knn macro_f1"
    found = compare(groups, "b", resamples=60, min_patients=5, seed=4)["metrics"][key]["groups"]
    expected = by_hand(groups, key, 60, 4)
    for group, values in expected.items():
        assert found[group]["interval"] == pytest.approx(np.percentile(values, [2.5, 97.5]))
        assert found[group]["mean"] == pytest.approx(np.mean(found[group]["values"]))
        assert found[group]["std"] is None if group == "one" else found[group]["std"] > 0
    for group in ("a", "one"):
        difference = np.subtract(expected[group], expected["b"])
        assert found[group]["difference"]["interval"] == pytest.approx(np.percentile(difference, [2.5, 97.5]))
        assert found[group]["difference"]["mean"] == pytest.approx(found[group]["mean"] - found["b"]["mean"])
    assert "difference" not in found["b"]


def test_differences_are_of_the_same_patients_and_seeds_are_drawn_apart() -> None:
    groups = fake_groups()
    twin = {"one": groups["one"], "same": groups["one"], "a": groups["a"], "also a": groups["a"]}
    found = compare(twin, "one", resamples=200, min_patients=5, seed=0)["metrics"]["knn macro_f1"]["groups"]
    assert found["same"]["interval"] == found["one"]["interval"]
    assert found["same"]["difference"] == {"mean": 0.0, "interval": [0.0, 0.0]}
    assert found["a"]["interval"] != found["also a"]["interval"]  # the same encoders, other draws of them
    paired = found["a"]["difference"]["interval"]
    width = [row["interval"][1] - row["interval"][0] for row in (found["a"], found["one"])]
    assert paired[1] - paired[0] < np.hypot(*width)
    draws = [seed_draws(group, 3, 5000, 0) for group in ("a", "b")]
    assert (draws[0].sum(1) == 3).all() and draws[0].mean(0) == pytest.approx([1, 1, 1], abs=0.05)
    assert abs(np.corrcoef(draws[0][:, 0], draws[1][:, 0])[0, 1]) < 0.05


def test_seed_and_order_of_groups() -> None:
    groups = fake_groups()
    options: dict[str, Any] = {"resamples": 50, "min_patients": 5}
    first = compare(groups, "b", seed=0, **options)
    assert compare(groups, "b", seed=0, **options) == first
    backwards = compare(dict(reversed(groups.items())), "b", seed=0, **options)
    assert backwards["metrics"] == first["metrics"]
    other = compare(groups, "b", seed=1, **options)["metrics"]["knn macro_f1"]["groups"]["a"]
    assert other["interval"] != first["metrics"]["knn macro_f1"]["groups"]["a"]["interval"]


def test_no_interval_of_few_patients_and_none_of_what_has_no_sums() -> None:
    found = compare(fake_groups(4), "b", resamples=50, min_patients=5, seed=0)
    part = found["metrics"]["knn macro_f1"]["groups"]["a"]
    assert part["interval"] is None and part["difference"]["interval"] is None and part["mean"] > 0
    assert found["reason"]["classification"] == "4 test patient(s), an interval needs 5"
    rank = compare(fake_groups(), "b", resamples=50, min_patients=5, seed=0)["metrics"]["rankme fine"]["groups"]
    assert rank["a"] == {
        "mean": 6.0, "std": 1.0, "values": [5.0, 6.0, 7.0], "interval": None, "difference": {"mean": 0.5, "interval": None},
    }  # fmt: skip


def test_a_seed_without_a_number_leaves_its_group_without_one() -> None:
    groups = fake_groups()
    groups["a"][1] = Measured(name="bare", sums={})
    found = compare(groups, "a", resamples=50, min_patients=5, seed=0)["metrics"]["knn macro_f1"]["groups"]
    assert found["a"]["mean"] is None and found["a"]["interval"] is None and found["a"]["values"][1] is None
    assert found["b"]["mean"] is not None and found["b"]["difference"] == {"mean": None, "interval": None}


def test_encoders_of_other_patients_are_refused() -> None:
    groups = fake_groups() | {"c": fake_groups(5)["one"]}
    with pytest.raises(MadError, match=r"'a-s0' and 'one-s0' were tested on different patients .*\['P5'\]"):
        compare(groups, None, resamples=10, min_patients=5, seed=0)


def test_one_encoder_has_the_interval_of_its_own_json(folder: Path) -> None:
    config = configured(folder)
    found = compare({"x": [measured(folder, "dino-s0")]}, None, resamples=50, min_patients=5, seed=config.seed)
    own = read_json(folder / "evaluate" / "dino-s0" / "consistency.json")["bootstrap"]["intervals"]
    for key in ("s_pos", "delta_hier", "delta_sem"):
        part = found["metrics"][f"cosine pair_average {key}"]["groups"]["x"]
        assert part["interval"] == pytest.approx(own[key], rel=1e-9)
    own = read_json(folder / "evaluate" / "dino-s0" / "transfer.json")["sound_coral"]["without_background"]["bootstrap"]
    part = found["metrics"]["sound_coral without_background consistency"]["groups"]["x"]
    assert part["interval"] == pytest.approx(own["intervals"]["consistency"], rel=1e-9)


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    stage.run(configured(folder))
    return folder / "report"


def test_table_prints_the_json(written: Path) -> None:
    found = json.loads((written / "evidence.json").read_text())
    frame = pd.read_csv(written / "tables" / "evidence.csv").set_index("method")
    assert list(frame.index) == ["mad", "dino", "colour"]
    key = "sound_matched with_background fine mean_iou"
    part = found["metrics"][key]["groups"]["mad"]
    low, high = part["interval"]
    assert low < part["mean"] < high and len(part["values"]) == 3
    row = frame.loc["mad"]
    assert [row[key], row[f"{key} low"], row[f"{key} std"]] == pytest.approx([part["mean"], low, part["std"]])
    assert row[f"{key} difference high"] == pytest.approx(part["difference"]["interval"][1])
    share = found["metrics"]["retrieval child_to_parent at_1"]["groups"]["colour"]["mean"]
    assert frame.loc["colour", "retrieval child_to_parent at_1"] == pytest.approx(100 * share)
    text = (written / "tables" / "evidence.md").read_text()
    assert f"{part['mean']:.3f} ± {part['std']:.3f} [{low:.3f}, {high:.3f}]" in text
    assert "## Sound probe: difference to dino" in text and "50 resamples of the test patients" in text
    assert "mad: 3, dino: 2, colour: 1" in text and "nan" not in text.lower() and "NOT evaluated" not in text


def test_consistency_and_agreement_have_no_best(written: Path) -> None:
    head: list[str] | None = None
    bold: dict[str, int] = {}
    text = (written / "tables" / "evidence.md").read_text()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        head = None if cells is None else head or cells
        for name, cell in zip(head or [], cells or [], strict=True):
            bold[name] = bold.get(name, 0) + cell.startswith("**")
    ranked = {name for name in bold if bold[name]}
    assert "10x mIoU" in ranked and not [name for name in ranked if "onsistency" in name or name.endswith(" (%)")]
    assert len([name for name in bold if name.startswith("Consistency (%)")]) == 3 and "Sound probe (%)" in bold
    assert f"- {NOT_RANKED}" in text.splitlines() and "- Test patients: 5." in text.splitlines()


def test_patients_are_told_by_protocol_where_they_differ(written: Path) -> None:
    found = json.loads((written / "evidence.json").read_text())
    found["patients"] = {"consistency": 5, "transfer": 6, "classification": 0}
    assert "Test patients: 5 (consistency), 6 (transfer)." in evidence_table(found).notes


def test_every_printed_number_exists_and_the_picture_is_drawn(written: Path) -> None:
    from mad.reporting.evidence import blocks

    found = json.loads((written / "evidence.json").read_text())
    keys = {column.key for block in blocks((10, 40)) for column in block.columns}
    assert keys <= set(found["metrics"])
    assert (written / "figures" / "evidence.png").stat().st_size > 100_000


def test_slide_rows_need_no_label(folder: Path, written: Path) -> None:
    data: Embedded = evaluate.load(configured(folder), "colour")
    row = read_json(folder / "evaluate" / "colour" / "consistency.json")["slides"]["S03"]
    pairs, _ = test_pairs(data, (10, 40))
    pairs = pairs[data.tiles["slide_id"].to_numpy(str)[pairs["parent"]] == "S03"]
    parents, children = np.unique(pairs["parent"]), pairs["child"].to_numpy()
    cosine = unit(data.features[parents]) @ unit(data.features[children]).T
    aligned = parents[:, None] == pairs["parent"].to_numpy()[None]
    assert row["s_pos"] == pytest.approx(cosine[aligned].mean())
    assert row["s_neg"] == pytest.approx(cosine[~aligned].mean())
    hit = np.take_along_axis(aligned, cosine.argmax(0)[None], 0).mean()
    assert row["retrieval"]["child_to_parent"]["at_1"] == pytest.approx(hit)
    assert row["rankme"]["fine"] == pytest.approx(rankme(data.features[children]))
    table = pd.read_csv(written / "tables" / "evidence_slides.csv").set_index("slide, method")
    assert len(table) == 6 * 3 and table.loc["S03, colour", "rankme fine"] == pytest.approx(row["rankme"]["fine"])


def test_one_slide_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = {"S00": "test"}
    fake_results(tmp_path, {"a": 0.0, "b": 1.0}, patients=1, columns=2, dim=6, labelled=False, splits=splits)
    config = fake_config(tmp_path, ["a", "b"], evaluate=EVALUATE, evidence={"groups": {"mad": ["a", "b"]}})
    for name in ("a", "b"):
        evaluate.run(config, name)
    row = read_json(tmp_path / "evaluate" / "b" / "consistency.json")["slides"]["S00"]
    said = f"evaluate b: slide S00, {row['parents']} parents: S_pos {row['s_pos']:.3f}, S_neg {row['s_neg']:.3f}, delta_hier "
    assert said in capsys.readouterr().err.replace("\n", " ")
    stage.run(config)
    text = (tmp_path / "report" / "tables" / "evidence_slides.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| S00, mad"))
    assert line.count("±") == 7 and "–" not in line
    text = (tmp_path / "report" / "tables" / "evidence.md").read_text()
    assert "S_neg same slide" in text and "Retrieval@1" in text and "RankMe 40x" in text
    for lacking in ("Δ_sem", "other patient", "probe:", "difference", "k-NN macro", "nan"):
        assert lacking not in text.replace("probes: transfer.json", "")
    assert "No intervals: 1 test patient(s), an interval needs 5." in text


def test_what_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MadError, match=r"evidence.groups is empty"):
        stage.run(fake_config(tmp_path, ["a"]))
    with pytest.raises(MadError, match=r"a/consistency.json.*mad evaluate"):
        stage.run(fake_config(tmp_path, ["a"], evidence={"groups": {"m": ["a"]}}))
    (tmp_path / "config.json").write_text(json.dumps(fake_config(tmp_path, ["a"]).model_dump(mode="json")))
    done = CliRunner().invoke(app, ["evidence", "--config", str(tmp_path / "config.json")])
    assert isinstance(done.exception, MadError) and "evidence.groups" in str(done.exception)


def test_encoders_that_saw_other_tiles_are_told(folder: Path) -> None:
    reports = {name: read_json(folder / "evaluate" / name / "consistency.json") for name in ("mad-s0", "colour")}
    assert stage._notes(reports) == []
    reports["colour"]["sources"]["data_digest"] = "other"
    assert "NOT evaluated on the same tiles" in stage._notes(reports)[0]
    assert evidence.slide_means({"m": [{}]}) == {}


def test_an_absent_encoder_is_a_note_and_not_the_end() -> None:
    there = {"status": "ok", "split_by": "patient", "sources": {"data_digest": "d"}}
    notes = stage._notes({"mad": there, "gated": {"status": "absent", "reason": "its licence was not accepted"}})
    assert notes == ["gated is absent: its licence was not accepted."]
