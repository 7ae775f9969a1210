"""Table 5: which tiles are trained on and tested on, the consistency formula, Background apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_results import fake_config, fake_results
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.by_patient import transfer_statistics
from mad.evaluation.data import Embedded, NotApplicableError
from mad.evaluation.scales import scale_matrix
from mad.evaluation.transfer import PROBES, RULES, consistency, evaluate_transfer, test_tiles, transfer_scores
from mad.reporting.published import TABLE5
from mad.stages.evaluate import load

test_tiles.__test__ = False  # type: ignore[attr-defined]
CONFIG = EvaluationConfig(runs=2, probe_steps=200, probe_lr=1e-2, bootstrap_resamples=50)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    folder = tmp_path_factory.mktemp("results")
    fake_results(folder, {"mad": 1.0}, columns=2, noise=3)
    return load(fake_config(folder, ["mad"]), "mad")


@pytest.mark.parametrize("model", TABLE5)
def test_formula_reproduces_every_row_of_the_paper(model: str) -> None:
    row = TABLE5[model]

    def misfit(name: str) -> float:
        """How far the printed per cent lie outside of what the printed columns allow, both rounded in their last digit."""
        low = consistency(row[f"coarse {name}"] + 5e-5, row[f"fine {name}"] - 5e-5)
        high = consistency(row[f"coarse {name}"] - 5e-5, row[f"fine {name}"] + 5e-5)
        return max(low - (row["consistency"] + 0.05), (row["consistency"] - 0.05) - high, 0)

    assert misfit("iou") == 0
    assert misfit("dice") > 0 and misfit("accuracy") > 0  # the formula is that of mean IoU, and of nothing else


def test_consistency_of_nothing_is_nan() -> None:
    assert np.isnan(consistency(0, 0.5)) and np.isnan(consistency(np.nan, 0.5))


def test_fine_tiles_are_exactly_the_children_of_the_coarse_ones(data: Embedded) -> None:
    test, parent_of_fine = test_tiles(data, (10, 40))
    tiles = data.tiles
    coarse, fine = (tiles.iloc[test[side]] for side in ("coarse", "fine"))
    assert set(coarse["magnification"]) == {10} and set(fine["magnification"]) == {40}
    assert set(coarse["split"]) == set(fine["split"]) == {"test"}
    has_parent = parent_of_fine >= 0
    parents = coarse["tile_id"].to_numpy()[parent_of_fine[has_parent]]
    cut = [name.rsplit("_", 1)[0].replace("_L2_", "_L1_") for name in fine["tile_id"][has_parent]]
    assert list(parents) == cut
    num_pairs = len(set(parents))
    assert has_parent.sum() == 16 * num_pairs
    assert set(coarse["label"].iloc[num_pairs:]) == set(fine["label"][~has_parent]) == {"Background"}
    everything = data.pairs.merge(tiles[["split"]], left_on="parent", right_index=True)
    wanted = everything[(everything["split"] == "test") & (everything["kind"] == "10x-40x")]
    assert set(wanted["child"]) == set(test["fine"][has_parent])


def test_a_standalone_tile_of_another_pair_is_tested_and_none_twice(data: Embedded) -> None:
    """Glass that is a child of a 2.5x parent is tested at 10x; glass at 40x that is a child of a tested parent is there already."""
    test, _ = test_tiles(data, (10, 40))
    tiles, narrow = data.tiles.copy(), data.pairs["kind"] == "10x-40x"
    spare = np.intersect1d(test["coarse"], data.pairs.loc[~narrow, "child"])[0]
    pairs = data.pairs[~(narrow & (data.pairs["parent"] == spare))]
    lost = data.pairs.loc[narrow & (data.pairs["parent"] == spare), "child"]
    again = np.setdiff1d(test["fine"], lost)[0]
    tiles.loc[[spare, again], ["label", "code", "standalone"]] = "Background", data.classes.index("Background"), True
    now, place = test_tiles(replace(data, tiles=tiles, pairs=pairs), (10, 40))
    assert set(now["coarse"]) == set(test["coarse"]) and set(now["fine"]) == set(test["fine"]) - set(lost)
    assert all(len(np.unique(rows)) == len(rows) for rows in now.values()) and len(place) == len(now["fine"])


def test_training_tiles_are_coarse_ones_alone(data: Embedded) -> None:
    report, _ = evaluate_transfer(data, CONFIG, seed=0)
    train = data.tiles[(data.tiles["split"] == "train") & (data.tiles["magnification"] == 10)]
    assert sum(report["counts"]["train"].values()) == len(train)
    fine_changed = np.where((data.tiles["magnification"] == 40).to_numpy()[:, None], 0, data.features)
    other, _ = evaluate_transfer(replace(data, features=fine_changed.astype(np.float32)), CONFIG, seed=0)
    assert other["paper"]["with_background"]["coarse"] == report["paper"]["with_background"]["coarse"]
    assert other["paper"]["with_background"]["fine"] != report["paper"]["with_background"]["fine"]


def test_scores_equal_scikit_learn(data: Embedded) -> None:
    test, parent_of_fine = test_tiles(data, (10, 40))
    generator = np.random.default_rng(0)
    truth = {side: data.codes[rows] for side, rows in test.items()}
    predicted = {
        side: np.where(generator.random((2, len(codes))) < 0.7, codes, generator.integers(0, 5, (2, len(codes))))
        for side, codes in truth.items()
    }
    patients = {side: data.patients[rows] for side, rows in test.items()}
    report = transfer_scores(predicted, truth, patients, data, CONFIG, parent_of_fine=parent_of_fine, seed=0)
    for side in ("coarse", "fine"):
        kept = {"with_background": truth[side] >= 0, "without_background": truth[side] != 4}
        for variant, rows in kept.items():
            part = report[variant][side]
            names = sorted(set(truth[side][rows]))
            for run, guess in enumerate(predicted[side]):
                pair = truth[side][rows], guess[rows]
                options = {"labels": names, "average": "macro"}
                assert part["mean_iou"]["values"][run] == pytest.approx(jaccard_score(*pair, **options))
                assert part["mean_dice"]["values"][run] == pytest.approx(f1_score(*pair, **options))
                assert part["accuracy"]["values"][run] == pytest.approx(accuracy_score(*pair))
                iou, dice = part["mean_iou"]["values"][run], part["mean_dice"]["values"][run]
                assert dice <= 2 * iou / (1 + iou) + 1e-12
    means = [report["with_background"][side]["mean_iou"]["mean"] for side in ("coarse", "fine")]
    assert report["with_background"]["consistency"]["mean"] == pytest.approx(100 * means[1] / means[0])
    inside = parent_of_fine >= 0
    agree = (predicted["fine"][:, inside] == predicted["coarse"][:, parent_of_fine[inside]]).mean(1)
    assert report["agreement"]["values"] == pytest.approx(agree)


def test_matching_undoes_any_offset_of_the_fine_magnification(data: Embedded) -> None:
    fine = (data.tiles["magnification"] == 40).to_numpy()[:, None]
    offset = 10 * np.random.default_rng(0).normal(size=data.features.shape[1])
    moved = replace(data, features=(data.features + fine * offset).astype(np.float32))
    (before, _), (after, _) = (evaluate_transfer(d, CONFIG, seed=0) for d in (data, moved))

    def iou(report: dict, variant: str, side: str = "fine") -> float:
        return report[variant]["with_background"][side]["mean_iou"]["mean"]

    for probe in ("paper", "sound"):
        assert iou(after, probe) < iou(before, probe) - 0.1
        for variant in (f"{probe}_matched", f"{probe}_coral"):
            assert iou(after, variant) == pytest.approx(iou(before, variant), abs=0.005)
            assert iou(after, variant, "coarse") == iou(after, probe, "coarse")


def test_background_may_be_unknown(data: Embedded) -> None:
    report, _ = evaluate_transfer(replace(data, background=None), CONFIG, seed=0)
    assert report["paper"]["without_background"] is None
    assert report["counts"]["coarse_test"]["Background"] == 0


def test_class_without_training_tiles_is_named_and_scored_zero(data: Embedded) -> None:
    codes = data.codes.copy()
    codes[(codes == 2) & (data.tiles["split"] == "train").to_numpy()] = -1
    report, _ = evaluate_transfer(replace(data, tiles=data.tiles.assign(code=codes)), CONFIG, seed=0)
    assert "Leptomeninges" in report["absent_in_train"] and report["counts"]["train"]["Leptomeninges"] == 0
    assert report["sound"]["with_background"]["fine"]["iou"]["Leptomeninges"]["mean"] == 0


def without_labels(data: Embedded, split: str, *magnifications: float) -> Embedded:
    gone = (data.tiles["split"] == split) & data.tiles["magnification"].isin(magnifications)
    return replace(data, tiles=data.tiles.assign(code=np.where(gone, -1, data.codes)))


def test_without_pairs_every_labelled_test_tile_is_tested(data: Embedded) -> None:
    alone = replace(data, pairs=data.pairs.iloc[:0])
    report, probe = evaluate_transfer(alone, CONFIG.model_copy(update={"min_patients": 2}), seed=0)
    assert report["table5"] == {"status": "ok", "reason": None, "paired": False} and probe is not None
    rows = {"coarse": data.rows("test", 10), "fine": data.rows("test", 40)}
    assert report["n"] == {side: len(each) for side, each in rows.items()}
    truth = data.codes[rows["fine"]]
    expected = [
        jaccard_score(truth, guess, labels=np.unique(truth), average="macro")
        for guess in probe.predict(data.features[rows["fine"]])
    ]
    assert report["paper"]["with_background"]["fine"]["mean_iou"]["values"] == pytest.approx(expected)
    sound = report["sound"]["with_background"]
    assert sound["coarse"]["mean_iou"]["mean"] == report["matrix"]["10x"]["10x"]
    assert sound["fine"]["mean_iou"]["mean"] == report["matrix"]["10x"]["40x"]
    low, high = sound["bootstrap"]["intervals"]["fine_mean_iou"]
    assert low <= sound["fine"]["mean_iou"]["mean"] <= high
    for probe_name in PROBES:
        numbers = (report[probe_name]["agreement"], report[probe_name]["with_background"]["consistency"])
        assert all(number["mean"] is None and not any(number["values"]) for number in numbers)
        assert report[probe_name]["with_background"]["bootstrap"]["intervals"]["consistency"] is None
        assert report[probe_name]["agreement"]["bootstrap"]["intervals"]["agreement"] is None
    differ = {name for name, rule in report["rules"].items() if rule != RULES[name]}
    assert differ == {"coarse_test", "fine_test", "consistency", "agreement"} and set(report["rules"]) == set(RULES)
    again = transfer_statistics(report["by_patient"], np.ones((1, 2)))
    assert again["sound with_background fine mean_iou"][0] == pytest.approx(sound["fine"]["mean_iou"]["mean"])
    assert np.isnan(again["sound with_background consistency"][0]) and np.isnan(again["paper agreement"][0])
    paired = evaluate_transfer(data, CONFIG, seed=0)[0]
    assert paired["table5"]["paired"] and paired["rules"] == RULES and paired["matrix"] == report["matrix"]


@pytest.mark.parametrize(
    ("split", "magnification", "reason"),
    [
        ("train", 10, "no labelled training tiles at 10x"),
        ("test", 10, "no labelled test tiles at 10x"),
        ("test", 40, "no labelled test tiles at 40x"),
    ],
)
def test_the_matrix_stands_without_table_5(data: Embedded, split: str, magnification: float, reason: str) -> None:
    lacking = without_labels(replace(data, pairs=data.pairs.iloc[:0]), split, magnification)
    report, probe = evaluate_transfer(lacking, CONFIG, seed=0)
    assert report["table5"] == {"status": "not applicable", "reason": reason, "paired": False} and probe is None
    assert [report[name] for name in PROBES] == [None] * 6 and "by_patient" not in report
    alone = scale_matrix(lacking, CONFIG, seed=0)
    assert {name: report[name] for name in alone} == alone and report["matrix"]["2.5x"]["2.5x"] is not None
    assert set(report) | {"by_patient"} == set(evaluate_transfer(data, CONFIG, seed=0)[0])


def test_not_applicable_without_labels_or_a_second_magnification(data: Embedded) -> None:
    with pytest.raises(NotApplicableError, match="no labelled training tiles at 10x"):
        evaluate_transfer(replace(data, tiles=data.tiles.assign(code=-1)), CONFIG, seed=0)
    one = without_labels(without_labels(data, "test", 2.5, 40), "train", 2.5, 40)
    with pytest.raises(NotApplicableError, match="no labelled test tiles at 40x"):
        evaluate_transfer(replace(one, pairs=data.pairs.iloc[:0]), CONFIG, seed=0)


def test_every_number_of_the_table_has_an_interval(data: Embedded) -> None:
    config = CONFIG.model_copy(update={"min_patients": 2})
    report, _ = evaluate_transfer(data, config, seed=0)
    for probe in ("paper", "sound", "paper_matched", "sound_coral"):
        for variant in ("with_background", "without_background"):
            part = report[probe][variant]
            intervals = part["bootstrap"]["intervals"]
            for side in ("coarse", "fine"):
                for key in ("mean_iou", "mean_dice", "accuracy"):
                    low, high = intervals[f"{side}_{key}"]
                    assert low <= part[side][key]["mean"] <= high
                for key in ("iou", "dice"):
                    for name, number in part[side][key].items():
                        interval = intervals[f"{side}_{key} {name}"]
                        assert (interval is None) == (number["mean"] is None)
            assert intervals["consistency"] is not None
        low, high = report[probe]["agreement"]["bootstrap"]["intervals"]["agreement"]
        assert low <= report[probe]["agreement"]["mean"] <= high
    few = evaluate_transfer(data, CONFIG, seed=0)[0]
    for boot in (few["sound"]["agreement"]["bootstrap"], few["sound"]["with_background"]["bootstrap"]):
        assert boot["intervals"] is None and boot["reason"] == "2 test patient(s), an interval needs 5"


def test_class_scores_equal_scikit_learn(data: Embedded) -> None:
    test, parent_of_fine = test_tiles(data, (10, 40))
    truth = {side: data.codes[rows] for side, rows in test.items()}
    generator = np.random.default_rng(1)
    predicted = {side: generator.integers(0, 5, (1, len(codes))) for side, codes in truth.items()}
    patients = {side: data.patients[rows] for side, rows in test.items()}
    report = transfer_scores(predicted, truth, patients, data, CONFIG, parent_of_fine=parent_of_fine, seed=0)
    for side, codes in truth.items():
        part = report["with_background"][side]
        for name, score in (("iou", jaccard_score), ("dice", f1_score)):
            expected = score(codes, predicted[side][0], labels=range(5), average=None)
            for code, label in enumerate(data.classes):
                found = part[name][label]["mean"]
                assert found == pytest.approx(expected[code]) if code in codes else found is None


def test_constant_embeddings_are_told_apart_nowhere(data: Embedded) -> None:
    report, _ = evaluate_transfer(replace(data, features=np.ones_like(data.features)), CONFIG, seed=0)
    for probe in ("paper", "sound", "paper_matched", "sound_coral"):
        assert report[probe]["agreement"]["mean"] == 1.0
        assert (
            sum(
                score["mean"] > 0
                for score in report[probe]["with_background"]["fine"]["dice"].values()
                if score["mean"]
            )
            <= 1
        )
