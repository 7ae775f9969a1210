"""A run's folder: whose it is, whether that run is finished, and what happens to another one's files.

A run is known by its identity: digests of its recipe, its data, the weights that it starts from and, where it has one, its frozen
teacher. Another one's files are moved to `archive/`: trained weights are never overwritten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mad.files import read_json, write_json_if_changed
from mad.models.export import read_provenance
from mad.progress import log
from mad.training import checkpoint
from mad.training.records import METRICS, TENSORBOARD

ENCODER = "encoder"  # the folder of a run's weights
OWNED = ("checkpoints", METRICS, TENSORBOARD, "curves.png", "summary.json", "identity.json")


def finished_run(folder: Path, identity: dict[str, Any], weights: str = ENCODER) -> dict[str, Any] | None:
    """The provenance of the weights in `folder`/`weights` where this very run has made them, otherwise None."""
    provenance = read_provenance(folder / weights)
    known = folder / "identity.json"
    if not provenance or not known.exists() or not _same_run(read_json(known), identity):
        return None
    return provenance if all(provenance.get(key) == value for key, value in identity.items()) else None


def _same_run(former: dict[str, Any] | None, identity: dict[str, Any]) -> bool:
    """Whether the content of identity.json, which holds the recipe too, is of the run with this identity."""
    return former is not None and {key: former.get(key) for key in identity} == identity


def prepare_folder(folder: Path, identity: dict[str, Any], recipe: dict[str, Any], weights: str = ENCODER) -> None:
    """Make `folder` that of this run: what another recipe or other data left is moved to `archive/`, never overwritten."""
    checkpoint.remove_leftovers(folder / "checkpoints")
    known, present = folder / "identity.json", {**identity, "recipe": recipe}
    former = read_json(known) if known.exists() else None
    owned = (weights, *OWNED)
    if not _same_run(former, identity) and any((folder / name).exists() for name in owned):
        tag = f"{former['recipe_digest']}-{former['data_digest']}" if former else "unknown"
        target, number = folder / "archive" / tag, 1
        while target.exists():
            number += 1
            target = folder / "archive" / f"{tag}-{number}"
        target.mkdir(parents=True)
        for name in owned:
            if (folder / name).exists():
                (folder / name).rename(target / name)
        told = present if former and "recipe" in former else identity
        changed = checkpoint.differences(former, told) if former else ["identity.json is missing"]
        log(
            f"{folder.name}: an earlier run differs in {'; '.join(changed)}; it was moved to {target}, training starts anew"
        )
    write_json_if_changed(known, present)
    write_json_if_changed(folder / "recipe.json", recipe)
    (folder / "checkpoints").mkdir(exist_ok=True)
