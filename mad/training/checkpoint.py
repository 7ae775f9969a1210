"""Checkpoints: whole files or none, the last two kept, loaded without executing anything.

`checkpoints/step_0000100.pt` holds the state *before* step 100, that is after 100 optimiser steps. Random numbers need no
state: order and views depend on (seed, n) alone, and each step seeds torch by (seed, step, rank).

One file holds everything, whole, however many processes there are and whether they shard the networks or not: any number of
them resumes it. The first process writes it.
"""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from mad.files import MadError, StorageError, atomic_path, unreadable
from mad.progress import log
from mad.training import ranks
from mad.training.free_memory import is_exhaustion

KEEP = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step` and remove all but the last two.

    Raises:
        StorageError: the disk is full; the checkpoints before stay as they are.
    """
    path = folder / f"step_{step:07d}.pt"
    with atomic_path(path) as temporary:
        try:
            torch.save({**state, "step": step}, temporary)
        except RuntimeError as error:  # what its zip writer makes of a failed write
            room = shutil.disk_usage(folder).free / 1e9
            raise StorageError(
                f"{path}: cannot be written ({room:.3g} GB are free there: {str(error).splitlines()[0][:120]}); make room and "
                "run it again: it resumes from the checkpoint before"
            ) from None
    for old in found(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that processes killed while saving have left in `folder`."""
    for path in folder.glob(".step_*.pt"):
        path.unlink(missing_ok=True)


def found(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def differences(former: Any, present: Any, key: str = "") -> list[str]:
    """Where two nested dictionaries differ, as `key.of.value: former -> present`; a missing value is `none`."""
    if isinstance(former, dict) and isinstance(present, dict):
        parts = [
            differences(former.get(name), present.get(name), f"{key}.{name}" if key else str(name))
            for name in sorted({*former, *present})
        ]
        return [line for part in parts for line in part]
    shown = (json.dumps(value) if value is not None else "none" for value in (former, present))
    return [] if former == present else [f"{key}: {' -> '.join(shown)}"]


def load_latest(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None where there is none.

    Its tensors are mapped: they stay in the file until they are used, and processes on one machine share what they read.

    Raises:
        MadError: it belongs to another recipe or other data (`identity`), or no file can be read although some are there.
        StorageError: the disk fails, which says nothing of the file.
        RuntimeError, MemoryError: too little memory, likewise.
    """
    paths = found(folder)
    for path in reversed(paths):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            _check_sums(path)
        except OSError as error:
            raise unreadable(path, error) from error
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            if is_exhaustion(error):
                raise
            _read_through(path)
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            log(f"WARNING: {path} is passed over, it cannot be read: {reason}")
            continue
        if state["identity"] != identity:
            changed = "; ".join(differences(state["identity"], identity))
            raise MadError(f"{path} is of another recipe or other data ({changed}); move {folder} away to start anew")
        return state
    if paths:
        raise MadError(f"{folder}: none of {len(paths)} checkpoint(s) can be read; remove them to start the run anew")
    return None


def set_aside(folder: Path, state: dict[str, Any] | None) -> None:
    """Rename the checkpoints that `load_latest` passed over for `state`: they would count among the last two."""
    if state is None or ranks.rank():
        return
    for path in found(folder):
        if int(path.stem.removeprefix("step_")) > state["step"]:
            path.rename(path.with_name(f"{path.name}.unreadable"))
            log(f"{path} is kept as {path.name}.unreadable")


def _check_sums(path: Path) -> None:
    """Fail where a byte has changed since it was written: tensors that are mapped are not compared with the file's checksums.

    Raises:
        ValueError: one has.
    """
    with zipfile.ZipFile(path) as file:
        if changed := file.testzip():
            raise ValueError(f"{changed} is not what was written")


def _read_through(path: Path) -> None:
    """Fail where it is the disk that fails: torch's reader makes one error of that and of a torn file.

    Raises:
        StorageError: the system cannot read the file.
    """
    try:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    except OSError as error:
        raise unreadable(path, error) from error


def check_same_step(folder: Path, state: dict[str, Any] | None, device: torch.device) -> None:
    """Fail where processes have loaded different checkpoints; every process takes part.

    Raises:
        MadError: their steps differ.
    """
    step = int(state["step"]) if state else 0
    last, first = ranks.all_max(torch.tensor([step, -step], device=device)).tolist()
    if last != -first:
        raise MadError(
            f"{folder}: this process resumes at step {step}, others between {-first} and {last}: they do not see the same files; "
            "let all machines share this folder, or wait until its files are there on all, and run again"
        )
