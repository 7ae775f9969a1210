"""A step's views as tensors: what one process trains on at once."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mad.files import MadError
from mad.training import views

_unused: dict[tuple[Any, ...], list[npt.NDArray[Any]]] = defaultdict(list)
"""Arrays of batches that are gone, by shape and type: memory that is new to a process costs up to 6 % of the decoding."""


@dataclass(frozen=True)
class Group:
    """Views of one kind in a batch, uint8: teacher [B, T, P, P, 3], student [B, S, P, P, 3] or None, local [B, L, p, p, 3].

    `kind`: "pair" (the student sees children alone), "global_pair" (the teacher's views of the parent too), "multicrop", or for
    distillation that of the sample ("5x-20x"; the student sees the parent, the frozen teacher its children, row by row).
    `masks` [B, T, N] are those of the teacher's views where the student sees them too; `features` [B, K, D] fp32 are stored
    embeddings in place of the frozen teacher's views. `cells` [B, T, S, N] fp32 say where each child lies in each view of its
    parent, where it answers to this part of it alone.
    """

    kind: str
    teacher: Tensor
    student: Tensor | None
    local: Tensor
    masks: Tensor | None = None
    features: Tensor | None = None
    cells: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """One process's share of a step: its groups and the tiles that were read."""

    groups: list[Group]
    tiles: list[str] = field(default_factory=list)


class _Pile:
    """Views of one kind, copied into the tensors of a batch as they come: while an image is still in the processor's cache."""

    def __init__(self, first: views.Views, room: int) -> None:
        self.size, self._room = 0, room
        self._parts = [_space(part, room) for part in _parts(first)]

    def add(self, view: views.Views) -> None:
        if self.size == self._room:
            self._room *= 2
            self._parts = [None if space is None else _larger(space, self._room) for space in self._parts]
        for space, part in zip(self._parts, _parts(view), strict=True):
            if space is not None and part is not None:
                for place, image in enumerate(part):
                    space[self.size, place] = image
        self.size += 1

    def group(self, kind: str) -> Group:
        parts = [None if space is None else _lend(space, self.size) for space in self._parts]
        return Group(kind, *parts)  # type: ignore[arg-type]


def _parts(view: views.Views) -> tuple[Sequence[npt.NDArray[Any]] | npt.NDArray[Any] | None, ...]:
    """In the order of a group's tensors."""
    return view.teacher, view.student, view.local, view.masks, view.features, view.cells


def _space(part: Sequence[npt.NDArray[Any]] | npt.NDArray[Any] | None, room: int) -> npt.NDArray[Any] | None:
    """Space for `room` samples with as many images (or masks) as `part`; [room, 0, 0, 0, 3] where it has none."""
    if part is None:
        return None
    shape, dtype = (part[0].shape, part[0].dtype) if len(part) else ((0, 0, 3), np.dtype(np.uint8))
    return _array((room, len(part), *shape), dtype)


def _array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    unused = _unused[shape, dtype]
    return unused.pop() if unused else np.empty(shape, dtype)


def _larger(space: npt.NDArray[Any], room: int) -> npt.NDArray[Any]:
    """Space for `room` samples that begins as `space`, which may be filled anew."""
    larger = _array((room, *space.shape[1:]), space.dtype)
    larger[: len(space)] = space
    _unused[space.shape, space.dtype].append(space)
    return larger


def _lend(space: npt.NDArray[Any], size: int) -> Tensor:
    """The first `size` entries of `space` as a tensor; with its last tensor gone, `space` may be filled anew."""
    lent = space[:size]
    if space.size:
        weakref.finalize(lent, _unused[space.shape, space.dtype].append, space).atexit = False
    return torch.from_numpy(lent)


def collate(samples: Iterable[list[views.Views]], count: int | None = None) -> Batch:
    """The views of `samples` as tensors, grouped by kind in the order of their names; `count` of them, if they come one by one."""
    if count is None:
        samples = list(samples)
        count = len(samples)
    piles: dict[str, _Pile] = {}
    tiles: list[str] = []
    for sample in samples:
        for view in sample:
            if view.kind not in piles:
                piles[view.kind] = _Pile(view, count * len(sample))
            piles[view.kind].add(view)
            tiles += view.tiles
    return Batch([piles[kind].group(kind) for kind in sorted(piles)], tiles)


def samples_per_process(batch: int, world: int) -> int:
    """Samples of a global batch that each of `world` processes gets.

    Raises:
        MadError: they cannot be shared out evenly.
    """
    if batch % world:
        raise MadError(
            f"batch: {batch} samples cannot be shared evenly by {world} processes; make batch a multiple of {world}"
        )
    return batch // world
