"""Proofs about a written synthetic cohort, before any training.

Colour must tell neither the class nor the place, architecture must be visible at 10x and cells at 40x, and either may tell of
the other only as far as the cohort couples them. Readings are made by linear models on hand-made features: half of the training
patients fit, the other half and the validation patients score. Test patients are scored for the record and decide nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mad.config.synthetic import SyntheticConfig
from mad.files import MadError, Pathlike
from mad.slides.synthetic.cohort import sheet_rows
from mad.slides.synthetic.layout import CLASSES, GLASS, LATENTS
from mad.slides.synthetic.tiles import Floats, SlideTiles, Tiles, read_tiles

MAX_COLOUR_F1 = 0.5
MAX_RETRIEVAL = 2.0
"""Times chance."""
MIN_OWN_READING = 0.15
"""Correlation with the latents that a scale shows itself, mean over the three, at either scale."""
MAX_NULL_LEAK, MIN_COUPLED_READING = 0.15, 0.25
"""Correlation with the latents of the other scale, mean over the three and over both directions."""
MIN_CEILING_F1 = 0.6
CANDIDATES = 64
NEIGHBOURS = 15
SCALES = ("10x", "40x")


def check_cohort(config: SyntheticConfig, out_dir: Pathlike) -> dict[str, Any]:
    """Check the slides that `write_slide` wrote into `out_dir`.

    Returns:
        JSON-able: the numbers of each check, `passed` per check and for all together (`passed`).

    Raises:
        MadError: fewer than three patients, or a slide that is not there.
    """
    rows = sheet_rows(config)
    train = [row["slide_id"] for row in rows if row["split"] == "train"]
    if len(rows) < 3 or len(train) < 2:
        raise MadError(f"a cohort of {len(rows)} patients cannot be checked: set synthetic.patients to 4 or more")
    slides = {row["slide_id"]: read_tiles(config, row["slide_id"], out_dir) for row in rows}
    groups = {
        "fit": [slides[name] for name in train[::2]],
        "held_out": [slides[name] for name in train[1::2]]
        + [slides[row["slide_id"]] for row in rows if row["split"] == "val"],
        "test": [slides[row["slide_id"]] for row in rows if row["split"] == "test"],
    }
    found: dict[str, Any] = {
        "decoupled": config.decoupled,
        "patients": {name: len(group) for name, group in groups.items()},
        "tiles_per_class": _tile_counts(slides),
        "colour_f1": _class_reading(groups, "colour"),
        "texture_f1": _class_reading(groups, "texture"),
        "texture_transfer_f1": _transfer_reading(groups),
        "colour_retrieval": _colour_retrieval(groups),
        "latent_reading": _latent_reading(groups),
    }
    reading = found["latent_reading"]["held_out"]
    own, cross = (
        [reading[f"{kind}_at_{scale}"]["mean"] for kind, scale in pairs]
        for pairs in ((("architecture", "10x"), ("cells", "40x")), (("cells", "10x"), ("architecture", "40x")))
    )
    passed = {
        "colour_f1": all(found["colour_f1"]["held_out"][scale] <= MAX_COLOUR_F1 for scale in SCALES),
        "colour_retrieval": found["colour_retrieval"]["held_out"]["child_cosine"] <= MAX_RETRIEVAL,
        "classes_separable": all(found["texture_f1"]["held_out"][scale] >= MIN_CEILING_F1 for scale in SCALES),
        "latents_visible": min(own) >= MIN_OWN_READING,
        "every_class_on_every_slide": all(min(counts.values()) > 0 for counts in found["tiles_per_class"].values()),
    }
    if not config.targets:  # with them each slide couples its scales by a score of its own
        passed["scales_coupled_as_configured"] = (
            abs(float(np.mean(cross))) <= MAX_NULL_LEAK
            if config.decoupled
            else float(np.mean(cross)) >= MIN_COUPLED_READING
        )
    return {**found, "passed_each": passed, "passed": all(passed.values())}


def _at(slide: SlideTiles, scale: str) -> Tiles:
    return slide.parents if scale == "10x" else slide.children


def _tile_counts(slides: dict[str, SlideTiles]) -> dict[str, dict[str, int]]:
    """10x tiles per class of every slide."""
    names = (*CLASSES, "Background")
    return {
        slide_id: dict(zip(names, np.bincount(tiles.parents.label, minlength=len(names)).tolist(), strict=True))
        for slide_id, tiles in slides.items()
    }


def _stack(group: list[SlideTiles], scale: str, feature: str) -> tuple[Floats, NDArray[np.int64]]:
    """Features and labels of the tiles that bear a tissue class."""
    parts = [_at(slide, scale) for slide in group]
    labels = np.concatenate([tiles.label for tiles in parts])
    values = np.concatenate([getattr(tiles, feature) for tiles in parts])
    return values[labels != GLASS], labels[labels != GLASS]


def _class_reading(groups: dict[str, list[SlideTiles]], feature: str) -> dict[str, dict[str, float]]:
    """Macro F1 over the four tissue classes: the better of logistic regression and k-NN on standardised features."""
    scores: dict[str, dict[str, float]] = {name: {} for name in groups if name != "fit" and groups[name]}
    for scale in SCALES:
        models = [
            make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=500)),
            make_pipeline(StandardScaler(), KNeighborsClassifier(NEIGHBOURS)),
        ]
        for model in models:
            model.fit(*_stack(groups["fit"], scale, feature))
        for name in scores:
            values, labels = _stack(groups[name], scale, feature)
            scores[name][scale] = round(
                max(float(f1_score(labels, model.predict(values), average="macro")) for model in models), 4
            )
    return scores


def _transfer_reading(groups: dict[str, list[SlideTiles]]) -> dict[str, dict[str, float]]:
    """Macro F1 at 40x of a probe on the texture at 10x, either magnification standardised on its own: for the record.

    Near the ceiling the scales would be one and the same thing, near .25 they would share no cue.
    """
    result = {}
    scaler = {scale: StandardScaler().fit(_stack(groups["fit"], scale, "texture")[0]) for scale in SCALES}
    coarse, labels = _stack(groups["fit"], "10x", "texture")
    model = LogisticRegression(class_weight="balanced", max_iter=500).fit(scaler["10x"].transform(coarse), labels)
    for name, group in groups.items():
        if name != "fit" and group:
            fine, labels = _stack(group, "40x", "texture")
            read = model.predict(scaler["40x"].transform(fine))
            result[name] = {"10x_to_40x": round(float(f1_score(labels, read, average="macro")), 4)}
    return result


def _colour_retrieval(groups: dict[str, list[SlideTiles]]) -> dict[str, dict[str, float]]:
    """Retrieval of children by the colour of their 10x parent among up to 64 places of the same slide, as multiples of chance.

    `child`: one child per place is the candidate (mean over the 16 positions). `mean`: the mean feature of all 16. `cosine`:
    of raw channel means and deviations. `standardised`: cosine after standardising either magnification on the fitting patients.
    Since a parent's pixels are the averages of its children's, its mean colour is theirs up to rounding: `mean_standardised`
    cannot be levelled by any cohort and is given for the record.
    """
    fit = groups["fit"]
    parents = np.concatenate([slide.parents.colour[slide.parents.label != GLASS] for slide in fit])
    children = np.concatenate([slide.child_colour[slide.parents.label != GLASS].reshape(-1, 6) for slide in fit])
    raw = ((np.zeros(6), np.ones(6)),) * 2
    level = tuple((values.mean(0), values.std(0)) for values in (parents, children))
    result = {}
    for name, group in groups.items():
        if name == "fit" or not group:
            continue
        hits: dict[str, list[float]] = {}
        for slide in group:
            rows = np.random.default_rng(0).permutation(np.flatnonzero(slide.parents.label != GLASS))[:CANDIDATES]
            for kind, scaling in (("cosine", raw), ("standardised", level)):
                query = (slide.parents.colour[rows] - scaling[0][0]) / scaling[0][1]
                gallery = (slide.child_colour[rows] - scaling[1][0]) / scaling[1][1]
                single = [_hit_rate(query, gallery[:, k]) for k in range(gallery.shape[1])]
                hits.setdefault(f"child_{kind}", []).append(float(np.mean(single)) * len(rows))
                hits.setdefault(f"mean_{kind}", []).append(_hit_rate(query, gallery.mean(1)) * len(rows))
        result[name] = {kind: round(float(np.mean(values)), 3) for kind, values in hits.items()}
    return result


def _hit_rate(query: Floats, gallery: Floats) -> float:
    """Share of rows whose nearest gallery row by cosine is their own."""
    query, gallery = (x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-12) for x in (query, gallery))
    return float(np.mean((query @ gallery.T).argmax(1) == np.arange(len(query))))


def _latent_reading(groups: dict[str, list[SlideTiles]]) -> dict[str, dict[str, dict[str, float]]]:
    """Correlation of a ridge's reading with each latent, from the texture at each magnification; tiles nine tenths tissue.

    The class is given to the ridge as well, as indicators and times the features: latents act within classes.
    """
    result: dict[str, dict[str, dict[str, float]]] = {name: {} for name in groups if name != "fit" and groups[name]}
    for scale in SCALES:
        features = {name: _latent_rows(group, scale) for name, group in groups.items() if group}
        for kind in ("architecture", "cells"):
            model = make_pipeline(StandardScaler(), Ridge(alpha=300.0)).fit(
                features["fit"][0], features["fit"][1][kind]
            )
            for name in result:
                values, latents = features[name]
                read = model.predict(values)
                each = [float(np.corrcoef(read[:, k], latents[kind][:, k])[0, 1]) for k in range(len(LATENTS))]
                numbers = {latent: round(r, 4) for latent, r in zip(LATENTS, each, strict=True)}
                result[name][f"{kind}_at_{scale}"] = {**numbers, "mean": round(float(np.mean(each)), 4)}
    return result


def _latent_rows(group: list[SlideTiles], scale: str) -> tuple[Floats, dict[str, Floats]]:
    parts = [_at(slide, scale) for slide in group]
    keep = np.concatenate([(tiles.tissue >= 0.9) & (tiles.label != GLASS) for tiles in parts])
    texture, label, architecture, cells = (
        np.concatenate([getattr(tiles, name) for tiles in parts])[keep]
        for name in ("texture", "label", "architecture", "cells")
    )
    centred = (texture - texture.mean(0)) / (texture.std(0) + 1e-9)
    onehot = np.eye(len(CLASSES))[label]
    crossed = (onehot[:, :, None] * centred[:, None]).reshape(len(centred), -1)
    return np.concatenate([onehot, centred, crossed], 1), {"architecture": architecture, "cells": cells}
