"""Checkpoints: whole files or none, the last two kept, loaded without executing anything.

`checkpoints/step_0000100.pt` holds the state *before* step 100, that is after 100 optimiser steps. Random numbers need no
state: order and views depend on (seed, n) alone, and each step seeds torch by (seed, step, rank).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from mad.files import MadError, atomic_path

KEEP = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step` and remove all but the last two."""
    path = folder / f"step_{step:07d}.pt"
    with atomic_path(path) as temporary:
        torch.save({**state, "step": step}, temporary)
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


def load_latest(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None where there is none.

    Raises:
        MadError: it belongs to another recipe or other data (`identity`), or no file can be read although some are there.
    """
    paths = found(folder)
    for path in reversed(paths):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError):
            continue
        if state["identity"] != identity:
            raise MadError(f"{path} is of another recipe or other data; move {folder} away to start anew")
        return state
    if paths:
        raise MadError(f"{folder}: none of {len(paths)} checkpoint(s) can be read; remove them to start the run anew")
    return None
