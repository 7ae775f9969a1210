"""Configuration of the slide-level evaluation: targets of the cohort sheet, heads over a slide's tiles, cross-validation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from pydantic import Field, field_validator, model_validator

from mad.config.base import SLUG, Section
from mad.files import MadError

if TYPE_CHECKING:
    from mad.config.model import Config


TUNABLE = ("run", "random", "local-dir", "timm")
"""Forms of an encoder's `spec` that `finetune` trains: no published weights (gated, and bound by their licences), no adapter, no
plug-in, which have no gradient here."""


class TargetConfig(Section):
    """What is predicted of a slide."""

    name: str = Field(pattern=SLUG)
    """Folder under `results/biomarkers/` and part of every table."""
    column: str
    """Column of the cohort sheet. Slides without a value are left out: cells that are empty or say so (`NA`, `N.A.`, `n/a`, `#N/A`,
    `NaN`, `null`, `unknown`, `missing`, `not available`, `not applicable`, `not reported`, `not evaluated`, `not tested`,
    `not done`, `not performed`, `not determined`, `.`, `?`, in any case, in brackets or not, words apart by spaces or _). `none`
    and `-` are classes."""
    task: Literal["classification", "regression"] = "classification"
    """`classification`: every different value is a class; values that differ in case alone, or are one number
    in two spellings (`1`, `1.0`), are refused. `regression`: numbers."""


class FinetuneConfig(Section):
    """Training an aggregator's encoder or mixer together with its attention head, on the slides' labels (end to end).

    The head keeps its own `lr`, `weight_decay` and the rest of this section; matrices of the network decay as the head's do.
    """

    lr: float = Field(1e-5, ge=0)
    """Peak learning rate of the network's top layer: a linear warm-up, then a cosine to 0. 0: the network stays as it is. The
    default is an encoder's; a mixer, which is small, takes one nearer to that of its own training."""
    layer_decay: float = Field(0.75, gt=0, le=1)
    """Factor on the learning rate from each layer of the network to the one below it."""
    frozen_layers: int = Field(0, ge=0)
    """So many of the lowest layers stay as they are; patches, tokens and positions are the first, of a mixer what is before its
    blocks."""
    warmup: int = Field(10, ge=0)
    """Steps of the warm-up."""
    steps: int | None = Field(None, ge=1)
    """Most optimiser steps; not given: `biomarkers.steps`. The cosine ends there."""
    batch: int | None = Field(None, ge=1)
    """Slides per step; not given: `biomarkers.batch`."""
    max_tiles: int | None = Field(None, ge=1)
    """Tokens drawn of each slide at a step; not given: `biomarkers.max_tiles`. With a mixer they lie in as few regions as hold
    them, drawn at random and mixed whole."""
    turns: bool = True
    """Whether each tile of a step is flipped and turned at random; without effect on a mixer, which sees no pixels."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the network's gradient."""
    ema: float | None = Field(None, ge=0, lt=1)
    """Momentum of a moving average of network and head, which then validates and is tested; null: none."""
    checkpointing: bool = True
    """Whether activations are computed again in the backward pass, `pass_tiles` tiles at a time: memory for those of one pass,
    whatever a step's tiles, for about a third more time."""
    pass_tiles: int = Field(64, ge=1)
    """Tiles per forward pass; of a mixer whole regions, with their padding, and one at least."""
    cache_gb: float = Field(2.0, ge=0)
    """Memory for decoded tiles; tiles of the slides that do not fit are read from the slide at every step. Without effect on a
    mixer."""


class AggregatorConfig(Section):
    """From a slide's tiles to its prediction: which embeddings, which of them, which head."""

    name: str = Field(pattern=SLUG)
    """File under `results/biomarkers/{target}/` and row of every table."""
    encoder: str | None = None
    """An entry of `encoders:`: its plain embeddings of every tile with tissue."""
    mixer: str | None = None
    """An entry of `mixers:` instead: tokens that have seen the other tiles of their region."""
    tokens: Literal["finest", "coarsest", "all", "region"] = "all"
    """`finest`, `coarsest`: tiles of that magnification alone. `all`: the union of all magnifications. `region`: the mixer's
    region tokens."""
    head: Literal["attention", "mean"] = "attention"
    """`attention`: gated attention pooling (Ilse et al. 2018). `mean`: the mean of the tokens, then logistic or ridge
    regression."""
    against: str | None = None
    """The aggregator that is this one's own control, as an untrained mixer is of a trained one: the tables then have the paired
    difference to it, beside that to the baseline. It decides nothing of the training."""
    finetune: FinetuneConfig | None = None
    """Given, even as `{}`: the encoder or mixer learns with the head, fold by fold; an encoder from tiles read from the slides, a
    mixer from the tiles' embeddings. What it told before only standardises the tokens then. For encoders of `run:`, `random:`,
    `local-dir:` and `timm:`, and for every mixer."""

    @model_validator(mode="after")
    def _has_one_source(self) -> AggregatorConfig:
        if (self.encoder is None) == (self.mixer is None):
            raise ValueError(f"{self.name!r} needs either `encoder` or `mixer`")
        if self.tokens == "region" and self.mixer is None:
            raise ValueError(f"{self.name!r}: only a mixer has region tokens; take finest, coarsest or all")
        if self.finetune is not None and self.head != "attention":
            raise ValueError(
                f"{self.name!r}: finetune trains an encoder or a mixer with `head: attention`; the linear model of `head: mean` "
                "hands it no gradient"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What decides its heads and predictions, as JSON values: all but what it is compared with."""
        return self.model_dump(mode="json", exclude={"against"})


class BiomarkersConfig(Section):
    """Slide-level evaluation by repeated, patient-grouped, stratified cross-validation."""

    targets: list[TargetConfig] = []
    """What to predict; empty: nothing of this section is made."""
    aggregators: list[AggregatorConfig] = []
    """How, one entry per row."""
    baseline: str | None = None
    """The aggregator that the others are compared with; not given: the first one with a frozen encoder, finest tokens and
    attention."""
    folds: int = Field(5, ge=5)
    """Parts of the patients; each is tested once per repeat."""
    repeats: int = Field(2, ge=1)
    """Divisions of the patients, each into other folds."""
    steps: int = Field(200, ge=1)
    """Most optimiser steps of an attention head."""
    batch: int = Field(16, ge=1)
    """Slides per step."""
    lr: float = Field(1e-3, gt=0)
    """AdamW learning rate."""
    weight_decay: float = Field(1e-2, ge=0)
    """AdamW weight decay."""
    dropout: float = Field(0.25, ge=0, lt=1)
    """Share of each tile's hidden features dropped in training."""
    hidden: int = Field(64, ge=1)
    """Width of the attention head."""
    max_tiles: int | None = Field(128, ge=1)
    """Tiles drawn of each slide at a training step; null takes all. Tests always see all."""
    check_every: int = Field(10, ge=1)
    """Steps between two looks at the inner validation patients."""
    patience: int = Field(6, ge=1)
    """Training ends when so many looks in a row brought no lower loss; the head of the lowest one is tested."""
    strengths: list[Annotated[float, Field(gt=0)]] = [1.0, 1e-1, 1e-2, 1e-3]
    """`head: mean`: L2 penalties that the inner validation patients choose from."""
    tile_shares: list[Annotated[float, Field(gt=0, le=1)]] = [1.0, 0.7, 0.5, 0.3, 0.1]
    """Shares of a test slide's finest tiles that are kept, for the curve of tile count against accuracy; 1 is always there."""
    map_slides: int = Field(1, ge=0)
    """Slides per aggregator whose attention is drawn, all of `map_target`."""
    map_target: str | None = None
    """The target whose attention is drawn; not given: the first one."""

    @field_validator("tile_shares")
    @classmethod
    def _with_all(cls, value: list[float]) -> list[float]:
        return sorted({1.0, *value}, reverse=True)

    @model_validator(mode="after")
    def _is_consistent(self) -> BiomarkersConfig:
        targets, aggregators = [t.name for t in self.targets], [a.name for a in self.aggregators]
        for what, names in (("targets", targets), ("aggregators", aggregators)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{what}: the name {twice[0]!r} is used twice")
        if bool(targets) != bool(aggregators):
            raise ValueError("targets and aggregators belong together: give both or neither")
        if self.baseline is not None and self.baseline not in aggregators:
            raise ValueError(f"baseline {self.baseline!r} is none of the aggregators {aggregators}")
        for entry in self.aggregators:
            if entry.against is not None and entry.against not in set(aggregators) - {entry.name}:
                raise ValueError(
                    f"{entry.name!r} is set against {entry.against!r}, which is none of the other aggregators "
                    f"{[name for name in aggregators if name != entry.name]}"
                )
        if self.map_target is not None and self.map_target not in targets:
            raise ValueError(f"map_target {self.map_target!r} is none of the targets {targets}")
        return self

    def target(self, name: str) -> TargetConfig:
        """The entry of `targets` with this name.

        Raises:
            MadError: there is none.
        """
        return next((t for t in self.targets if t.name == name), None) or _unknown("targets", name, self.targets)

    def aggregator(self, name: str) -> AggregatorConfig:
        """The entry of `aggregators` with this name.

        Raises:
            MadError: there is none.
        """
        found = next((a for a in self.aggregators if a.name == name), None)
        return found or _unknown("aggregators", name, self.aggregators)

    @property
    def compared_with(self) -> str | None:
        """The baseline's name, given or found; None where no aggregator can be one."""
        plain = (a for a in self.aggregators if a.encoder and a.tokens == "finest" and a.head == "attention")
        return self.baseline or next((a.name for a in plain if a.finetune is None), None)


def _unknown(what: str, name: str, entries: list[TargetConfig] | list[AggregatorConfig]) -> NoReturn:
    raise MadError(f"biomarkers.{what}: no entry named {name!r}; there are {sorted(entry.name for entry in entries)}")


def check_biomarkers(config: Config) -> None:
    """Fail where an aggregator asks for an encoder or a mixer that is not there, or for the training of one that cannot learn.

    Raises:
        ValueError: names the key.
    """
    known = {"encoder": {e.name for e in config.encoders}, "mixer": {m.name for m in config.mixers}}
    for entry in config.biomarkers.aggregators:
        for what, names in known.items():
            wanted = getattr(entry, what)
            if wanted is not None and wanted not in names:
                raise ValueError(
                    f"biomarkers.aggregators: {entry.name!r} asks for {what} {wanted!r}; {what}s has {sorted(names)}"
                )
        if entry.finetune is not None and entry.encoder is not None:
            spec = next(encoder.spec for encoder in config.encoders if encoder.name == entry.encoder)
            if spec.partition(":")[0] not in TUNABLE:
                raise ValueError(
                    f"biomarkers.aggregators: {entry.name!r}: finetune cannot train {entry.encoder!r} ({spec}); it trains timm "
                    f"models of {', '.join(f'{kind}:' for kind in TUNABLE)}, for one a student distilled from it (docs/xmag.md)"
                )
