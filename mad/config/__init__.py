"""Reading and checking the configuration."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mad.config.base import Section
from mad.config.model import Config
from mad.files import MadError, Pathlike

__all__ = ["Config", "json_schema", "load_config", "parse_config"]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration, generated from the models."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def load_config(path: Pathlike) -> Config:
    """Read a YAML or JSON configuration file.

    A YAML file other than `config.yaml` is an override, as for Snakemake: it is merged over the `config.yaml` of the working
    directory, where there is one. JSON is what the workflow has merged already.

    Raises:
        MadError: the file is missing, is no mapping, or holds a wrong key or value; every fault is named with its key.
    """
    path, base = Path(path), Path("config.yaml")
    value = _read(path)
    if path.suffix == ".json" or not base.exists() or path.resolve() == base.resolve():
        return parse_config(value, source=str(path))
    return parse_config(merge(_read(base), value), source=f"{path} over {base}")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise MadError(f"{path}: no such configuration file")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MadError(f"{path}: is no YAML ({error})") from None
    if not isinstance(value, dict):
        raise MadError(f"{path}: a configuration is a mapping of keys to values, this is {type(value).__name__}")
    return value


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` merged into `base` as Snakemake merges a --configfile: dictionaries deeply, anything else replaced."""
    both = {key: merge(base[key], over[key]) for key in over if all(isinstance(v.get(key), dict) for v in (base, over))}
    return {**base, **over, **both}


def parse_config(value: dict[str, Any], source: str = "config") -> Config:
    """Check a configuration that is already a dictionary (as Snakemake merges it)."""
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, fault['loc']))}: {_explain(fault)}" for fault in error.errors()]
        raise MadError(f"{source}: {len(lines)} wrong key(s) or value(s)\n" + "\n".join(lines)) from None


def _explain(fault: Any) -> str:
    if fault["type"] != "extra_forbidden":
        given = "" if isinstance(fault["input"], dict) else f" (got {fault['input']!r})"
        return f"{fault['msg'].removeprefix('Value error, ')}{given}"[:400]
    section: Any = Config
    for part in fault["loc"][:-1]:
        if isinstance(part, str):
            section = _inner(section.model_fields[part].annotation)
    near = difflib.get_close_matches(str(fault["loc"][-1]), section.model_fields, n=1)
    return f"no such key{f', did you mean {near[0]!r}?' if near else f'; there are {sorted(section.model_fields)}'}"


def _inner(annotation: Any) -> Any:
    """The `Section` inside `list[Section]`, `Section | None` or `Section`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((inner for part in getattr(annotation, "__args__", ()) if (inner := _inner(part)) is not None), None)
