"""Where the numbers of a report come from: code, packages, configuration, and the digests of data and weights."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import mad
from mad.config import Config
from mad.files import digest, read_json, to_json
from mad.reporting.web import render

RUN = ("method", "steps", "weights_sha256", "recipe_digest", "data_digest", "init_sha256", "teacher_sha256")
ENCODER = ("spec", "weights_sha256", "architecture", "dtype", "pooling", "status")


def provenance(config: Config) -> dict[str, Any]:
    """What is known now, from the files under `config.results`; no time of day, so that the same state tells the same."""
    results = Path(config.results)
    settings = config.model_dump(mode="json")
    packages = {found.metadata["Name"]: found.version for found in distributions()}
    return {
        "mad": mad.__version__,
        "revision": revision(Path(mad.__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "config": settings,
        "config_digest": digest(settings),
        "shards": _read(results / "shard" / "cohort.json", ("sha256", "unreadable")),
        "runs": {run.name: _read(results / "train" / run.name / "summary.json", RUN) for run in config.runs},
        "encoders": {
            each.name: _read(results / "embed" / each.name / "audit.json", ENCODER) for each in config.encoders
        },
    }


def revision(folder: Path) -> str:
    """The git commit of a folder, with a word on changes since; "not a checkout" where git knows none."""
    command = ["git", "-C", str(folder)]
    try:
        top, commit = subprocess.run(
            [*command, "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split("\n")[:2]
        if Path(top).resolve() != folder.resolve():  # installed somewhere inside another project
            return "not a checkout"
        changed = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "not a checkout"
    return f"{commit}, with changes" if changed else commit


def provenance_page(found: dict[str, Any]) -> str:
    """The page as HTML."""
    return render("provenance.html", found=found, config=to_json(found["config"]), run=RUN, encoder=ENCODER)


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """Some keys of a JSON file; null where there is none."""
    if not path.exists():
        return None
    told = read_json(path)
    return {key: told.get(key) for key in keys}
