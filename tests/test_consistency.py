"""Table 4 against brute force over every pair."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from fake_results import fake_config, fake_results

from mad.config.evaluation import EvaluationConfig
from mad.evaluation import pair_means
from mad.evaluation.consistency import evaluate_consistency, test_pairs
from mad.evaluation.data import Embedded, NotApplicableError
from mad.evaluation.pair_means import Pairs, pairs_of
from mad.evaluation.projection import projection
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


def resampled(data: Embedded, weights: np.ndarray) -> dict[str, float]:
    """What the bootstrap computes for one resample of Table 4's patients."""
    table, labelled = test_pairs(data, (10, 40))
    pairs = pairs_of(data, table, labelled=labelled)
    kept = {}

    def spy(statistic, num_patients, **_):
        assert num_patients == len(weights)
        kept.update({name: float(values[0]) for name, values in statistic(weights[None].astype(float)).items()})
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_means, "patient_intervals", spy)
        pair_means.measure(pairs, np.unique(pairs.patient_of_slide), CONFIG, seed=0)
    return kept


def test_bootstrap_weights_equal_weighted_pairs(data: Embedded) -> None:
    pair = pairwise(data)
    names, parent_patient = np.unique(pair["patient"], return_inverse=True)
    child_patient = np.searchsorted(names, data.patients[test_pairs(data, (10, 40))[0]["child"].to_numpy()])
    weights = np.array([2.0, 0, 1, 3, 1])
    across = weights[parent_patient][:, None] * weights[child_patient][None]
    weight = np.where(pair["other_patient"], across, weights[parent_patient][:, None]) * ~pair["aligned"] * pair["same"]
    found = resampled(data, weights)
    assert found["s_neg_same"] == pytest.approx((pair["cosine"] * weight).sum() / weight.sum())
    aligned = pair["aligned"] * weights[parent_patient][:, None]
    assert found["s_pos"] == pytest.approx((pair["cosine"] * aligned).sum() / aligned.sum())
    allowed = {
        "class_average": weight,
        "same_slide_class_average": weight * pair["same_slide"],
        "other_patient_class_average": weight * pair["other_patient"],
    }
    for name, part in allowed.items():
        by_class = [part * (pair["class"] == code)[:, None] for code in np.unique(pair["class"])]
        expected = np.mean([(pair["cosine"] * one).sum() / one.sum() for one in by_class if one.sum()])
        assert found[f"cosine {name} s_neg_same"] == pytest.approx(expected)


def test_one_draw_of_each_patient_gives_every_number_of_the_report(data: Embedded, report: dict) -> None:
    """Whatever has an interval: its statistic, with each patient drawn once, is the number itself."""
    found = resampled(data, np.ones(5))
    assert set(found) == set(report["bootstrap"]["intervals"])
    for name, value in found.items():
        path = name.split(" ") if " " in name else ["cosine", "pair_average", name]
        part = report
        for key in path:
            part = part[key]
        assert value == pytest.approx(part), name


def random_pairs(slides: int, classes: int, per_slide: int, patients: int, dim: int = 6, seed: int = 0) -> Pairs:
    """Four children of each parent, a fifth of them of any class; the first slides are of one patient, the others of one each."""
    generator = np.random.default_rng(seed)
    num = slides * per_slide
    parent_of, slide = np.repeat(np.arange(num), 4), np.repeat(np.arange(slides), per_slide)
    parents = generator.normal(size=(num, dim)).astype(np.float32)
    code = generator.integers(0, classes, num)
    return Pairs(
        parents=parents,
        children=(parents[parent_of] + generator.normal(size=(4 * num, dim))).astype(np.float32),
        parent_of=parent_of,
        parent_slide=slide,
        child_slide=slide[parent_of],
        parent_code=code,
        child_code=np.where(generator.random(4 * num) < 0.2, generator.integers(0, classes, 4 * num), code[parent_of]),
        classes=[f"class {number}" for number in range(classes)],
        slides=np.array([f"S{number:05d}" for number in range(slides)]),
        patient_of_slide=np.array([f"P{max(number - slides + patients, 0):05d}" for number in range(slides)]),
    )


@pytest.mark.parametrize("classes", [1, 4])
def test_sums_by_patient_and_by_slide_are_those_of_every_pair(classes: int) -> None:
    pairs = random_pairs(7, classes, 5, patients=4)
    names = np.append(np.unique(pairs.patient_of_slide), "without slides")
    _, sums, by_slide = pair_means.measure(pairs, names, CONFIG, seed=0)
    patient = np.searchsorted(names, pairs.patient_of_slide)
    mine, theirs = np.eye(5)[patient[pairs.parent_slide]], np.eye(5)[patient[pairs.child_slide]]
    aligned = pairs.parent_of[None] == np.arange(len(pairs.parents))[:, None]
    same = pairs.parent_code[:, None] == pairs.child_code[None]
    same_slide = pairs.parent_slide[:, None] == pairs.child_slide[None]
    centre = (pairs.parents.mean(0, dtype=float) + pairs.children.mean(0, dtype=float)) / 2
    for space, at in {"cosine": None, "centred": centre}.items():
        cosine = unit(pairs.parents, at) @ unit(pairs.children, at).T
        for name, mask in {"same": same & ~aligned, "diff": ~same & ~aligned}.items():
            for place, values in enumerate((cosine * mask, mask.astype(float))):
                assert sums[f"{space} {name}"][place] == pytest.approx(mine.T @ values @ theirs, rel=1e-12, abs=1e-12)
                inside = mine.T @ (values * same_slide).sum(1)
                assert sums[f"{space} same_slide {name}"][place] == pytest.approx(inside, rel=1e-12, abs=1e-12)
        assert sums[f"{space} pos"][0] == pytest.approx(mine.T @ (cosine * aligned).sum(1), rel=1e-12, abs=1e-12)
    cosine = unit(pairs.parents) @ unit(pairs.children).T
    slide = np.eye(7)[pairs.parent_slide]
    for name, mask in {"aligned": aligned, "other": same_slide & ~aligned}.items():
        assert by_slide["cosine"][name][0] == pytest.approx(slide.T @ (cosine * mask).sum(1), rel=1e-12, abs=1e-12)
        assert (by_slide["cosine"][name][1] == slide.T @ mask.sum(1)).all()


def test_memory_does_not_grow_with_the_square_of_the_slides() -> None:
    """400 slides of 5 classes have 4 million pairs of (slide, class), 32 MB a number."""
    pairs = random_pairs(400, 5, 5, patients=20)
    tracemalloc.start()
    try:
        pair_means.measure(pairs, np.unique(pairs.patient_of_slide), CONFIG, seed=0)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_patients_are_converted_once_and_anew_where_the_tiles_are_others(data: Embedded) -> None:
    assert data.patients is data.patients
    assert set(replace(data, tiles=data.tiles.assign(patient_id="one")).patients) == {"one"}


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
    first_five = np.take_along_axis(pair["aligned"], (-cosine).argsort(1)[:, :5], 1).any(1)
    assert report["retrieval"]["parent_to_child"]["at_5"] == pytest.approx(first_five.mean())
    first_five = np.take_along_axis(pair["aligned"], (-cosine).argsort(0)[:5], 0).any(0)
    assert report["retrieval"]["child_to_parent"]["at_5"] == pytest.approx(first_five.mean())
    parents = report["counts"]["parents"] // report["counts"]["slides"]
    assert report["retrieval"]["child_to_parent"]["chance_at_5"] == pytest.approx(5 / parents)


def test_transitivity_equals_every_pair_of_grandparent_and_grandchild(data: Embedded, report: dict) -> None:
    """By tile ids: S00_L0_i_j holds S00_L2_i_j_k_m; grandchildren are children of Table 4's pairs."""
    grand = report["transitivity"]
    assert grand["status"] == "ok" and grand["transition"] == "2.5x-40x"
    ids, test = data.tiles["tile_id"].to_numpy(str), (data.tiles["split"] == "test").to_numpy()
    child = np.unique(test_pairs(data, (10, 40))[0]["child"].to_numpy())
    upper = data.pairs.loc[data.pairs["kind"] == "2.5x-10x", "parent"].unique()  # tiles of Background make no pairs
    parents = np.sort(upper[test[upper] & (data.codes[upper] >= 0)])
    of = np.array([name.rsplit("_", 2)[0].replace("_L2_", "_L0_") for name in ids[child]])
    child, of = child[np.isin(of, ids[parents])], of[np.isin(of, ids[parents])]
    parents = parents[np.isin(ids[parents], of)]
    cosine = unit(data.features[parents]) @ unit(data.features[child]).T
    aligned = ids[parents][:, None] == of[None]
    assert (aligned.sum(0) == 1).all() and grand["counts"]["children"] == len(child)
    same = data.codes[parents][:, None] == data.codes[child][None]
    slide = data.tiles["slide_id"].to_numpy(str)
    same_slide = slide[parents][:, None] == slide[child][None]
    other_patient = data.patients[parents][:, None] != data.patients[child][None]
    for name, allowed in {"pair_average": True, "same_slide": same_slide, "other_patient": other_patient}.items():
        row = grand["cosine"][name]
        assert row["s_pos"] == pytest.approx(cosine[aligned].mean())
        assert row["num_neg_same"] == (~aligned & allowed & same).sum()
        for key, pairs in {"s_neg_same": ~aligned & allowed & same, "s_neg_diff": ~aligned & allowed & ~same}.items():
            assert row[key] == (pytest.approx(cosine[pairs].mean()) if pairs.any() else None)
    assert grand["cosine"]["other_patient"]["s_neg_same"] is not None
    assert grand["bootstrap"]["intervals"]["delta_sem"] is not None


def test_transitivity_needs_a_coarser_pair(data: Embedded) -> None:
    alone = replace(data, pairs=data.pairs[data.pairs["kind"] == "10x-40x"])
    grand = evaluate_consistency(alone, CONFIG, seed=0)["transitivity"]
    assert grand["status"] == "not applicable" and "no parent of the test pairs is a child at 10x" in grand["reason"]


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


def test_constant_embeddings_retrieve_by_chance_and_have_no_gap(data: Embedded) -> None:
    report = evaluate_consistency(replace(data, features=np.ones_like(data.features)), CONFIG, seed=0)
    for part in (report, report["transitivity"]):
        row = part["cosine"]["pair_average"]
        assert row["s_pos"] == pytest.approx(1) and row["delta_hier"] == pytest.approx(0)
        assert part["centred"]["pair_average"]["s_pos"] == 0  # nothing is left once the mean is gone
        for way in part["retrieval"].values():
            assert way["at_1"] == pytest.approx(way["chance"]) and way["at_5"] == pytest.approx(way["chance_at_5"])


def test_one_slide_has_no_other_patients(data: Embedded) -> None:
    split = data.tiles["split"].where((data.tiles["split"] != "test") | (data.tiles["slide_id"] == "S05"), "none")
    report = evaluate_consistency(replace(data, tiles=data.tiles.assign(split=split)), CONFIG, seed=0)
    assert report["counts"]["slides"] == 1 and report["cosine"]["other_patient"]["s_neg_same"] is None
    assert report["cosine"]["same_slide"] == report["cosine"]["pair_average"]
    assert report["bootstrap"]["reason"] == "1 test patient(s), an interval needs 5"


def test_class_that_the_pairs_lack_has_no_weight(data: Embedded) -> None:
    gone = replace(data, tiles=data.tiles.assign(code=np.where(data.codes == 1, -1, data.codes)))
    report, pair = evaluate_consistency(gone, CONFIG, seed=0), pairwise(gone)
    assert report["counts"]["parents_by_class"][data.classes[1]] == 0 and 1 not in pair["class"]
    means = [
        pair["cosine"][(pair["class"] == code)[:, None] & pair["aligned"]].mean() for code in np.unique(pair["class"])
    ]
    assert report["cosine"]["class_average"]["s_pos"] == pytest.approx(np.mean(means))
