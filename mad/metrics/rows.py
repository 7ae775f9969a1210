"""Rows of embeddings, chunk by chunk, as tensors; the arrays may be memory-mapped and larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST = 1e15
"""Sums of squares of larger numbers leave the range of float32."""


class RowSubset:
    """Some rows of features [n, d], copied piece by piece as they are asked for, so that no second array of them is made.

    As far as the metrics go it is an array: of `rows` (their numbers) a slice, a mask or an array of places gives an array.
    """

    def __init__(self, features: NDArray, rows: NDArray[np.int64]) -> None:
        self._features, self._rows = features, rows
        self.shape = (len(rows), features.shape[1])
        self.size = len(rows) * features.shape[1]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, places: slice | NDArray) -> NDArray:
        return self._features[self._rows[places]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return np.asarray(self[:], dtype)


Features = NDArray | RowSubset


def as_tensor(rows: Features) -> Tensor:
    """float32 tensor of an array, sharing its memory where it can; not to be written to."""
    with np.errstate(over="ignore"):  # `refuse_not_finite` tells of it
        block = np.ascontiguousarray(rows, np.float32)
    return torch.from_numpy(
        block if block.flags.writeable else block.copy()
    )  # torch warns of arrays mapped for reading


def as_double(rows: NDArray, device: str | torch.device) -> Tensor:
    """float64 tensor of an array on a device, a copy in any case."""
    dtype = np.float64 if torch.device(device).type == "cpu" else None  # float32 halves the way to a GPU
    return torch.from_numpy(np.array(rows, dtype)).to(device).double()


def chunks(num_rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows, in order."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


class CentredRows:
    """Rows in chunks, centred by their mean: float32 distances lose digits far from the origin."""

    def __init__(self, features: NDArray, device: str | torch.device, size: int):
        """Of features [n, d]; chunks of at most `size` rows go to the device.

        Raises:
            ValueError: a row is not finite.
        """
        self.features, self.device, self.size, self.dim = features, torch.device(device), size, features.shape[1]
        total = torch.zeros(self.dim, dtype=torch.float64)
        for rows in chunks(len(self), size):
            total += as_tensor(features[rows]).sum(0, dtype=torch.float64)
        if not torch.isfinite(total).all():
            refuse_not_finite(features)
        self.mean = total / len(features)
        """[d] float64"""
        self.shift = self.mean.float().to(self.device)
        self.squares = torch.cat([(block**2).sum(1) for _, block in self])
        """[n], squared lengths of the centred rows, on the device"""
        if not torch.isfinite(self.squares).all():
            refuse_not_finite(features)
        self.variance = float(self.squares.sum(dtype=torch.float64)) / features.size
        """Mean over the dimensions."""

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(slice, rows [m, d] float32 on the device), centred."""
        for rows in chunks(len(self), self.size):
            yield rows, as_tensor(self.features[rows]).to(self.device) - self.shift

    def take(self, index: Tensor) -> Tensor:
        """Centred rows of these numbers [m, d] float32, on the device."""
        return as_tensor(self.features[index.cpu().numpy()]).to(self.device) - self.shift


def refuse_not_finite(features: Features) -> None:
    """Name the first row of features [n, d] that holds NaN, infinity, or numbers whose squares float32 cannot hold.

    Raises:
        ValueError: there is one.
    """
    for rows in chunks(len(features), 8192):
        block = np.asarray(features[rows])
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise ValueError(f"embeddings: row {rows.start + int(finite.argmin())} holds NaN or infinite values")
        small = np.abs(block).max(axis=1, initial=0) < LARGEST
        if not small.all():
            raise ValueError(
                f"embeddings: row {rows.start + int(small.argmin())} holds numbers of {LARGEST:g} and more"
            )
