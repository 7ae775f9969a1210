"""Table 4 against brute force over every pair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_results import fake_config, fake_results

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.consistency import evaluate_consistency, projection, test_pairs
from mad.evaluation.data import Embedded, NotApplicableError
from mad.metrics.cosine import unit
from mad.stages.evaluate import load

test_pairs.__test__ = False  # type: ignore[attr-defined]
CONFIG = EvaluationConfig(bootstrap_resamples=200, figure_parents=12)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    folder = tmp_path_factory.mktemp("results")
    splits = {f"S0{n}": "test" for n in range(2, 8)}
    fake_results(folder, {"mad": 0.5}, columns=2, splits=splits)
    loaded = load(fake_config(folder, ["mad"]), "mad")
    patients = loaded.tiles["patient_id"].replace({"PS03": "PS02"})  # two slides of one patient
    return replace(loaded, tiles=loaded.tiles.assign(patient_id=patients))


@pytest.fixture(scope="module")
def report(data: Embedded) -> dict:
    return evaluate_consistency(data, CONFIG, seed=0)


def pairwise(data: Embedded, centre: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Cosines of every test parent with every test child [p, c] and the masks of the buckets."""
    pairs, _ = test_pairs(data, (10, 40))
    parents, child = np.unique(pairs["parent"]), pairs["child"].to_numpy()
    slide, patient = data.tiles["slide_id"].to_numpy(str), data.patients
    return {
        "cosine": unit(data.features[parents], centre) @ unit(data.features[child], centre).T,
        "aligned": parents[:, None] == pairs["parent"].to_numpy()[None],
        "same": data.codes[parents][:, None] == data.codes[child][None],
        "same_slide": slide[parents][:, None] == slide[child][None],
        "other_patient": patient[parents][:, None] != patient[child][None],
        "class": data.codes[parents],
        "patient": patient[parents],
    }


@pytest.mark.parametrize("part", ["pair_average", "same_slide", "other_patient"])
def test_equals_the_mean_over_every_pair(data: Embedded, report: dict, part: str) -> None:
    pair = pairwise(data)
    allowed = ~pair["aligned"] & (pair[part] if part != "pair_average" else True)
    row = report["cosine"][part]
    assert row["s_pos"] == pytest.approx(pair["cosine"][pair["aligned"]].mean())
    assert row["s_neg_same"] == pytest.approx(pair["cosine"][allowed & pair["same"]].mean())
    assert row["s_neg_diff"] == pytest.approx(pair["cosine"][allowed & ~pair["same"]].mean())
    assert row["num_neg_same"] == (allowed & pair["same"]).sum()
    assert row["num_neg_diff"] == (allowed & ~pair["same"]).sum()
    assert row["delta_hier"] == pytest.approx(row["s_pos"] - row["s_neg_same"])
    assert row["delta_sem"] == pytest.approx(row["s_neg_same"] - row["s_neg_diff"])


def test_class_average_is_the_mean_of_class_means(data: Embedded, report: dict) -> None:
    pair = pairwise(data)
    expected = {"s_pos": [], "s_neg_same": [], "s_neg_diff": []}
    for code in np.unique(pair["class"]):
        mine = (pair["class"] == code)[:, None]
        expected["s_pos"].append(pair["cosine"][mine & pair["aligned"]].mean())
        expected["s_neg_same"].append(pair["cosine"][mine & ~pair["aligned"] & pair["same"]].mean())
        expected["s_neg_diff"].append(pair["cosine"][mine & ~pair["aligned"] & ~pair["same"]].mean())
    for name, values in expected.items():
        assert report["cosine"]["class_average"][name] == pytest.approx(np.mean(values))


def test_a_positive_of_another_class_is_no_negative(data: Embedded, report: dict) -> None:
    pair = pairwise(data)
    assert (pair["aligned"] & ~pair["same"]).sum() == report["counts"]["children_of_another_class"] > 0
    row = report["cosine"]["pair_average"]
    assert row["num_pos"] + row["num_neg_same"] + row["num_neg_diff"] == pair["cosine"].size


def test_shared_offset_vanishes_from_the_centred_variant(data: Embedded, report: dict) -> None:
    moved = evaluate_consistency(replace(data, features=data.features + np.float32(20)), CONFIG, seed=0)
    for name in ("s_pos", "s_neg_same", "s_neg_diff"):
        assert moved["centred"]["pair_average"][name] == pytest.approx(
            report["centred"]["pair_average"][name], abs=1e-4
        )
    assert moved["cosine"]["pair_average"]["s_neg_diff"] > report["cosine"]["pair_average"]["s_neg_diff"] + 0.3


def test_intervals_resample_patients(data: Embedded, report: dict) -> None:
    boot = report["bootstrap"]
    assert boot["patients"] == 5 and boot["resamples"] == 200
    low, high = boot["intervals"]["delta_hier"]
    assert low <= report["cosine"]["pair_average"]["delta_hier"] <= high


def test_bootstrap_weights_equal_weighted_pairs(data: Embedded) -> None:
    from mad.evaluation import consistency

    kept: dict[str, consistency.Buckets] = {}
    original = consistency.patient_intervals

    def spy(statistic, num_patients, **options):
        kept["buckets"] = statistic.__self__
        return original(statistic, num_patients, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consistency, "patient_intervals", spy)
        evaluate_consistency(data, CONFIG, seed=0)
    pair = pairwise(data)
    names, parent_patient = np.unique(pair["patient"], return_inverse=True)
    child_patient = np.searchsorted(names, data.patients[test_pairs(data, (10, 40))[0]["child"].to_numpy()])
    weights = np.array([2.0, 0, 1, 3, 1])
    across = weights[parent_patient][:, None] * weights[child_patient][None]
    weight = np.where(pair["other_patient"], across, weights[parent_patient][:, None]) * ~pair["aligned"] * pair["same"]
    found = kept["buckets"].statistics(weights[None])
    assert found["s_neg_same"][0] == pytest.approx((pair["cosine"] * weight).sum() / weight.sum())
    aligned = pair["aligned"] * weights[parent_patient][:, None]
    assert found["s_pos"][0] == pytest.approx((pair["cosine"] * aligned).sum() / aligned.sum())


def test_few_patients_give_no_interval(data: Embedded) -> None:
    boot = evaluate_consistency(data, EvaluationConfig(min_patients=6), seed=0)["bootstrap"]
    assert boot["intervals"] is None and boot["reason"] == "5 test patient(s), an interval needs 6"


def test_retrieval_is_within_slides(data: Embedded, report: dict) -> None:
    pair = pairwise(data)
    cosine = np.where(pair["same_slide"], pair["cosine"], -np.inf)
    hit = np.take_along_axis(pair["aligned"], cosine.argmax(1)[:, None], 1).mean()
    assert report["retrieval"]["parent_to_child"]["at_1"] == pytest.approx(hit)
    back = np.take_along_axis(pair["aligned"], cosine.argmax(0)[None], 0).mean()
    assert report["retrieval"]["child_to_parent"]["at_1"] == pytest.approx(back)
    chance = report["counts"]["slides"] / report["counts"]["parents"]  # every slide has the same number of parents
    assert report["retrieval"]["child_to_parent"]["chance"] == pytest.approx(chance)
    assert report["retrieval"]["parent_to_child"]["chance"] == pytest.approx(chance)


def test_without_labels_positives_and_negatives_remain(data: Embedded) -> None:
    bare = replace(data, tiles=data.tiles.assign(label=None, code=-1))
    row = evaluate_consistency(bare, CONFIG, seed=0)
    pair = pairwise(bare)
    assert not row["labelled"] and row["counts"]["parents_by_class"] is None
    assert row["cosine"]["pair_average"]["s_neg_same"] == pytest.approx(pair["cosine"][~pair["aligned"]].mean())
    assert row["cosine"]["pair_average"]["s_neg_diff"] is None
    assert row["cosine"]["pair_average"]["delta_sem"] is None


def test_missing_magnification_is_not_applicable(data: Embedded) -> None:
    with pytest.raises(NotApplicableError, match="no 20x-80x pairs"):
        evaluate_consistency(data, EvaluationConfig(transition=(20, 80)), seed=0)


def test_projection_draws_parents_of_every_class_with_all_children(data: Embedded) -> None:
    table, fitted = projection(data, CONFIG, seed=0)
    parents, children = table[table["role"] == "parent"], table[table["role"] == "child"]
    assert len(parents) == 12 and len(children) == 12 * 16
    assert set(children["parent_id"]) == set(parents["tile_id"])
    assert parents["label"].value_counts().max() <= -(-12 // parents["label"].nunique()) + 1
    assert parents["label"].nunique() == len(np.unique(pairwise(data)["class"]))
    assert 0 < sum(fitted["explained"]) <= 1
    assert projection(data, CONFIG, seed=0)[0].equals(table)
