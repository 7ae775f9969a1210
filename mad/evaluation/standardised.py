"""Standardised embeddings and the objective of a softmax regression on them, in chunks of rows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mad.metrics.rows import Features, as_tensor, chunks, refuse_not_finite

Device = str | torch.device
IN_MEMORY = 2**28
"""Numbers up to which standardised rows are kept."""


def standardisation(features: Features, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every dimension [d], float32; a constant dimension gets 1.

    Raises:
        ValueError: a row is not finite.
    """
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for rows in chunks(len(features), chunk):
        total += as_tensor(features[rows]).sum(0, dtype=torch.float64)
    if not torch.isfinite(total).all():
        refuse_not_finite(features)
    mean = total / len(features)
    for rows in chunks(len(features), chunk):
        squares += (as_tensor(features[rows]) - mean).square_().sum(0)
    std = (squares / len(features)).sqrt()
    constant = std <= 1e-6 * mean.abs().clamp(min=1e-6)
    return mean.float(), torch.where(constant, torch.ones_like(std), std).float()


def standardised(features: Features, mean: Tensor, std: Tensor, device: Device) -> Tensor:
    """Features [n, d] less the mean, in units of the standard deviation, float32."""
    return (as_tensor(features).to(device) - mean.to(device)) / std.to(device)


class StandardisedRows:
    """Standardised training rows, all at once where that is small, else chunk by chunk."""

    def __init__(self, features: Features, labels: NDArray, mean: Tensor, std: Tensor, device: Device, chunk: int):
        self.features, self.mean, self.std, self.device, self.chunk = features, mean, std, device, chunk
        self.codes = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
        self.all = standardised(features, mean, std, device) if features.size <= IN_MEMORY else None

    def __getitem__(self, rows: slice) -> Tensor:
        if self.all is not None:
            return self.all[rows]
        return standardised(self.features[rows], self.mean, self.std, self.device)

    def principal_axes(self) -> tuple[Tensor, Tensor]:
        """Variances [d] along the principal axes [d, d] of some rows, float64."""
        rows = self[:: max(1, len(self.codes) // (8 * len(self.mean)))]
        variances, axes = torch.linalg.eigh((rows.T @ rows).double().cpu() / len(rows))
        return variances.clamp(min=0), axes

    def loss(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy [r] and its gradients of weights and biases [r, C, d + 1], float64 on the CPU."""
        runs, num_classes, _ = weights.shape
        on_device = weights.float().to(self.device)
        weight, bias = on_device[:, :, :-1].flatten(0, 1), on_device[:, :, -1:]
        gradient = torch.zeros_like(weights, device=self.device)
        losses = torch.zeros(runs, dtype=torch.float64, device=self.device)
        for rows in chunks(len(self.codes), self.chunk):
            block, target = self[rows], self.codes[rows].expand(runs, 1, -1)
            log_p = torch.log_softmax((weight @ block.T).view(runs, num_classes, -1) + bias, dim=1)  # [r, C, n]
            losses -= log_p.gather(1, target).sum((1, 2), dtype=torch.float64)
            error = log_p.exp_().scatter_add_(1, target, torch.full_like(log_p[:, :1], -1))
            gradient[:, :, :-1] += (error.flatten(0, 1) @ block).view(runs, num_classes, -1)
            gradient[:, :, -1] += error.sum(2)
        return losses.cpu() / len(self.codes), gradient.cpu() / len(self.codes)
