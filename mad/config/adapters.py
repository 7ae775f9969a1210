"""Configuration of the cross-scale adapters: one entry of `adapters:` is one light head on the frozen embeddings of one encoder.

An entry of `encoders:` with `spec: adapter:NAME` then stands for that encoder behind its head (docs/adapter.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from mad.config.base import SLUG, Section
from mad.files import MadError

if TYPE_CHECKING:
    from mad.config.model import Config

SPEC = "adapter:"


class AdapterConfig(Section):
    """One cross-scale adapter."""

    name: str = Field(pattern=SLUG)
    """Folder under `results/adapt/`."""
    encoder: str
    """The entry of `encoders:` whose embeddings it adapts."""
    loss: Literal["contrast", "mad"] = "contrast"
    """`contrast`: InfoNCE between a parent and its children, in both directions; the better one in our trials. `mad`:
    cross-entropy over prototypes against a moving-average teacher, balanced by Sinkhorn-Knopp."""
    scales: Literal["own", "shared"] = "own"
    """`own`: each magnification has its own standardisation and its own head, so that a tile's magnification must be known.
    `shared`: one for all."""
    hidden: int = Field(0, ge=0)
    """Width of the residual MLP of a head; 0: a linear residual."""
    unit: bool = True
    """Adapted embeddings of one length, sqrt(dimension): training looks at cosines alone. `false`: lengths as they come."""
    pairs: Literal["aligned", "shuffled"] = "aligned"
    """`shuffled`, a control: the children of another parent of the same slide."""
    both_ways: bool = True
    """`mad`: parents also learn from the teacher's view of their children. `false`: children alone learn, as in the paper; the
    head of the coarsest magnification then stays as it is."""
    children: int = Field(4, ge=1)
    """Children per parent and step, drawn anew each time."""
    batch: int = Field(64, ge=2)
    """Parents per step of each transition of the ladder; fewer where there are not so many."""
    steps: int = Field(500, ge=0)
    """Optimiser steps; 0 is a control: the encoder standardised by the training tiles (of each magnification under `own`)."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate."""
    warmup: int = Field(50, ge=0)
    """Steps of linear warm-up; a cosine to zero follows."""
    weight_decay: float = Field(0.04, ge=0)
    """Weight decay of matrices: towards the identity, as the heads are residual."""
    clip: float = Field(3.0, gt=0)
    """Largest norm of the gradient."""
    keep: float = Field(10.0, ge=0)
    """Weight of the term that keeps the cosines between tiles of one magnification as they were."""
    koleo: float = Field(0.1, ge=0)
    """Weight of KoLeo on the adapted embeddings of parents and of children, per child position."""
    prototypes: int = Field(512, ge=2)
    """`mad`: number of prototypes K, which lie in the space of the adapted embeddings."""
    student_temp: float = Field(0.1, gt=0)
    """`mad`: temperature of the student's softmax."""
    teacher_temp: float = Field(0.01, gt=0)
    """`mad`: temperature of the teacher's targets."""
    ema: float = Field(0.99, ge=0, le=1)
    """`mad`: momentum of the teacher at the start; it rises to 1 along a cosine."""
    contrast_temp: float = Field(0.1, gt=0)
    """`contrast`: temperature of InfoNCE."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Seed of weights and order; not given: the configuration's `seed`."""

    @model_validator(mode="after")
    def _is_consistent(self) -> AdapterConfig:
        if self.steps and self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be shorter than steps ({self.steps})")
        return self


def find_adapter(config: Config, name: str) -> AdapterConfig:
    """The entry of `adapters:` with this name.

    Raises:
        MadError: there is none.
    """
    for entry in config.adapters:
        if entry.name == name:
            return entry
    raise MadError(f"adapters: no entry named {name!r}; there are {sorted(entry.name for entry in config.adapters)}")


def adapter_of(config: Config, encoder: str) -> AdapterConfig | None:
    """The adapter that the encoder of this name stands for; None where it is an encoder of images.

    Raises:
        MadError: `encoders` has no such entry.
    """
    spec = config.encoder(encoder).spec
    return find_adapter(config, spec.removeprefix(SPEC)) if spec.startswith(SPEC) else None


def with_bases(config: Config, encoders: set[str]) -> set[str]:
    """These encoders, and those whose embeddings they adapt."""
    adapters = (adapter_of(config, name) for name in encoders)
    return encoders | {adapter.encoder for adapter in adapters if adapter is not None}


def check_adapters(config: Config) -> None:
    """Fail where an adapter has no encoder of images under it, or an encoder asks for an adapter that is not there.

    Raises:
        ValueError: names the entry.
    """
    names = [adapter.name for adapter in config.adapters]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"adapters: the name {twice[0]!r} is used twice")
    specs = {encoder.name: encoder.spec for encoder in config.encoders}
    for name, spec in specs.items():
        if spec.startswith(SPEC) and spec.removeprefix(SPEC) not in names:
            raise ValueError(f"encoders: {name!r} asks for {spec!r}; adapters has {sorted(names)}")
    images = sorted(name for name, spec in specs.items() if not spec.startswith(SPEC))
    for adapter in config.adapters:
        if adapter.encoder not in images:
            raise ValueError(f"adapters: {adapter.name!r} adapts {adapter.encoder!r}; encoders of images are {images}")
    if config.adapters and len(config.tile.magnifications) < 2:
        raise ValueError("adapters: tile.magnifications has one magnification, so there is nothing to adapt to")
