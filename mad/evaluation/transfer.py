"""Table 5 of the MAD paper: a probe trained only on 10x embeddings, tested on 10x and, unchanged, on 40x tiles.

Test tiles of the coarse magnification are the labelled test parents of 10x-40x pairs and the standalone Background tiles;
those of the fine one are exactly the children of these parents and the standalone Background tiles: the same tissue seen
twice. Consistency is 100 x mIoU(40x) / mIoU(10x), which reproduces every row that the paper prints.

Without labelled pairs in the test (public tile sets) every labelled test tile of the two magnifications is tested, and what
compares a parent with its children is null. The matrix of `mad.evaluation.scales` asks for no pairs and stands by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.bootstrap import patient_intervals
from mad.evaluation.by_patient import Sums, class_statistics, consistency, iou_statistics, matrices_by_patient, ratio
from mad.evaluation.data import Embedded, NotApplicableError, kind_of, plain, spread
from mad.evaluation.probe import Probe, cohort_probe, paper_probe
from mad.evaluation.scales import coral, crosses_scales, match_moments, scale_matrix
from mad.metrics.confusion import accuracy, class_dice, class_iou, drop_truth, macro
from mad.metrics.moments import moments

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

RULES = {
    "train": "labelled training tiles of the coarse magnification alone, from pairs and standalone",
    "coarse_test": "labelled test parents of the transition's pairs, and standalone Background tiles",
    "fine_test": "the labelled children of exactly these parents, and standalone Background tiles",
    "scores": "mean IoU and mean Dice: macro over the classes of the test truth, from one confusion matrix pooled over all tiles",
    "without_background": "tiles whose true class is Background are left out; predicting Background stays an error",
    "consistency": "100 * mean IoU (fine) / mean IoU (coarse), of the means over runs",
    "agreement": "share of children that get the class predicted for their parent",
    "paper": "single linear layer, cross-entropy, Adam, last step; a run varies the initial weights and the order of tiles",
    "sound": "standardised by the training tiles, full batch, L2 strength by coarse validation tiles",
    "matched": "the same probes; fine embeddings get the coarse mean and deviation per dimension, from unlabelled training tiles",
    "coral": "the same probes; fine embeddings get the coarse mean and covariance, from unlabelled training tiles",
    "matrix": "mean IoU of the sound probe trained on one magnification, tested on all labelled test tiles of another",
    "chance": "matrix_chance: a guess that names each class of the test truth with the same probability, by expected counts",
    "interval": "test patients are resampled, the trained probes stay; scores are averaged over runs within a resample",
}
UNPAIRED = RULES | {
    "coarse_test": "all labelled test tiles of the coarse magnification: the test has no labelled pairs",
    "fine_test": "all labelled test tiles of the fine magnification; they need not show the tissue of the coarse ones",
    "consistency": "null: a ratio of scores on the same tissue, which needs aligned pairs",
    "agreement": "null: it is of children and their parents, which needs aligned pairs",
}
PROBES = ("paper", "sound", "paper_matched", "sound_matched", "paper_coral", "sound_coral")


def evaluate_transfer(
    data: Embedded, config: EvaluationConfig, *, seed: int, device: str | torch.device = "cpu"
) -> tuple[dict[str, Any], Probe | None]:
    """Both halves of Table 5 with every probe, and the matrix; also the paper's probe, which Figure 4 maps with.

    `table5` of the report tells whether Table 5 has its tiles; where it has not, its probes are null, there is no paper's probe
    and no `by_patient`, which else holds, as arrays, the sums that `mad.evaluation.by_patient` reads.

    Raises:
        NotApplicableError: Table 5 lacks tiles, and no magnification can be tested with the probe of another one either.
    """
    coarse, fine = config.transition
    train, val = data.rows("train", coarse), data.rows("val", coarse)
    test, parent_of_fine = test_tiles(data, config.transition)
    paired = bool((parent_of_fine >= 0).any())
    sides = (("training", train, coarse), ("test", test["coarse"], coarse), ("test", test["fine"], fine))
    lacking = next((f"no labelled {name} tiles at {step:g}x" for name, rows, step in sides if not len(rows)), None)
    if lacking and not crosses_scales(data):
        raise NotApplicableError(lacking)
    seeds = [seed + run for run in range(config.runs)]
    paper, fitted, variants, by_patient = None, {}, dict[str, Any](dict.fromkeys(PROBES)), None
    if not lacking:
        paper, sound, variants, by_patient = _table5(
            data, config, train, val, test, parent_of_fine=parent_of_fine, seeds=seeds, device=device
        )
        fitted = {float(coarse): sound}
    tested = test["coarse"] if paired else np.concatenate(list(test.values()))
    result = {
        "rules": RULES if paired else UNPAIRED,
        "table5": {"status": "not applicable" if lacking else "ok", "reason": lacking, "paired": paired},
        "classes": data.classes,
        "background": data.background if data.background_code is not None else None,
        "transition": [coarse, fine],
        "runs": config.runs,
        "seeds": seeds,
        "probe": {"steps": config.probe_steps, "lr": config.probe_lr, "batch": config.probe_batch},
        "counts": {
            "train": data.counts(train),
            "val": data.counts(val),
            "coarse_test": data.counts(test["coarse"]),
            "fine_test": data.counts(test["fine"]),
        },
        "n": {side: len(rows) for side, rows in test.items()},
        "patients": {"train": data.num_patients(train), "test": data.num_patients(tested)},
        "absent_in_train": [name for name, count in data.counts(train).items() if not count],
        "absent_in_test": [name for name, count in data.counts(tested).items() if not count],
        **variants,
        **scale_matrix(data, config, fitted=fitted, seed=seed, device=device),
    }
    return plain(result) | ({"by_patient": by_patient} if by_patient else {}), paper


def _table5(
    data: Embedded,
    config: EvaluationConfig,
    train: Rows,
    val: Rows,
    test: dict[str, Rows],
    *,
    parent_of_fine: Rows,
    seeds: list[int],
    device: str | torch.device,
) -> tuple[Probe, Probe, dict[str, Any], Sums]:
    """The paper's probe and the sound one, trained on rows `train`; the scores of both on rows `test`, of the fine ones also
    after they were carried onto the coarse ones; and the sums per test patient."""
    labels = data.codes[train]
    paper = paper_probe(
        data.features[train], labels, num_classes=len(data.classes), seeds=seeds, steps=config.probe_steps, lr=config.probe_lr,
        batch=config.probe_batch, device=device,
    )  # fmt: skip
    sound, strength, chosen = cohort_probe(data, train, val, config, device)
    truth = {side: data.codes[rows] for side, rows in test.items()}
    patients = {side: data.patients[rows] for side, rows in test.items()}
    tested = {side: data.features[rows] for side, rows in test.items()}
    probes = {"paper": paper, "sound": sound}
    coarse_guess = {name: probe.predict(tested["coarse"], device=device) for name, probe in probes.items()}
    variants: dict[str, Any] = {}
    background = -1 if data.background_code is None else data.background_code
    by_patient: Sums = {"background": np.array(background)}
    for suffix, fine_features in (("", tested["fine"]), *_aligned(data, config.transition, tested["fine"], device)):
        for name, probe in probes.items():
            guess = {"coarse": coarse_guess[name], "fine": probe.predict(fine_features, device=device)}
            scores = variants[name + suffix] = transfer_scores(
                guess, truth, patients, data, config, parent_of_fine=parent_of_fine, seed=seeds[0]
            )
            sums: Sums = scores.pop("by_patient")
            by_patient |= {"patients": sums["patients"], "children": sums["children"], f"{name} coarse": sums["coarse"]}
            by_patient |= {f"{name}{suffix} fine": sums["fine"], f"{name}{suffix} agree": sums["agree"]}
    variants["sound"] |= {"strength": strength, "chosen_by": chosen}
    return paper, sound, variants, by_patient


def transfer_scores(
    predicted: dict[str, NDArray[np.int64]],
    truth: dict[str, NDArray[np.int64]],
    patients: dict[str, NDArray],
    data: Embedded,
    config: EvaluationConfig,
    *,
    parent_of_fine: NDArray[np.int64],
    seed: int,
) -> dict[str, Any]:
    """Scores of predictions [r, n] at both magnifications, with and without Background, with patient intervals.

    Under `by_patient`, as arrays: `patients` [P], confusion matrices `coarse` and `fine` [P, r, C, C], and of the `children`
    [P] those that `agree` with their parent [P, r].

    Args:
        predicted: class codes [r, n] per side, "coarse" and "fine".
        truth: class codes [n] per side.
        patients: patient of each tile [n] per side.
        data: for the classes.
        config: for the bootstrap.
        parent_of_fine: row of the coarse test tiles that each fine test tile lies in [n]; -1 for standalone ones.
        seed: of the bootstrap.
    """
    names = np.unique(np.concatenate(list(patients.values())))
    num_classes = len(data.classes)
    by_patient: Sums = {"patients": names}
    for side, runs in predicted.items():
        code = np.searchsorted(names, patients[side])
        by_patient[side] = matrices_by_patient(code, len(names), truth[side], runs, num_classes)
    has_parent = parent_of_fine >= 0
    agrees = predicted["fine"][:, has_parent] == predicted["coarse"][:, parent_of_fine[has_parent]]  # [r, children]
    of = np.searchsorted(names, patients["fine"][has_parent])
    by_patient["children"] = np.bincount(of, minlength=len(names))
    by_patient["agree"] = np.stack([np.bincount(of[run], minlength=len(names)) for run in agrees], axis=1)
    share = agrees.mean(1) if has_parent.any() else np.full(len(agrees), np.nan)
    agreement = patient_intervals(
        lambda weights: {
            "agreement": ratio(weights @ by_patient["agree"], (weights @ by_patient["children"])[:, None]).mean(1)
        },
        len(names),
        resamples=config.bootstrap_resamples,
        min_patients=config.min_patients,
        seed=seed,
    )
    report: dict[str, Any] = {"agreement": spread(share) | {"bootstrap": agreement}, "by_patient": by_patient}
    left_out: list[tuple[str, int | None]] = [("with_background", None), ("without_background", data.background_code)]
    for variant, dropped in left_out:
        if variant == "without_background" and dropped is None:
            report[variant] = None
            continue
        matrices = {side: drop_truth(by_patient[side], dropped) for side in predicted}
        report[variant] = _variant(matrices, data.classes, config, seed, paired=bool(has_parent.any()))
    return report


def _variant(
    matrices: dict[str, NDArray], classes: list[str], config: EvaluationConfig, seed: int, *, paired: bool
) -> dict[str, Any]:
    """Scores of per-patient confusion matrices [P, r, C, C] per side; `paired` as `iou_statistics` has it."""
    report: dict[str, Any] = {}
    for side, part in matrices.items():
        pooled = part.sum(0)
        iou, dice = class_iou(pooled), class_dice(pooled)
        report[side] = {
            "mean_iou": spread(macro(iou)),
            "mean_dice": spread(macro(dice)),
            "accuracy": spread(accuracy(pooled)),
            "iou": {name: spread(iou[:, code]) for code, name in enumerate(classes)},
            "dice": {name: spread(dice[:, code]) for code, name in enumerate(classes)},
            "confusion": pooled.tolist(),
        }
    runs = {side: report[side]["mean_iou"] for side in matrices}
    of_means = consistency(
        *(np.nan if runs[side]["mean"] is None else runs[side]["mean"] for side in ("coarse", "fine"))
    )
    of_runs = consistency(*(np.array(runs[side]["values"], np.float64) for side in ("coarse", "fine")))
    if not paired:
        of_means, of_runs = np.full_like(of_means, np.nan), np.full_like(of_runs, np.nan)
    report["consistency"] = spread(of_runs) | {"mean": plain(float(of_means)), "mean_of_runs": spread(of_runs)["mean"]}

    def statistic(weights: Floats) -> dict[str, Floats]:
        found = iou_statistics(matrices["coarse"], matrices["fine"], weights, paired=paired)
        for side, part in matrices.items():
            by_class = class_statistics(part, weights, classes)
            found |= {f"{side} {name}": values for name, values in by_class.items()}
        return {name.replace(" ", "_", 1): values for name, values in found.items()}

    report["bootstrap"] = patient_intervals(
        statistic,
        len(matrices["coarse"]),
        resamples=config.bootstrap_resamples,
        min_patients=config.min_patients,
        seed=seed,
    )
    return report


def test_tiles(
    data: Embedded, transition: tuple[float, float]
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]:
    """Rows of the "coarse" and the "fine" test tiles, and for each fine one the place of its parent among the coarse ones.

    The place is -1 where a tile has no parent, as no tile has where no pair of the test is labelled: then they are all labelled
    test tiles of each magnification.
    """
    coarse, fine = transition
    pairs = data.pairs[data.pairs["kind"] == kind_of(coarse, fine)]
    inside = (data.tiles["split"].to_numpy()[pairs["parent"]] == "test") & (data.codes[pairs["parent"]] >= 0)
    pairs = pairs[inside]
    labelled = pairs[data.codes[pairs["child"]] >= 0]
    if not len(labelled):
        test = {"coarse": data.rows("test", coarse), "fine": data.rows("test", fine)}
        return test, np.full(len(test["fine"]), -1)
    parents = np.unique(pairs["parent"].to_numpy())
    children = labelled["child"].to_numpy()
    background = -1 if data.background_code is None else data.background_code
    glass = {}
    for magnification, tested in ((coarse, parents), (fine, children)):  # of which a standalone tile may be one
        rows = data.rows("test", magnification)
        alone = data.standalone[rows] & (data.codes[rows] == background)
        glass[magnification] = rows[alone & ~np.isin(rows, tested)]
    place = np.searchsorted(parents, labelled["parent"].to_numpy())
    test = {"coarse": np.concatenate([parents, glass[coarse]]), "fine": np.concatenate([children, glass[fine]])}
    return test, np.concatenate([place, np.full(len(glass[fine]), -1)])


def _aligned(
    data: Embedded, transition: tuple[float, float], features: NDArray, device: str | torch.device
) -> Iterator[tuple[str, NDArray]]:
    """Fine embeddings carried onto the coarse ones by the training tiles of both, labelled or not: (suffix, features)."""
    coarse, fine = (data.rows("train", magnification, labelled=False) for magnification in transition)
    if len(coarse) and len(fine):
        target, source = (moments(data.features[rows], device=device) for rows in (coarse, fine))
        yield "_matched", match_moments(source, target)(features)
        yield "_coral", coral(source, target)(features)
