"""Stage `evidence`: the groups of `evidence:` side by side, over seeds and test patients.

Reads evaluate/{encoder}/{consistency.json,patients.npz} of every encoder of every group; writes report/evidence.json,
report/tables/evidence*.{csv,md,tex} and report/figures/evidence.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mad.config import Config
from mad.files import MadError, read_json, write_json
from mad.progress import log

if TYPE_CHECKING:
    from mad.evaluation.evidence import Measured


def run(config: Config) -> None:
    """Compare the groups.

    Raises:
        MadError: there are no groups, an encoder was not evaluated, or two were tested on different patients.
    """
    from mad.evaluation.evidence import compare, slide_means
    from mad.reporting.evidence import evidence_figure, evidence_table, slides_table
    from mad.stages.report import write_table

    if not config.evidence.groups:
        raise MadError(
            "evidence.groups is empty: name the encoders of each method, as in `groups: {mad: [mad-s0, mad-s1]}`, or give runs "
            "`seeds: [0, 1, 2]`"
        )
    results = Path(config.results)
    spec = {entry.name: entry.spec for entry in config.encoders}
    # In the order of `encoders:`, which is the reader's; keys of a configuration come sorted.
    place = {name: number for number, name in enumerate(spec)}
    members = dict(sorted(config.evidence.groups.items(), key=lambda group: min(place[name] for name in group[1])))
    names = list(dict.fromkeys(name for each in members.values() for name in each))
    reports = {name: _consistency(results, name) for name in names}
    measured = {name: load(results, name, reports[name]) for name in names}
    found = compare(
        {group: [measured[name] for name in each] for group, each in members.items()},
        config.evidence.baseline,
        resamples=config.evaluate.bootstrap_resamples,
        min_patients=config.evaluate.min_patients,
        seed=config.seed,
    )
    found["transition"] = list(config.evaluate.transition)
    found["notes"] = _notes(reports)
    found["slides"] = slide_means(
        {group: [reports[name].get("slides", {}) for name in each] for group, each in members.items()}
    )
    write_json(results / "report" / "evidence.json", found)
    for table in (evidence_table(found), slides_table(found)):
        write_table(results / "report" / "tables", table)
    untrained = {
        group for group, each in members.items() if all(spec[n].startswith(("colour", "random:")) for n in each)
    }
    evidence_figure(found, untrained=untrained, path=results / "report" / "figures" / "evidence.png")
    log(f"evidence: {len(members)} methods, {len(names)} encoders, in {results / 'report'}")


def load(results: Path, encoder: str, consistency: dict[str, Any]) -> Measured:
    """The sums per test patient of an encoder, by protocol, and its numbers without any."""
    import numpy as np

    from mad.evaluation.evidence import Measured

    path = results / "evaluate" / encoder / "patients.npz"
    if not path.exists():
        raise MadError(f"{path}: no such file; run `mad evaluate` for encoder {encoder!r} first")
    sums: dict[str, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            protocol, _, key = name.partition(".")
            sums.setdefault(protocol, {})[key] = arrays[name]
    ranks = consistency.get("rankme") or {}
    return Measured(name=encoder, sums=sums, facts={f"rankme {side}": value for side, value in ranks.items()})


def _consistency(results: Path, encoder: str) -> dict[str, Any]:
    path = results / "evaluate" / encoder / "consistency.json"
    if not path.exists():
        raise MadError(f"{path}: no such file; run `mad evaluate` for encoder {encoder!r} first")
    report: dict[str, Any] = read_json(path)
    return report


def _notes(reports: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader must know of the cohort and of encoders that saw other tiles."""
    from mad.reporting.from_json import common_notes

    absent = {name: report["reason"] for name, report in reports.items() if report["status"] == "absent"}
    notes = common_notes({name: {"consistency": report} for name, report in reports.items()}, "consistency")
    return notes + [f"{name} is absent: {reason}." for name, reason in absent.items()]
