"""The base of every configuration model (unknown keys are errors, values are frozen, docstrings describe the keys), and merging."""

from typing import Any

from pydantic import BaseModel, ConfigDict

SLUG = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$"


class Section(BaseModel):
    """One section of `config.yaml`. The string under each field is its description in the generated schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def section_in(annotation: Any) -> Any:
    """The `Section` inside `list[Section]`, `Section | None` or `Section`; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(
        (found for part in getattr(annotation, "__args__", ()) if (found := section_in(part)) is not None), None
    )


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` merged into `base` as Snakemake merges a --configfile: dictionaries deeply, anything else replaced."""
    both = {key: merge(base[key], over[key]) for key in over if all(isinstance(v.get(key), dict) for v in (base, over))}
    return {**base, **over, **both}
