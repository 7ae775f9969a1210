"""Configuration of the region mixers of MMA: one entry of `mixers:` is one training on the embeddings of one encoder.

What the paper's summary leaves open and what is ours: docs/mma.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from mad.config.adapters import with_bases
from mad.config.base import SLUG, Section

if TYPE_CHECKING:
    from mad.config.model import Config


class MaskMix(Section):
    """How often a region is masked in which way; the shares are taken of their sum."""

    random: float = Field(0.4, ge=0)
    """Single tiles, at any magnification."""
    tube: float = Field(0.4, ge=0)
    """Places, each at every magnification: nothing that covers a hidden place is seen."""
    magnification: float = Field(0.2, ge=0)
    """All tiles of one or more magnifications (the summary's masking; alone, it is `{random: 0, tube: 0, magnification: 1}`)."""

    @model_validator(mode="after")
    def _some(self) -> MaskMix:
        if not self.random + self.tube + self.magnification > 0:
            raise ValueError("masks: all three shares are 0; give one of random, tube and magnification")
        return self

    def shares(self) -> dict[str, float]:
        """The shares by name, of sum 1."""
        given = {"random": self.random, "tube": self.tube, "magnification": self.magnification}
        return {name: share / sum(given.values()) for name, share in given.items()}


class MixerRuntime(Section):
    """What concerns the machine and never the weights' recipe."""

    threads: int | None = Field(None, ge=1)
    """CPU threads; not given: those that the job was granted. Bit-equal resumption needs the same number."""
    checkpoint_steps: int = Field(500, ge=1)
    """Steps between two checkpoints."""
    log_seconds: float = Field(10.0, ge=0)
    """Seconds between two lines of progress."""


class MixerConfig(Section):
    """One region mixer: a transformer over the embeddings of a region's tiles at several magnifications."""

    name: str = Field(pattern=SLUG)
    """Folder under `results/mix/`."""
    encoder: str
    """The entry of `encoders:` whose embeddings are mixed; it then embeds every tile with tissue, of every slide."""
    magnifications: list[float] = []
    """Magnifications of a region, out of the ladder; empty: all of it."""
    region_tiles: int = Field(1, ge=1)
    """Side of a region in tiles of its coarsest magnification. Under [5, 10, 20], 4 gives up to 16 + 64 + 256 tokens."""
    width: int = Field(512, ge=1)
    """Width of the tokens."""
    depth: int = Field(6, ge=1)
    """Layers of the encoder."""
    heads: int = Field(8, ge=1)
    """Attention heads; each has its own slope of distance."""
    attention: Literal["region", "place"] = "region"
    """`region`: a token sees every token of its region. `place` (the summary's words): only those that cover its own place at
    other magnifications."""
    pooling: Literal["token", "mean"] = "token"
    """What represents a region: `token`: the region token. `mean` (the summary's words): the mean of its contextual tokens."""
    masks: MaskMix = MaskMix()
    """Ways of masking."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the tiles (`random`) or places (`tube`) that are hidden."""
    contrastive: float = Field(0.0, ge=0)
    """Weight of the contrastive loss between two masked views of a region (CMEM); 0: one view, no such loss."""
    temperature: float = Field(0.1, gt=0)
    """`contrastive`: temperature of InfoNCE."""
    steps: int = Field(3000, ge=0)
    """Optimiser steps; 0: the mixer with random weights, the control that every comparison needs."""
    batch: int = Field(64, ge=2)
    """Regions per step."""
    lr: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of the cosine."""
    warmup: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay of matrices; vectors have none."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    health_every: int = Field(100, ge=1)
    """Steps between two checks on the regions of the validation patients."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Seed of weights, order and masks; not given: the configuration's `seed`."""
    runtime: MixerRuntime = MixerRuntime()
    """Threads, checkpoints, logging: may change between a run and its resumption."""

    @field_validator("magnifications")
    @classmethod
    def _in_order(cls, value: list[float]) -> list[float]:
        if len(set(value)) < len(value):
            raise ValueError(f"magnifications holds one twice: {value}")
        return sorted(value)

    @model_validator(mode="after")
    def _is_consistent(self) -> MixerConfig:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must divide by heads ({self.heads})")
        if self.steps and self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be shorter than steps ({self.steps})")
        return self


def check_mixers(config: Config) -> None:
    """Fail where a mixer asks for what the rest of the configuration lacks.

    Raises:
        ValueError: names the key.
    """
    encoders = sorted(encoder.name for encoder in config.encoders)
    for mixer in config.mixers:
        if mixer.encoder not in encoders:
            raise ValueError(f"mixers: {mixer.name!r} mixes the encoder {mixer.encoder!r}; encoders has {encoders}")
        if unknown := sorted(set(mixer.magnifications) - set(config.tile.magnifications)):
            raise ValueError(f"mixers: {mixer.name!r} names {unknown}; the ladder is {config.tile.magnifications}")
        if len(mixer.magnifications or config.tile.magnifications) < 2:
            raise ValueError(f"mixers: {mixer.name!r} needs two magnifications or more to mix")
    if config.mixers and config.cohort.split_by == "block":
        raise ValueError("mixers: regions are learned on patients of the train split; split_by: block has none")


def region_magnifications(config: Config, encoder: str) -> list[float]:
    """Magnifications at which an encoder embeds every tile with tissue, of every slide, because regions or slides are made of
    them; empty: it does not."""
    ladder = [float(value) for value in config.tile.magnifications]
    of_tokens = {"finest": ladder[-1:], "coarsest": ladder[:1], "all": ladder}
    wanted = [(mixer.encoder, mixer.magnifications or ladder) for mixer in config.mixers]
    wanted += [(entry.encoder, of_tokens[entry.tokens]) for entry in config.biomarkers.aggregators if entry.encoder]
    return sorted({value for name, values in wanted if encoder in with_bases(config, {name}) for value in values})
