"""Configuration of the synthetic cohort."""

from __future__ import annotations

from pydantic import Field, model_validator

from mad.config.base import Section


class SyntheticConfig(Section):
    """The embedded synthetic neuropathology cohort."""

    patients: int = Field(12, ge=1)
    """Number of patients, one slide each."""
    val_patients: int | None = Field(None, ge=0)
    """Patients that validate; not given: one in twelve."""
    test_patients: int | None = Field(None, ge=0)
    """Patients that are only tested on; not given: one in four."""
    width: int = Field(5376, ge=1792, multiple_of=16)
    """Slide width in level-0 pixels of 0.25 um; a multiple of 16, so that the 10x and 2.5x levels are whole."""
    height: int = Field(3584, ge=1792, multiple_of=16)
    """Slide height in level-0 pixels, a multiple of 16."""
    seed: int = Field(7, ge=0)
    """Seed of the whole cohort."""
    decoupled: bool = False
    """The null cohort: architecture and cells vary independently, so that no method may gain from alignment."""
    targets: bool = False
    """Whether slides also differ in what the columns `ordered_fibrils` (seen at 40x alone), `patchy_texture` (at 10x and
    2.5x alone), `scales_agree` (in neither alone) and `fibril_score` (a number) tell. The classes of each overlap."""
    quality: int = Field(90, ge=1, le=100)
    """JPEG quality of the slides' tiles (4:4:4)."""

    @model_validator(mode="after")
    def _some_train(self) -> SyntheticConfig:
        if (self.val_patients or 0) + (self.test_patients or 0) >= self.patients:
            raise ValueError(
                f"val_patients and test_patients leave none of the {self.patients} patients to train on; got "
                f"{self.val_patients} and {self.test_patients}"
            )
        return self
