"""Stage `biomarkers`: one target of the cohort sheet by one aggregator, in repeated patient-grouped cross-validation.

Reads the cohort sheet and the tokens (embed/{encoder}/dense/ or mix/{mixer}/); writes, under biomarkers/{target}/,
`{aggregator}.parquet` (out-of-fold predictions at every share of tiles), `attention/{aggregator}.parquet` (mean attention of each
token over the heads that tested its slide) and, last, `{aggregator}.json` with every number that a table prints. The folds are
those of the target's patients, the same for every aggregator; stage `biomarker-report` compares them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from mad.config import Config
from mad.config.biomarkers import TargetConfig
from mad.evaluation.bags import Bag
from mad.evaluation.biomarkers import summarise
from mad.evaluation.data import plain
from mad.evaluation.duplicates import find_copies
from mad.evaluation.folds import Split, class_strata, patient_folds, value_strata
from mad.evaluation.slide_heads import Head, Task, check_slides, fit_head
from mad.files import MadError, write_json, write_parquet
from mad.progress import log, track
from mad.stages.cohort import cohort_table
from mad.stages.end_to_end import EndToEnd
from mad.stages.evaluate import SHOWN, choose_device
from mad.stages.slide_tokens import SlideTokens

MISSING = {
    "", ".", "?", "na", "n.a.", "n/a", "#n/a", "nan", "null", "unknown", "missing", "not available", "not applicable",
    "not reported", "not evaluated", "not tested", "not done", "not performed", "not determined",
}  # fmt: skip
"""What a cell says that has no value, casefolded, out of brackets and with spaces ("[Not Available]", "<NA>", "not_tested").
Not "none" and "-", which are classes: no plaques, a negative stain."""
RULES = {
    "folds": "patients, grouped and stratified, dealt by a hash of (seed, patient); one training patient in k validates",
    "auroc": "pairs of slides that one head has tested, ties one half, all folds and repeats together; several classes: each "
    "against the rest, mean",
    "auroc_pooled": "all out-of-fold scores of a repeat in one ranking, mean over repeats",
    "interval": "95 %, percentile, over resamples of the patients; trainings and folds are not resampled",
    "choice": "steps of attention and penalty of the linear model: least loss on the validation patients, never on the test's",
    "tokens": "standardised by the fitted slides of each fold, every magnification and the region tokens on their own",
    "shares": "part of the finest tiles of each test slide kept, coarser ones all; a mixer mixes what is left anew; the heads are "
    "those trained on all tiles",
}


PREDICTIONS = ["slide_id", "patient_id", "share", "tokens", "tiles", "truth", "repeat", "fold"]
ATTENTION = ["slide_id", "name", "kind", "attention"]


def run(config: Config, target_name: str, aggregator_name: str) -> None:
    """Cross-validate one aggregator on one target.

    Where its encoder is absent, the JSON says `"status": "absent"` and why, and the tables are empty.

    Raises:
        MadError: no such entry, a target that the sheet does not hold or whose classes have too few patients, or no tokens.
    """
    settings = config.biomarkers
    target, entry = settings.target(target_name), settings.aggregator(aggregator_name)
    folder = Path(config.results) / "biomarkers" / target.name
    device = choose_device(config.evaluate.device)
    tokens = SlideTokens(config, entry, device)
    source = tokens.source()
    entries = {"target": target.model_dump(), "aggregator": entry.identity()}
    if source.get("status") == "absent":
        write_parquet(folder / f"{entry.name}.parquet", pd.DataFrame(columns=PREDICTIONS))
        write_parquet(folder / "attention" / f"{entry.name}.parquet", pd.DataFrame(columns=ATTENTION))
        write_json(folder / f"{entry.name}.json", {"status": "absent", "reason": source["reason"], **entries})
        return
    slides, task, without_value = read_target(cohort_table(config), target)
    patient_of = dict(zip(slides["slide_id"], slides["patient_id"], strict=True))
    splits = target_folds(config, target, slides)
    bags = {slide: tokens.read(slide) for slide in patient_of}
    empty = sorted(slide for slide, bag in bags.items() if not len(bag))
    bags = {slide: bag for slide, bag in bags.items() if len(bag)}
    what = f"biomarkers {target.name} {entry.name}"
    if without_value:
        told = ", ".join(f"{count} {word!r}" if word else f"{count} empty" for word, count in without_value.items())
        log(f"{what}: {sum(without_value.values())} slides have no value of {target.column} and are left out: {told}")
    if empty:
        log(f"{what}: {len(empty)} slides have no {entry.tokens} token and are left out: {', '.join(empty[:5])}")
    sides = [
        [
            [bags[s] for s, p in patient_of.items() if p in side and s in bags]
            for side in (split.fit, split.val, split.test)
        ]
        for split in splits
    ]
    for split, (fit, val, _) in zip(splits, sides, strict=True):
        check_slides(fit, val, task, f"{what}: repeat {split.repeat}, fold {split.fold}")
    copies = find_copies(bags.values(), patient_of, splits)
    for copy in copies[:SHOWN]:
        told = f"{copy['tokens']} equal tokens on {' and '.join(copy['slides'])}"
        log(f"{what}: WARNING: {told}, of two patients: one is trained on while the other is tested")
    if len(copies) > SHOWN:
        log(f"{what}: WARNING: and on {len(copies) - SHOWN} more pairs of slides")
    tuning = None
    if entry.finetune is not None:
        tuning = EndToEnd(config, target, entry, source, task, device)
    heads: list[tuple[Split, Head]] = []
    for split, (fit, val, test) in track(list(zip(splits, sides, strict=True)), what, unit="heads"):
        seed = int(np.random.SeedSequence([config.seed, split.repeat, split.fold]).generate_state(1)[0])
        kinds = len(tokens.kinds)
        if tuning is not None:
            head: Head = tuning.fit(split, fit, val, test, num_kinds=kinds, seed=seed)
        else:
            head = fit_head(entry.head, fit, val, task, settings, num_kinds=kinds, seed=seed, device=device)
        heads.append((split, head))
    predictions, attention = predict(tokens, bags, patient_of, task, heads, settings.tile_shares)
    rules = RULES if tuning is None else RULES | tuning.rules
    boot = {"resamples": config.evaluate.bootstrap_resamples, "min_patients": config.evaluate.min_patients}
    write_parquet(folder / f"{entry.name}.parquet", predictions)
    write_parquet(folder / "attention" / f"{entry.name}.parquet", attention)
    report = {
        "status": "ok", **entries, "rules": rules, "classes": task.classes, "seed": config.seed, "bootstrap": boot,
        "folds": settings.folds, "repeats": settings.repeats,
        "slides": len(bags), "patients": len({patient_of[slide] for slide in bags}), "without_tokens": empty,
        "without_value": without_value, "copies": copies,
        "class_slides": count_classes(task, list(bags)),
        "source": {key: source[key] for key in ("weights_sha256", "sha256", "encoder", "steps") if key in source},
        "heads": [{"repeat": s.repeat, "fold": s.fold, "fit": len(s.fit), "val": len(s.val), **h.facts} for s, h in heads],
        "by_share": summarise(predictions, task.classes, settings, seed=config.seed, **boot),
    }  # fmt: skip
    write_json(folder / f"{entry.name}.json", plain(report))
    if tuning is not None:
        tuning.keep(splits)


def read_target(cohort: pd.DataFrame, target: TargetConfig) -> tuple[pd.DataFrame, Task, dict[str, int]]:
    """The slides that have a value of the target, their truth, and how many have none, by what their cells say (`MISSING`).

    Raises:
        MadError: the sheet lacks the column, two classes differ in their spelling alone, or a regression's value is no number.
    """
    known = [name for name in cohort.columns if name not in ("path", "annotation", "split_by")]
    if target.column not in cohort:
        raise MadError(
            f"biomarkers.targets: {target.name!r} wants column {target.column!r}; the cohort sheet has {known}"
        )
    text = cohort[target.column].astype("string").fillna("").str.strip()
    missing = text.str.strip("[]<>").str.replace("_", " ").str.strip().str.casefold().isin(MISSING)
    without_value = {str(word): int(count) for word, count in text[missing].value_counts().sort_index().items()}
    slides = cohort[~missing].assign(value=text)
    if target.task == "classification":
        classes = sorted(slides["value"].unique(), key=_natural)
        _check_spelling(classes, target)
        codes = {name: float(code) for code, name in enumerate(classes)}
        truth = dict(zip(slides["slide_id"], slides["value"].map(codes), strict=True))
        return slides, Task(truth=truth, classes=classes), without_value
    numbers = pd.to_numeric(slides["value"], errors="coerce")
    if (bad := ~np.isfinite(numbers.to_numpy(np.float64))).any():
        first = slides[bad].iloc[0]
        raise MadError(
            f"biomarkers.targets: {target.name!r} is a regression, but {target.column} of slide {first['slide_id']} is "
            f"{first['value']!r}; write a number or leave the cell empty"
        )
    truth = dict(zip(slides["slide_id"], numbers.astype(float), strict=True))
    return slides, Task(truth=truth, classes=None), without_value


def _check_spelling(classes: list[str], target: TargetConfig) -> None:
    """Fail where values of a column are one word in two cases, or one number written in two ways."""
    spelled: dict[tuple[int, float, str], list[str]] = {}
    for name in classes:
        kind, number, _ = _natural(name)
        spelled.setdefault((kind, number, "" if kind == 0 else " ".join(name.casefold().split())), []).append(name)
    if twice := [names for names in spelled.values() if len(names) > 1]:
        raise MadError(
            f"biomarkers.targets: {target.name!r}: column {target.column} of the cohort sheet spells a class in several ways: "
            f"{'; '.join(', '.join(map(repr, names)) for names in twice)}; write each in one way, and run `mad cohort` again"
        )


def target_folds(config: Config, target: TargetConfig, slides: pd.DataFrame) -> list[Split]:
    """The splits of a target, by its column alone: the same for every aggregator."""
    settings = config.biomarkers
    patients, what = slides["patient_id"].astype(str).tolist(), f"target {target.name!r} (column {target.column!r})"
    if target.task == "classification":
        strata = class_strata(patients, slides["value"].tolist(), folds=settings.folds, what=what)
    else:
        strata = value_strata(patients, slides["value"].astype(float).tolist(), folds=settings.folds, what=what)
    return patient_folds(strata, folds=settings.folds, repeats=settings.repeats, seed=config.seed)


def predict(
    tokens: SlideTokens,
    bags: dict[str, Bag],
    patient_of: dict[str, str],
    task: Task,
    heads: list[tuple[Split, Head]],
    shares: list[float],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every slide by the heads that it was kept from, at every share of its tiles, and the attention of its tokens at all."""
    lines, maps = [], []
    for slide, whole in track(bags.items(), "predict", total=len(bags), unit="slides"):
        testers = [(split, head) for split, head in heads if patient_of[slide] in split.test]
        for share in shares:
            bag = whole if share == 1 else tokens.read(slide, share)
            if not len(bag):
                continue
            found = [head.predict(bag) for _, head in testers]
            line = {
                "slide_id": slide,
                "patient_id": patient_of[slide],
                "share": share,
                "tokens": len(bag),
                "tiles": bag.tiles,
                "truth": task.truth[slide],
            }
            for (split, _), (scores, _) in zip(testers, found, strict=True):
                named = {f"score_{code}": float(score) for code, score in enumerate(scores)}
                lines.append({**line, "repeat": split.repeat, "fold": split.fold, **named})
            if share == 1:
                mean = np.mean([weights for _, weights in found], axis=0).astype(np.float32)
                kind = [tokens.kinds[code] for code in bag.kind]
                maps.append(pd.DataFrame({"slide_id": slide, "name": bag.names, "kind": kind, "attention": mean}))
    return pd.DataFrame(lines), pd.concat(maps, ignore_index=True)


def count_classes(task: Task, slides: list[str]) -> dict[str, int] | None:
    """Slides per class; None for a regression."""
    if task.classes is None:
        return None
    codes = [task.truth[slide] for slide in slides]
    return {name: codes.count(code) for code, name in enumerate(task.classes)}


def _natural(value: str) -> tuple[int, float, str]:
    """Numbers in their order, then words: "2" before "10"."""
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value
