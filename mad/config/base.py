"""The base of every configuration model: unknown keys are errors, values are frozen, docstrings describe the keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of `config.yaml`. The string under each field is its description in the generated schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
