"""The numbers of the slide-level evaluation from predictions."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import r2_score, roc_auc_score

from mad.config.biomarkers import BiomarkersConfig
from mad.evaluation.biomarkers import difference, plain_numbers, statistic, summarise

SETTINGS = BiomarkersConfig()
BOOT = {"resamples": 200, "min_patients": 5, "seed": 0}


def _predictions(signal: float, *, seed: int = 0, slides: int = 60, repeats: int = 2, folds: int = 5) -> pd.DataFrame:
    """Binary out-of-fold scores; every head has its own offset, so that only scores of one head compare."""
    rng = np.random.default_rng(seed)
    truth, lines = np.arange(slides) % 2, []
    for repeat in range(repeats):
        fold = rng.permutation(slides) % folds
        offset = rng.normal(size=folds)[fold] * 0.3
        score = signal * truth + rng.normal(size=slides) + offset
        for n in range(slides):
            for share, extra in ((1.0, 0.0), (0.5, rng.normal() * 0.2)):
                lines.append(
                    (
                        f"S{n}",
                        f"P{n // 2}",
                        repeat,
                        fold[n],
                        share,
                        10 * share,
                        20 * share,
                        float(truth[n]),
                        -score[n] - extra,
                        score[n] + extra,
                    )
                )
    columns = ["slide_id", "patient_id", "repeat", "fold", "share", "tokens", "tiles", "truth", "score_0", "score_1"]
    return pd.DataFrame(lines, columns=columns)


def test_auroc_is_over_pairs_of_one_fold_and_pooled_beside_it():
    table = _predictions(1.0)
    full = table[table["share"] == 1]
    numbers = plain_numbers(full, ["0", "1"], sorted(full["patient_id"].unique()))
    wins = pairs = 0.0
    for _, part in full.groupby(["repeat", "fold"]):
        n = part["truth"].sum() * (1 - part["truth"]).sum()
        wins, pairs = wins + n * roc_auc_score(part["truth"], part["score_1"]), pairs + n
    assert numbers["auroc"] == pytest.approx(wins / pairs, abs=1e-12)
    pooled = roc_auc_score(full[full["repeat"] == 0]["truth"], full[full["repeat"] == 0]["score_1"])
    one = full[full["repeat"] == 0]
    assert plain_numbers(one, ["0", "1"], sorted(one["patient_id"].unique()))["auroc_pooled"] == pytest.approx(pooled)


def test_summary_has_every_share_with_interval_and_spread():
    found = summarise(_predictions(1.5), ["0", "1"], SETTINGS, **BOOT)
    assert set(found) == {"1", "0.5"} and (found["0.5"]["tokens"], found["0.5"]["tiles"]) == (5, 10)
    metric = found["1"]["metrics"]["auroc"]
    assert metric["interval"][0] < metric["value"] < metric["interval"][1]
    assert len(metric["repeats"]["values"]) == 2 and len(metric["folds"]["values"]) == 10


def test_difference_is_paired():
    """An aggregator against itself with a little noise: the difference's interval is far narrower than either's own."""
    one = _predictions(1.0)
    full = one[one["share"] == 1]
    other = full.assign(score_1=full["score_1"] + 0.05 * np.random.default_rng(1).normal(size=len(full)))
    gap = difference(full, other, ["0", "1"], **BOOT)
    own = summarise(full, ["0", "1"], SETTINGS, **BOOT)["1"]["metrics"]["auroc"]["interval"]
    low, high = gap["metrics"]["auroc"]["interval"]
    assert gap["slides"] == 60 and low <= gap["metrics"]["auroc"]["value"] <= high
    assert high - low < 0.3 * (own[1] - own[0])
    same = difference(full, full, ["0", "1"], **BOOT)["metrics"]["auroc"]
    assert same == {"value": 0.0, "interval": [0.0, 0.0]}


def test_difference_is_of_the_slides_that_both_predict():
    full = _predictions(1.0)
    full = full[full["share"] == 1]
    part = full[full["slide_id"].isin([f"S{n}" for n in range(40)])]
    gap = difference(full, part, ["0", "1"], **BOOT)
    assert gap["slides"] == 40 and gap["metrics"]["auroc"]["value"] == 0


def test_difference_of_rows_without_a_common_slide_is_nothing():
    full = _predictions(1.0)
    full = full[full["share"] == 1]
    first = full["slide_id"].isin([f"S{n}" for n in range(20)])
    gap = difference(full[first], full[~first], ["0", "1"], **BOOT)
    nothing = {"value": None, "interval": None}
    assert gap == {"slides": 0, "metrics": {"auroc": nothing, "auroc_pooled": nothing}}
    assert set(difference(full[first], full[~first], None, **BOOT)["metrics"]) == {"r2", "spearman"}


def test_few_patients_get_no_interval():
    table = _predictions(1.0, slides=8)
    found = summarise(table[table["share"] == 1], ["0", "1"], SETTINGS, resamples=50, min_patients=5, seed=0)["1"]
    assert found["metrics"]["auroc"]["interval"] is None and "4 test patient(s)" in found["reason"]


def test_regression_is_r2_and_rank_correlation_mean_over_repeats():
    rng = np.random.default_rng(2)
    truth = rng.normal(size=30)
    parts, expected = [], []
    for repeat in range(2):
        value = truth + 0.5 * rng.normal(size=30)
        expected.append(r2_score(truth, value))
        who = [f"P{n}" for n in range(30)]
        parts.append(
            pd.DataFrame(
                {
                    "slide_id": who,
                    "patient_id": who,
                    "repeat": repeat,
                    "fold": np.arange(30) % 5,
                    "truth": truth,
                    "score_0": value,
                }
            )
        )
    table = pd.concat(parts)
    numbers = plain_numbers(table, None, sorted(table["patient_id"].unique()))
    assert numbers["r2"] == pytest.approx(np.mean(expected), abs=1e-12) and 0.5 < numbers["spearman"] < 1


def test_interval_covers_the_truth_as_often_as_it_says():
    """Scores N(d, 1) against N(0, 1) have AUROC Phi(d / sqrt 2); 95 % intervals from 60 patients over 120 cohorts."""
    expected, hits = 0.7602, 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        truth = np.arange(60) % 2
        who = [f"P{n}" for n in range(60)]
        table = pd.DataFrame(
            {
                "slide_id": who,
                "patient_id": who,
                "repeat": 0,
                "fold": 0,
                "truth": truth.astype(float),
                "score_1": truth + rng.normal(size=60),
            }
        )
        found = statistic(table, ["0", "1"], sorted(who))
        from mad.evaluation.bootstrap import patient_intervals

        low, high = patient_intervals(found, 60, resamples=300, min_patients=5, seed=seed)["intervals"]["auroc"]
        hits += low <= expected <= high
    assert 0.87 < hits / 120 <= 1
