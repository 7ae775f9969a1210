"""Files of tensors: written as safetensors, and read whichever program wrote them; nothing in a file is executed."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mad.files import MadError, StorageError, atomic_path

Tensors = dict[str, Tensor]

NAMED = 4  # names that an error shows
WEB_PAGE = re.compile(
    rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE
)  # a bare "<" may be part of a safetensors header's length


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically. Equal tensors give equal bytes.

    Raises:
        StorageError: the disk is full.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata or {"format": "pt"})
        except SafetensorError as error:  # what its writer makes of a failed write
            room = shutil.disk_usage(path.parent).free / 1e9
            raise StorageError(
                f"{path}: cannot be written ({error}; {room:.3g} GB are free there); make room and run it again: what is finished "
                "is kept"
            ) from None


def read_tensors(path: Path) -> Tensors:
    """The tensors in a file, fp32, as they are named there; of a training checkpoint the teacher's.

    Raises:
        MadError: there is no such file, it is damaged or no file of weights, would have to be executed, or holds no tensors or
            numbers that are not finite.
    """
    if not path.is_file():
        raise MadError(f"{path}: no such file of weights")
    content = _load(path)
    while isinstance(content, dict):
        inner = next((content[key] for key in ("teacher", "model", "state_dict") if _is_dict(content, key)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(value) for value in content.values()):
        held = ", ".join(map(str, list(content)[:NAMED])) if isinstance(content, dict) else type(content).__name__
        raise MadError(f"{path}: holds no dictionary of weights, but {held or 'nothing'}")
    if broken := [name for name, value in content.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise MadError(f"{path}: {some_names(broken)} hold numbers that are not finite; take an earlier checkpoint")
    tensors = {
        re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in content.items()
    }
    if any(name.startswith("teacher.") for name in tensors):
        tensors = {name[len("teacher.") :]: tensor for name, tensor in tensors.items() if name.startswith("teacher.")}
    return {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}


def _load(path: Path) -> Any:
    """What a file of weights holds, nothing of it executed."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"version https://git-lfs"):
        raise MadError(f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if WEB_PAGE.match(start):
        raise MadError(f"{path}: is a web page, not weights; a gated file was asked for without a token, perhaps")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise MadError(
            f"{path}: {path.stat().st_size / 1e9:.2g} GB of weights do not fit into the memory; take a machine with more"
        ) from None
    except Exception as error:  # whatever the unpickler makes of damaged bytes
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise MadError(
                f"{path}: cannot be read without executing what is in it ({_first_line(error)}); whoever trusts the "
                "file can save its weights alone, with safetensors.torch.save_file"
            ) from None
        raise MadError(f"{path}: no readable weights ({_first_line(error)}); was the download complete?") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _is_dict(content: dict[Any, Any], key: str) -> bool:
    return isinstance(content.get(key), dict)


def some_names(names: Iterable[str]) -> str:
    """The first names in order, for a message."""
    listed = sorted(names)
    return ", ".join(listed[:NAMED]) + (f" and {len(listed) - NAMED} more" if len(listed) > NAMED else "")
