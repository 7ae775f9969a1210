"""Non-inferiority: which fields, against scikit-learn and brute force; the verdict; the stage and its table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fake_results import fake_config, fake_results
from scipy import stats
from sklearn.linear_model import LogisticRegression

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.bootstrap import patient_draws, percentiles
from mad.evaluation.data import Embedded, NotApplicableError
from mad.evaluation.noninferiority import (
    accuracies,
    coarse_fields,
    evaluate_noninferiority,
    fine_fields,
    verdict,
    widened,
)
from mad.files import MadError, read_json, write_json
from mad.reporting.noninferiority import noninferiority_table
from mad.stages import evaluate
from mad.stages.report import read_reports

CONFIG = EvaluationConfig(transition=(5, 20), sound_strengths=[1e-2], bootstrap_resamples=300, margin=0.05)


def embedded(noise: tuple[float, float], seed: int = 0, fields: int = 12) -> Embedded:
    """12 patients; coarse embeddings are their class with noise, children's with more, which their mean levels out."""
    rng, rows, pairs, features = np.random.default_rng(seed), [], [], []
    for patient in range(12):
        split = "train" if patient < 5 else "val" if patient < 6 else "test"
        for field in range(fields):
            code = int(rng.integers(3))
            name = f"S{patient}_L0_0_{field}"
            parent = len(rows)
            for k in range(-1, 16):
                rows.append(
                    {
                        "tile_id": name if k < 0 else f"{name}_{k}", "slide_id": f"S{patient}", "patient_id": f"P{patient}",
                        "magnification": 5.0 if k < 0 else 20.0, "split": split, "label": None, "code": code if k < 0 else -1,
                    }
                )  # fmt: skip
                features.append(np.eye(3)[code] + rng.normal(0, noise[k >= 0], 3))
                if k >= 0:
                    pairs.append({"kind": "5x-20x", "parent": parent, "child": len(rows) - 1, "position": k})
    order = rng.permutation(len(pairs))
    return Embedded(
        tiles=pd.DataFrame(rows), features=np.array(features, np.float32), pairs=pd.DataFrame(pairs).iloc[order],
        classes=["a", "b", "c"],
    )  # fmt: skip


def test_fields_are_parents_and_the_means_of_their_children():
    data = embedded((0.1, 0.1))
    pairs = data.pairs.drop(data.pairs[(data.pairs["parent"] == 17) & (data.pairs["position"] == 3)].index)
    tiles = data.tiles.copy()
    tiles.loc[0, "code"] = -1  # one field unlabelled, another without a child
    short = Embedded(tiles=tiles, features=data.features, pairs=pairs, classes=data.classes)
    (names, coarse), (same, fine) = coarse_fields(short, (5, 20)), fine_fields(short, (5, 20))
    assert names == same == [name for n, name in enumerate(tiles["tile_id"][::17]) if n not in (0, 1)]
    for name, own, mean in zip(names, coarse, fine, strict=True):
        row = tiles.index[tiles["tile_id"] == name][0]
        assert np.array_equal(own, data.features[row])
        np.testing.assert_allclose(mean, data.features[row + 1 : row + 17].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_accuracies_and_interval_against_references():
    student, reference = embedded((0.7, 0.1), fields=30), embedded((0.1, 1.5), fields=30)
    found = evaluate_noninferiority(student, reference, CONFIG, seed=4)
    right = {}
    for side, (data, part) in {"student": (student, coarse_fields), "reference": (reference, fine_fields)}.items():
        _, rows = part(data, (5, 20))
        tiles = data.tiles[data.tiles["code"] >= 0]
        train, test = (tiles["split"].to_numpy() == split for split in ("train", "test"))
        mean, std = rows[train].mean(0), rows[train].std(0)
        model = LogisticRegression(C=1 / (train.sum() * 1e-2), max_iter=1000, tol=1e-8)
        model.fit((rows[train] - mean) / std, tiles["code"][train])
        right[side] = model.predict((rows[test] - mean) / std) == tiles["code"].to_numpy()[test]
        assert found[side]["accuracy"] == pytest.approx(right[side].mean(), abs=0.01)
    assert found["difference"] == pytest.approx(found["student"]["accuracy"] - found["reference"]["accuracy"])
    patients = np.repeat(np.arange(6), 30)
    differences = []
    for draw in patient_draws(6, 300, 4):
        chosen = np.concatenate([np.flatnonzero(patients == p) for p in np.repeat(np.arange(6), draw)])
        differences.append(right["student"][chosen].mean() - right["reference"][chosen].mean())
    away = np.percentile(differences, [2.5, 97.5]) - found["difference"]
    expected = found["difference"] + away * np.sqrt(6 / 5) * stats.t.ppf(0.975, 5) / stats.norm.ppf(0.975)
    assert found["bootstrap"]["intervals"]["difference"] == pytest.approx(expected.tolist(), abs=0.02)
    of_student = [right["student"].reshape(6, 30)[np.repeat(np.arange(6), d)].mean() for d in patient_draws(6, 300, 4)]
    plain = np.percentile(of_student, [2.5, 97.5]).tolist()
    assert found["bootstrap"]["intervals"]["student"] == pytest.approx(plain, abs=0.015)
    assert found["patients"] == {"test": 6} and sum(found["counts"]["test"].values()) == 180


def test_weights_of_one_give_the_accuracies():
    sums = {"student": np.array([3.0, 1.0]), "reference": np.array([2.0, 4.0])}
    found = accuracies(sums, np.array([4, 4]), np.array([[1.0, 1.0], [2.0, 0.0]]))
    assert found["student"].tolist() == [0.5, 0.75] and found["difference"].tolist() == [-0.25, 0.25]


def test_the_difference_to_another_student_is_paired():
    """Two that see the same but for a little noise: same fields, same draws, an interval narrower than either's own; and it leaves
    the numbers of the test itself as they were."""
    whole, reference = embedded((0.7, 0.1), fields=30), embedded((0.1, 0.4), fields=30)
    jitter = np.random.default_rng(1).normal(0, 0.05, whole.features.shape).astype(np.float32)
    ablation = replace(whole, features=whole.features + jitter)
    found = evaluate_noninferiority(ablation, reference, CONFIG, seed=4, against=whole)
    alone, other = (evaluate_noninferiority(data, reference, CONFIG, seed=4) for data in (ablation, whole))
    assert found["against"] == other["student"]
    assert found["less_against"] == pytest.approx(alone["student"]["accuracy"] - other["student"]["accuracy"])
    low, high = found["bootstrap"]["intervals"]["less_against"]
    own = alone["bootstrap"]["intervals"]["student"]
    assert low <= found["less_against"] <= high and 0 < high - low < 0.5 * (own[1] - own[0])
    for key in ("student", "reference", "difference", "verdict", "counts"):
        assert found[key] == alone[key]
    assert found["bootstrap"]["intervals"]["difference"] == alone["bootstrap"]["intervals"]["difference"]
    assert "less_against" not in alone and "against" not in alone["rules"]


@pytest.mark.parametrize(
    "interval, expected",
    [
        ([-0.009, 0.02], "yes"),
        ([-0.01, 0.02], "undecided"),
        ([-0.05, -0.011], "no"),
        ([-0.05, -0.01], "undecided"),
        (None, "undecided"),
    ],
)
def test_the_verdict(interval, expected):
    assert verdict(interval, 0.01) == expected


@pytest.mark.parametrize("num_patients", [5, 6, 20])
def test_a_student_at_the_margin_passes_or_fails_in_one_of_forty(num_patients: int):
    """1 point worse in truth, 4 points of deviation between patients: 2.5 % each way by rights; of percentiles 8, 7 and 4 %."""
    rng, trials = np.random.default_rng(0), 800
    told = {"yes": 0, "no": 0, "undecided": 0}
    for trial in range(trials):
        fields = np.full(num_patients, 40)
        truth = np.clip(rng.normal(0.8, 0.05, num_patients), 0, 1)
        less = np.clip(truth - 0.01 + rng.normal(0, 0.04, num_patients), 0, 1)
        sums = {"student": rng.binomial(fields, less), "reference": rng.binomial(fields, truth)}
        values = accuracies(sums, fields, patient_draws(num_patients, 300, trial).astype(float))["difference"]
        estimate = (sums["student"].sum() - sums["reference"].sum()) / fields.sum()
        told[verdict(widened(percentiles(values), estimate, num_patients), 0.01)] += 1
    assert 0.01 < told["yes"] / trials < 0.045 and 0.01 < told["no"] / trials < 0.045


def test_a_good_student_passes_and_a_bad_one_does_not():
    reference = embedded((0.1, 0.4), fields=40)
    cases = {"yes": 0.15, "no": 2.0}
    found = {
        name: evaluate_noninferiority(embedded((noise, 0.1), fields=40), reference, CONFIG, seed=0)
        for name, noise in cases.items()
    }
    assert {name: report["verdict"] for name, report in found.items()} == {"yes": "yes", "no": "no"}
    few = EvaluationConfig(transition=(5, 20), min_patients=20)
    assert evaluate_noninferiority(reference, reference, few, seed=0)["verdict"] == "undecided"
    with pytest.raises(NotApplicableError, match="0 labelled training fields"):
        evaluate_noninferiority(reference, reference, EvaluationConfig(transition=(10, 40)), seed=0)


def test_the_stage_writes_it_and_the_table_prints_it(tmp_path):
    fake_results(tmp_path, {"mad": 1.0, "other": 3.0}, columns=2, noise=3)
    changes = {"evaluate": {"reference": "mad", "runs": 1, "segmentation_num_slides": 0}}
    config = fake_config(tmp_path, ["mad", "other"], **changes)
    evaluate.run(config, "other")
    report = read_json(tmp_path / "evaluate" / "other" / "noninferiority.json")
    assert report["status"] == "ok" and report["reference_encoder"] == "mad" and report["transition"] == "10x-40x"
    table = noninferiority_table(["other", "third"], read_reports(tmp_path, ["other"]))
    text = table.markdown()
    assert f"{100 * report['student']['accuracy']:.1f}" in text and "third is absent" in text
    assert "Non-inferior, margin 1 points" in text and "Accuracy at 10x" in text and "Reference: mad." in text
    assert "intervals: 95 % over resampled patients" in text and "t against normal quantiles" in text
    assert "less_against" not in report and "less mad" not in text
    with pytest.raises(MadError, match="evaluate.reference names 'nobody'"):
        fake_config(tmp_path, ["mad"], evaluate={"reference": "nobody"})


def test_the_stage_sets_every_encoder_against_one(tmp_path):
    fake_results(tmp_path, {"teacher": 1.0, "whole": 1.0, "part": 3.0}, columns=2, noise=3)
    changes = {"evaluate": {"reference": "teacher", "against": "whole", "runs": 1, "segmentation_num_slides": 0}}
    names = ["teacher", "whole", "part", "gone"]
    config = fake_config(tmp_path, names, **changes)
    for name in ("whole", "part"):
        evaluate.run(config, name)
    reports = read_reports(tmp_path, ["whole", "part"])
    whole, part = (reports[name]["noninferiority"] for name in ("whole", "part"))
    assert part["against_encoder"] == "whole" and part["against"] == whole["student"]
    assert part["less_against"] == part["student"]["accuracy"] - whole["student"]["accuracy"]
    assert "less_against" not in whole
    table = noninferiority_table(["whole", "part"], reports)
    assert "| less whole at 10x (points) |" in table.markdown() and "against: accuracy less that of" in table.markdown()
    assert table.frame()["less_against"].tolist()[1] == pytest.approx(100 * part["less_against"])
    (tmp_path / "embed" / "gone").mkdir()
    write_json(tmp_path / "embed" / "gone" / "audit.json", {"status": "absent", "reason": "gated"})
    changes["evaluate"]["against"] = "gone"
    evaluate.run(fake_config(tmp_path, names, **changes), "part")
    alone = read_json(tmp_path / "evaluate" / "part" / "noninferiority.json")
    assert "against_encoder" not in alone and alone["difference"] == part["difference"]
    for wrong, said in (("nobody", "evaluate.against names 'nobody'"), ("whole", "evaluate.against: without effect")):
        with pytest.raises(MadError, match=said):
            fake_config(tmp_path, names, evaluate={"against": wrong})
