"""Reading and checking the configuration."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mad.config.base import merge, section_in
from mad.config.evidence import expand_seeds
from mad.config.model import Config
from mad.files import MadError, Pathlike
from mad.progress import log

__all__ = ["Config", "json_schema", "load_config", "parse_config", "read_config"]


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
    value = read_config(path)
    if path.suffix == ".json" or path.resolve() == base.resolve():
        return parse_config(value, source=str(path))
    if not base.exists():
        if path.name != base.name:
            log(
                f"{path}: no {base} in {Path.cwd()} to merge it over: what it does not name has its default (docs/config.md)"
            )
        return parse_config(value, source=str(path))
    return parse_config(merge(read_config(base), value), source=f"{path} over {base}")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that one mapping holds twice, of which YAML would keep the last and say nothing."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise MadError(
                    f"{self.name}: line {line}: the key `{key.value}` stands in line {lines[name]} already, which would be lost; "
                    "write the two as one"
                )
            lines[name] = line
        return node


def read_config(path: Path) -> dict[str, Any]:
    """What a configuration file holds, unchecked but for its form.

    Raises:
        MadError: the file is missing, no YAML or no mapping, or one of its mappings holds a key twice.
    """
    if not path.exists():
        raise MadError(f"{path}: no such configuration file")
    try:
        with path.open(encoding="utf-8") as file:
            value = yaml.load(file, _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MadError(f"{path}: is no YAML ({error})") from None
    if not isinstance(value, dict):
        raise MadError(f"{path}: a configuration is a mapping of keys to values, this is {type(value).__name__}")
    return value


def parse_config(value: dict[str, Any], source: str = "config") -> Config:
    """Check a configuration that is already a dictionary (as Snakemake merges it); `seeds` of runs are written out first."""
    value, origin = expand_seeds(value)
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        found = [f"  {_place(fault['loc'], origin)}{_explain(fault)}" for fault in error.errors()]
        lines = list(dict.fromkeys(found))  # a fault of an entry with `seeds` is found once per seed
        raise MadError(f"{source}: {len(lines)} wrong key(s) or value(s)\n" + "\n".join(lines)) from None


def _place(loc: tuple[int | str, ...], origin: dict[str, list[int]]) -> str:
    """A key as the file writes it, `runs.0.steps: `, entries counted as they stand there; a fault of the whole has none."""
    if len(loc) > 1 and isinstance(loc[1], int) and loc[0] in origin:
        loc = (loc[0], origin[str(loc[0])][loc[1]], *loc[2:])
    return f"{'.'.join(map(str, loc))}: " if loc else ""


def _explain(fault: Any) -> str:
    if fault["type"] != "extra_forbidden":
        given = "" if isinstance(fault["input"], dict) else f" (got {fault['input']!r})"
        return f"{fault['msg'].removeprefix('Value error, ')}{given}"[:400]
    section: Any = Config
    for part in fault["loc"][:-1]:
        if isinstance(part, str):
            section = section_in(section.model_fields[part].annotation)
    near = difflib.get_close_matches(str(fault["loc"][-1]), section.model_fields, n=1)
    return f"no such key{f', did you mean {near[0]!r}?' if near else f'; there are {sorted(section.model_fields)}'}"
