"""A run's folder: whose it is, whether that run is finished, and what happens to another one's files.

A run is known by its identity: digests of its recipe, its data, the weights that it starts from and, where it has one, its frozen
teacher. Those of another finished run are moved to `archive/`: trained weights are never overwritten. Another run that was stopped
midway is told of and left as it is: a key changed by mistake then costs no days of training.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mad.files import MadError, read_json, write_json_if_changed
from mad.models.export import read_provenance
from mad.progress import log
from mad.training import checkpoint
from mad.training.records import METRICS, TENSORBOARD

ENCODER = "encoder"  # the folder of a run's weights
LOCK = ".lock"  # names the process that trains here; never moved or removed, or two could hold one each
SHOWN = 8  # differences that a message names
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


@contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Keep every other process from training in `folder` meanwhile. The system takes the lock back when this process dies.

    It is a lock of the process, which those that it forks to load tiles do not prolong (`flock` would be theirs too).

    Raises:
        MadError: another process holds it.
    """
    descriptor = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BlockingIOError:
            holder = (folder / LOCK).read_text(encoding="utf-8") or "another process"
            raise MadError(
                f"{folder}: {holder} is training this run; wait until it has ended, or end it, and run again"
            ) from None
        except OSError as error:
            log(f"WARNING: {folder / LOCK}: cannot be locked ({error.strerror}): let no second process train this run")
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def prepare_folder(
    folder: Path,
    identity: dict[str, Any],
    recipe: dict[str, Any],
    weights: str = ENCODER,
    slides: dict[str, str] | None = None,
    held_out: str | None = None,
) -> None:
    """Make `folder` that of this run: what another finished one left is moved to `archive/`, never overwritten.

    Args:
        slides: a digest of each slide's samples, kept to tell later which of them changed.
        held_out: that of the set of the health checks, kept to tell a run that resumes with another one.

    Raises:
        MadError: another run was stopped there midway; the text names what differs, and nothing was touched.
    """
    told = {"slides": slides, "held_out": held_out}
    known, present = folder / "identity.json", {**identity, "recipe": recipe} | {k: v for k, v in told.items() if v}
    former, checkpoints = read_json(known) if known.exists() else None, folder / "checkpoints"
    owned = (weights, *OWNED)
    is_anothers = not _same_run(former, identity) and any((folder / name).exists() for name in owned)
    saved = checkpoint.found(checkpoints)
    if is_anothers and saved and not ((folder / "summary.json").exists() or read_provenance(folder / weights)):
        raise MadError(
            f"{folder}: there is a run that is not finished ({saved[-1].name}); what is asked for now differs from it: "
            f"{_differences(former, present)}. Put that back, and the same command resumes it; or give the new entry another "
            f"name; or move {checkpoints} away, or delete it, and {folder.name} starts anew"
        )
    checkpoint.remove_leftovers(checkpoints)
    if is_anothers:
        tag = f"{former['recipe_digest']}-{former['data_digest']}" if former else "unknown"
        target, number = folder / "archive" / tag, 1
        while target.exists():
            number += 1
            target = folder / "archive" / f"{tag}-{number}"
        target.mkdir(parents=True)
        for name in owned:
            if (folder / name).exists():
                (folder / name).rename(target / name)
        changed = _differences(former, present)
        log(f"{folder.name}: an earlier run differs in {changed}; it was moved to {target}, training starts anew")
    elif saved and former and former.get("held_out", held_out) != held_out:
        log(
            f"{folder.name}: WARNING: its health checks look at other tiles from here: held-out slides, or runtime.health_samples, "
            "have changed since; do not compare figures of before and after"
        )
    write_json_if_changed(known, present)
    write_json_if_changed(folder / "recipe.json", recipe)
    checkpoints.mkdir(exist_ok=True)


def _differences(former: dict[str, Any] | None, present: dict[str, Any]) -> str:
    """Where two contents of identity.json differ, in words; what is no part of the identity counts where both hold it."""
    if former is None:
        return "identity.json is missing"
    one, other = (
        {key: value for key, value in mine.items() if key not in ("recipe", "slides", "held_out") or key in theirs}
        for mine, theirs in ((former, present), (present, former))
    )
    lines = checkpoint.differences(one, other)
    return "; ".join(lines[:SHOWN]) + (f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")
