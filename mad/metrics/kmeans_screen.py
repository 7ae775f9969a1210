"""Which rows may have changed their cluster since K-Means last compared them all with a start's centres.

The nearest centre c of a row x has the greatest x . c - |c|^2 / 2. With orthonormal axes V and a centre a at the time of the
last full comparison (the anchor),

    x . c = (V' x) . (V' c) + r(x) . r(a) + r(x) . (r(c) - r(a)),     r(z) = z - V V' z,

where the first product takes a few dimensions, the second was kept, and the third is at most |r(x)| |r(c) - r(a)|. A row
whose greatest value is above the others by more than these bounds allow is certain; the others are compared in all dimensions.
Axes along the largest variances, along which centres move most, leave little to the bound; any axes give the same clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mad.metrics.rows import CentredRows, chunks

AXES = 32
SAMPLE = 4096
"""Rows that the axes are taken from."""


@dataclass
class Start:
    """One start of K-Means and how far it has come."""

    centres: Tensor
    """[k, d] float64"""
    labels: Tensor = field(default_factory=lambda: torch.empty(0))
    """[n] int16, of the rows at the last comparison, from which follow"""
    total: Tensor = field(default_factory=lambda: torch.empty(0))
    """[k, d] float64, sums of the rows of each cluster, and"""
    count: Tensor = field(default_factory=lambda: torch.empty(0))
    """[k] float64, their number."""
    changed: bool = True
    """Whether a row changed its cluster at the last comparison."""
    anchor: Tensor | None = None
    """[k, d], the centres when all rows were last compared with them in all dimensions, and"""
    kept: Tensor = field(default_factory=lambda: torch.empty(0))
    """[k, n], the products of rows and anchors outside of the screen's axes."""


class Screen:
    """Rows along a few axes, and what is left of their length."""

    def __init__(self, data: CentredRows):
        self.size = data.size
        sample = data.take(torch.arange(0, len(data), -(-len(data) // SAMPLE)))
        _, vectors = torch.linalg.eigh((sample.T @ sample).double())
        self.axes = vectors[:, -AXES:].float()  # [d, p]
        parts = [block @ self.axes for _, block in data]
        self.along = torch.cat(parts)  # [n, p]
        self.rest = (data.squares - (self.along**2).sum(1)).clamp(min=0).sqrt()  # [n]

    def compare(self, start: Start) -> tuple[Tensor, Tensor]:
        """Nearest centre [n] int16 as far as the screen can tell, and the rows [m] where it cannot."""
        if start.anchor is None:
            return torch.empty(0), torch.arange(len(self.rest))
        centres = start.centres.float()
        moved = centres - start.anchor
        bound = 2 * torch.linalg.vector_norm(moved - moved @ self.axes @ self.axes.T, dim=1).max()
        half = (start.centres**2).sum(1, keepdim=True).float() / 2
        inside = centres @ self.axes
        labels, doubtful = [], []
        for rows in chunks(len(self.rest), 4 * self.size):
            products = torch.addmm(start.kept[:, rows], inside, self.along[rows].T).sub_(half)  # [k, m]
            most, label = products.max(0)
            second = products.scatter_(0, label[None], -torch.inf).amax(0)
            labels.append(label.to(torch.int16))
            doubtful.append((most - second <= bound * self.rest[rows]).nonzero()[:, 0] + rows.start)
        return torch.cat(labels), torch.cat(doubtful)

    def hold(self, start: Start, rows: slice, products: Tensor) -> None:
        """Keep the products [m, k] of rows and the centres of a start, with which all rows are being compared."""
        centres = start.centres.float()
        if rows.start == 0:
            start.anchor, start.kept = centres, products.new_empty(len(centres), len(self.rest))
        torch.sub(products.T, (centres @ self.axes) @ self.along[rows].T, out=start.kept[:, rows])
