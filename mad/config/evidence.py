"""Configuration of the evidence table, and the entries that `seeds:` multiplies.

`seeds: [0, 1, 2]` in an entry of `runs:` stands for the runs NAME-s0, NAME-s1, NAME-s2, which differ in `seed` alone. An
encoder `run:NAME` or `random:NAME` of such a run becomes one encoder per seed, and a seeded run that starts from another
seeded run (`init: run:OTHER`) starts from that one's twin of the same seed. Nothing behind the parser knows of `seeds`.
"""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any

from pydantic import Field, model_validator

from mad.config.base import Section
from mad.files import MadError


class EvidenceConfig(Section):
    """Methods side by side, each as several encoders, with intervals over patients and seeds."""

    baseline: str | None = None
    """The group that the others are compared with."""
    groups: dict[str, Annotated[list[str], Field(min_length=1)]] = {}
    """Method -> its entries of `encoders:`, one per seed. Not given: one group per entry of `encoders:` where any of their runs
    has `seeds`, otherwise none, and the table is not made."""

    @model_validator(mode="after")
    def _is_consistent(self) -> EvidenceConfig:
        if self.baseline is not None and self.baseline not in self.groups:
            raise ValueError(f"baseline {self.baseline!r} is none of the groups {sorted(self.groups)}")
        for group, encoders in self.groups.items():
            if len(set(encoders)) < len(encoders):
                raise ValueError(f"groups.{group} names an encoder twice: {encoders}")
        return self


def expand_seeds(value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Write out the entries that `seeds:` stands for, in a configuration that is not checked yet.

    Returns:
        The configuration without `seeds`, and for `runs` and `encoders` the place of each entry in the file's own list. What
        is no list of mappings is left to the checks that follow.

    Raises:
        MadError: seeds that are no list of different numbers, beside `seed`, or missing where an entry asks for them; a name
            that is there already.
    """
    runs, encoders = (_entries(value.get(key)) for key in ("runs", "encoders"))
    named = (run for run in runs or [] if isinstance(run.get("name"), str))
    seeds = {run["name"]: _seeds(run) for run in named if run.get("seeds") is not None}
    if runs is None or encoders is None or not seeds:
        return value, {}
    made = {"runs": [_run(run, seeds) for run in runs], "encoders": [_encoder(entry, seeds) for entry in encoders]}
    expanded, origin = dict(value), {}
    for what, parts in made.items():
        expanded[what] = list(chain.from_iterable(parts))
        origin[what] = [place for place, part in enumerate(parts) for _ in part]
        _check_names(what, parts)
    evidence = value.get("evidence") or {}
    if isinstance(evidence, dict) and not evidence.get("groups"):
        pairs = zip(encoders, made["encoders"], strict=True)
        groups = {str(entry.get("name")): [each.get("name") for each in part] for entry, part in pairs}
        expanded["evidence"] = {**evidence, "groups": groups}
    return expanded, origin


def _entries(value: Any) -> list[dict[str, Any]] | None:
    """A list of mappings ([] where there is none), or None: not ours to judge."""
    if value is None:
        return []
    return value if isinstance(value, list) and all(isinstance(entry, dict) for entry in value) else None


def _seeds(run: dict[str, Any]) -> list[int]:
    name, seeds = run.get("name"), run["seeds"]
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise MadError(f"runs: {name!r}: seeds are different whole numbers, as in [0, 1, 2]; got {seeds!r}")
    if run.get("seed") is not None:
        raise MadError(f"runs: {name!r} has `seed` and `seeds`; take one of them away")
    return seeds


def _run(run: dict[str, Any], seeds: dict[str, list[int]]) -> list[dict[str, Any]]:
    """One run per seed, or the run itself."""
    name, init = run.get("name"), str(run.get("init", ""))
    start = init.removeprefix("run:") if init.startswith("run:") else None
    if name not in seeds:
        if start in seeds:
            raise MadError(
                f"runs: {name!r} starts from {start!r}, of which there is one per seed: give it `seeds` too, or start it from one "
                f"of {[f'{start}-s{seed}' for seed in seeds[start]]}"
            )
        return [run]
    if start in seeds and (missing := sorted(set(seeds[name]) - set(seeds[start]))):
        raise MadError(f"runs: {name!r} starts from {start!r}, which lacks the seeds {missing}; it has {seeds[start]}")
    plain = {key: entry for key, entry in run.items() if key != "seeds"}
    return [
        {**plain, "name": f"{name}-s{seed}", "seed": seed} | ({"init": f"{init}-s{seed}"} if start in seeds else {})
        for seed in seeds[name]
    ]


def _encoder(entry: dict[str, Any], seeds: dict[str, list[int]]) -> list[dict[str, Any]]:
    """One encoder per seed of the run that it asks for, or the encoder itself."""
    kind, _, target = str(entry.get("spec", "")).partition(":")
    if kind not in ("run", "random") or target not in seeds or "name" not in entry:
        return [entry]
    return [{**entry, "name": f"{entry['name']}-s{seed}", "spec": f"{kind}:{target}-s{seed}"} for seed in seeds[target]]


def _check_names(what: str, parts: list[list[dict[str, Any]]]) -> None:
    owners: dict[str, int] = {}
    for place, part in enumerate(parts):
        for name in (str(entry.get("name")) for entry in part):
            if owners.setdefault(name, place) != place:
                raise MadError(f"{what}: two entries become {name!r} once `seeds` is written out; rename one of them")
