"""Configuration of the evaluation protocols."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from mad.config.base import Section

PROTOCOLS = ("classification", "clustering", "consistency", "transfer", "magnification", "sites", "segmentation")
"""Each writes `evaluate/{encoder}/{protocol}.json`."""
NONINFERIORITY = "noninferiority"
"""The same, where `evaluate.reference` names an encoder."""


class EvaluationConfig(Section):
    """Protocols of the MAD paper's Tables 3-5 and Figures 3-4."""

    runs: int = Field(5, ge=1)
    """Independent repetitions over which Tables 3 and 5 are averaged: seeds of the probe and of K-Means, bootstrap samples
    of the training patients for k-NN."""
    transition: tuple[float, float] = (10, 40)
    """Coarse and fine magnification of Tables 4 and 5 and of Figures 3 and 4, neighbours on the ladder; not given: the two
    finest of `tile.magnifications`."""
    probe_steps: int = Field(12_500, ge=1)
    """Optimiser steps of the paper's linear probe. The paper publishes no number of epochs; this is the length of DINOv2's
    own linear evaluation."""
    probe_lr: float = Field(1e-4, gt=0)
    """Adam learning rate of the paper's linear probe."""
    probe_batch: int = Field(64, ge=1)
    """Batch of the paper's linear probe."""
    sound_strengths: list[float] = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    """L2 penalties that the standardised full-batch probe chooses from on the validation patients, strongest first."""
    sound_strength: float = Field(1e-3, gt=0)
    """The L2 penalty where there are no validation patients."""
    knn_k: int = Field(20, ge=1)
    """Neighbours of the k-NN classifier."""
    kmeans_starts: int = Field(20, ge=1)
    """k-means++ starts of every K-Means run; the one of least inertia is kept."""
    bootstrap_resamples: int = Field(1000, ge=0)
    """Resamples of the test patients behind the 95 % intervals; 0 prints none."""
    min_patients: int = Field(5, ge=2)
    """No interval is printed with fewer test patients."""
    reference: str | None = None
    """The entry of `encoders:` whose embeddings at the fine magnification of `transition` every encoder's at the coarse one are
    tested against for non-inferiority: a student's teacher. Not given: no such test."""
    against: str | None = None
    """Beside `reference`: the entry of `encoders:` whose accuracy at the coarse magnification every other one's is set against too,
    a student that the others are ablations of. Not given: none."""
    margin: float = Field(0.01, gt=0, lt=1)
    """Non-inferiority: the loss of accuracy that is still accepted."""
    figure_parents: int = Field(150, ge=1)
    """Parents drawn in Figure 3, spread over the classes, each with all of its children."""
    segmentation_slides: list[str] = []
    """Slides of Figure 4. Empty: the first annotated test slides."""
    segmentation_num_slides: int = Field(1, ge=0)
    """How many slides Figure 4 takes where `segmentation_slides` names none."""
    segmentation_magnifications: list[float] = [10, 40]
    """Magnifications of Figure 4: every tile of its slides is embedded at these. Not given: the two finest of
    `tile.magnifications`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where similarities, probes, clusters and covariances are computed; `auto` takes a GPU where there is one."""
    threads: int = Field(2, ge=1)
    """CPUs of each job of the workflow that embeds or evaluates an encoder. With 1, many small encoders go side by side."""

    @field_validator("sound_strengths")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        if not value or any(strength <= 0 for strength in value):
            raise ValueError(f"sound_strengths needs one or more positive numbers; got {value}")
        return sorted(set(value), reverse=True)

    @field_validator("transition")
    @classmethod
    def _coarse_to_fine(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] < value[1]:
            raise ValueError(
                f"transition goes from a coarse to a fine magnification, as in [10, 40]; got {list(value)}"
            )
        return value

    @property
    def protocols(self) -> tuple[str, ...]:
        """Those that are made."""
        return (*PROTOCOLS, NONINFERIORITY) if self.reference else PROTOCOLS
