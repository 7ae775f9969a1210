"""What of a run's records is watched, method by method: the loss against its unit, warnings, and the panels of its curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mad.config.training import RunConfig
from mad.training.distill_health import find_distill_warnings
from mad.training.health import FARTHEST_APART, LOWEST_RANK, find_warnings

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Panel:
    """Figures of the health checks that are drawn together; `levels` are dashed lines."""

    title: str
    figures: tuple[str, ...]
    levels: tuple[float, ...] = ()
    from_zero: bool = False


@dataclass(frozen=True)
class Watch:
    """How the records of a method are read.

    `loss` names the loss among a record's figures whose course tells; divided by `unit` it is recorded as `share`, `words` says of
    what. `warn` finds warnings from its mean over recent steps and the health figures, `marks` names the figure on whose curve a
    warning is marked. `facts` go into summary.json. `panels`: four, beside those of the loss and of the gradient.
    """

    loss: str
    unit: float
    share: str
    words: str
    title: str
    warn: Callable[[float, Figures], dict[str, str]]
    marks: Mapping[str, str]
    panels: tuple[Panel, Panel, Panel, Panel]
    facts: Mapping[str, float]


def watch_of(run: RunConfig) -> Watch:
    """What is watched of this run."""
    if run.distill is not None:
        return _distillation(run.distill.global_weight + run.distill.local_weight)
    return _dino(run.head.prototypes)


def _dino(prototypes: int) -> Watch:
    ln_k = math.log(prototypes)
    return Watch(
        loss="dino",
        unit=ln_k,
        share="dino_of_ln_k",
        words="of ln K",
        title="cross-entropy / ln K (1: nothing learned)",
        warn=lambda loss, health: find_warnings(loss, prototypes, health),
        marks={"uniform collapse": "dino_of_ln_k", "rank collapse": "rankme", "scale separation": "scale_separation"},
        panels=(
            Panel(
                f"entropy / ln K (K = {prototypes}), spread of the embeddings",
                ("teacher_entropy", "target_entropy", "student_entropy", "mean_cosine", "feature_std"),
            ),
            Panel(
                "rank of the embeddings, prototypes in use",
                ("rankme", "rankme_coarse", "rankme_fine", "prototype_perplexity"),
                (LOWEST_RANK,),
                from_zero=True,
            ),
            Panel("held-out parents and children", ("retrieval_at_1", "knn_coarse_to_fine", "pair_cosine_gap")),
            Panel("distance of the magnifications / spread within one", ("scale_separation",), (FARTHEST_APART, 0)),
        ),
        facts={"ln_k": ln_k},
    )


def _distillation(weights: float) -> Watch:
    return Watch(
        loss="loss",
        unit=-weights,
        share="cosine",
        words="mean cosine",
        title="cosine to the teacher, by the terms' weights (1: equal)",
        warn=lambda _, health: find_distill_warnings(health),
        marks={
            "global term learns nothing": "global_cosine",
            "local term learns nothing": "local_cosine",
            "rank collapse": "rankme",
        },
        panels=(
            Panel("held-out fields: cosine to the teacher", ("global_cosine", "global_constant")),
            Panel("rank of the embeddings", ("rankme", "rankme_teacher"), (LOWEST_RANK,), from_zero=True),
            Panel("held-out children: cosine to the teacher", ("local_cosine", "local_constant", "local_field")),
            Panel("spread of the embeddings", ("mean_cosine", "feature_std")),
        ),
        facts={},
    )
