"""Linear probes on frozen embeddings.

`paper_probe` is the paper's (MAD, Downstream Tasks): one linear layer, cross-entropy, Adam at 1e-4, batches of 64. It ranks
embeddings by their norm too, since its learning rate is fixed. `sound_probe` therefore stands beside it: embeddings
standardised by the training tiles, the L2-penalised optimum over the full batch, its strength chosen on validation patients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Device = str | torch.device
AHEAD = 64
"""Steps whose batches are drawn at once."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Linear classifiers of one or several runs."""

    weight: Tensor
    """[r, d, C]"""
    bias: Tensor
    """[r, 1, C]"""
    mean: Tensor | None = None
    """[d], subtracted from the embeddings, and"""
    std: Tensor | None = None
    """[d], by which they are divided; None leaves them as they are."""

    def predict(self, features: NDArray, *, device: Device = "cpu", chunk: int = 16384) -> NDArray[np.int64]:
        """Class codes [r, n] of features [n, d]."""
        weight, bias = self.weight.to(device), self.bias.to(device)
        predicted = np.empty((len(weight), len(features)), np.int64)
        for start in range(0, len(features), chunk):
            rows = _tensor(features[start : start + chunk]).to(device)
            if self.mean is not None and self.std is not None:
                rows = (rows - self.mean.to(device)) / self.std.to(device)
            predicted[:, start : start + chunk] = (rows.to(weight.dtype) @ weight + bias).argmax(-1).cpu().numpy()
        return predicted


def paper_probe(
    features: NDArray,
    labels: NDArray,
    *,
    num_classes: int,
    seeds: list[int],
    steps: int,
    lr: float = 1e-4,
    batch: int = 64,
    device: Device = "cpu",
) -> Probe:
    """Train the paper's probe once per seed; the seed sets the initial weights and the order of the tiles.

    The runs are trained side by side as one batched layer [r, d, C]: cross-entropy is averaged over each run's own batch and
    Adam works elementwise, so that each run is what it would be alone.

    Args:
        features: [n, d].
        labels: [n] class codes.
        num_classes: C.
        seeds: one run each.
        steps: optimiser steps; epochs are drawn without replacement, a last incomplete batch runs on into the next epoch.
        lr: Adam learning rate.
        batch: tiles per step.
        device: of the layer and its batches; the features stay where they are.

    Raises:
        ValueError: no training tile.
    """
    if not len(labels):
        raise ValueError("a probe needs training tiles")
    data, codes = _tensor(features), torch.from_numpy(np.asarray(labels, np.int64))
    orders = [_Order(len(codes), seed) for seed in seeds]
    bound = data.shape[1] ** -0.5  # the initialisation of torch.nn.Linear
    weight, bias = (
        torch.stack(
            [(torch.rand(num_classes, width, generator=order.generator) * 2 - 1) * bound for order in orders]
        ).to(device)
        for width in (data.shape[1], 1)
    )  # [r, C, d], [r, C, 1]: classes before rows, by far the faster layout for products this thin
    parameters = [
        (weight, torch.zeros_like(weight), torch.zeros_like(weight)),
        (bias, torch.zeros_like(bias), torch.zeros_like(bias)),
    ]
    with _one_thread():
        for step in range(1, steps + 1):
            if (step - 1) % AHEAD == 0:
                ahead = torch.stack(
                    [order.take(AHEAD * batch).view(AHEAD, batch) for order in orders], 1
                )  # [steps, r, b]
            index = ahead[(step - 1) % AHEAD].flatten()
            rows = data.index_select(0, index).to(device).view(len(seeds), batch, -1)
            target = codes.index_select(0, index).to(device).view(len(seeds), 1, batch)
            error = torch.softmax(torch.baddbmm(bias, weight, rows.transpose(1, 2)), dim=1)  # [r, C, b]
            error.scatter_add_(1, target, torch.full_like(error[:, :1], -1)).div_(batch)  # d cross-entropy / d logits
            # Adam (Kingma & Ba 2015), as torch.optim.Adam with its default betas and epsilon.
            for (value, first, second), gradient in zip(
                parameters, (torch.bmm(error, rows), error.sum(2, True)), strict=True
            ):
                first.lerp_(gradient, 0.1)
                second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                root = second.sqrt().div_((1 - 0.999**step) ** 0.5).add_(1e-8)
                value.addcdiv_(first, root, value=-lr / (1 - 0.9**step))
    return Probe(weight=weight.cpu().transpose(1, 2).contiguous(), bias=bias.cpu().transpose(1, 2).contiguous())


def sound_probe(
    features: NDArray,
    labels: NDArray,
    *,
    num_classes: int,
    strength: float,
    start: Probe | None = None,
    device: Device = "cpu",
    max_iterations: int = 200,
    chunk: int = 16384,
) -> Probe:
    """Multinomial logistic regression at its optimum: mean cross-entropy + strength / 2 |W|^2, bias free, L-BFGS.

    Equals scikit-learn's `LogisticRegression(C=1 / (n strength))` on standardised features.

    Args:
        features: [n, d].
        labels: [n] class codes.
        num_classes: C.
        strength: L2 penalty.
        start: a probe of another strength on the same features to start from.
        device: where the chunks are multiplied.
        max_iterations: of L-BFGS.
        chunk: rows at once.
    """
    mean, std = (start.mean, start.std) if start is not None else standardisation(features)
    assert mean is not None and std is not None
    codes = torch.from_numpy(np.asarray(labels, np.int64))
    dim = features.shape[1]
    theta = torch.zeros(num_classes, dim + 1, dtype=torch.float64)  # the last column is the bias
    if start is not None:
        theta = torch.cat([start.weight[0].T, start.bias[0].T], dim=1).double()
    theta.requires_grad_()
    optimiser = torch.optim.LBFGS(
        [theta],
        max_iter=max_iterations,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )
    # Standardised once where that is small, else chunk by chunk.
    standardised = _standardised(features, mean, std, device) if features.size <= 2**28 else None

    def closure() -> float:
        weight = theta.detach()
        weight32 = weight.float().to(device)
        gradient, loss = torch.zeros_like(weight), 0.0
        for first in range(0, len(codes), chunk):
            rows = slice(first, first + chunk)
            block = standardised[rows] if standardised is not None else _standardised(features[rows], mean, std, device)
            target = codes[rows].to(device)[None]
            log_p = torch.log_softmax(weight32[:, :-1] @ block.T + weight32[:, -1:], dim=0)  # [C, n]
            loss -= float(log_p.gather(0, target).double().sum())
            error = log_p.exp_().scatter_add_(0, target, torch.full_like(log_p[:1], -1))
            gradient[:, :-1] += (error @ block).double().cpu()
            gradient[:, -1] += error.double().sum(1).cpu()
        gradient /= len(codes)
        gradient[:, :-1] += strength * weight[:, :-1]
        theta.grad = gradient
        return loss / len(codes) + strength / 2 * float((weight[:, :-1] ** 2).sum())

    optimiser.step(closure)
    final = theta.detach().float().T
    return Probe(weight=final[None, :-1].contiguous(), bias=final[None, -1:].contiguous(), mean=mean, std=std)


def choose_sound_probe(
    features: NDArray,
    labels: NDArray,
    *,
    num_classes: int,
    strengths: list[float],
    fallback: float,
    val_features: NDArray,
    val_labels: NDArray,
    device: Device = "cpu",
) -> tuple[Probe, float, str]:
    """The sound probe whose strength gives the least cross-entropy on the validation tiles; ties take the stronger one.

    Returns:
        The probe, its strength, and how that was chosen.
    """
    if not len(val_labels):
        only = sound_probe(features, labels, num_classes=num_classes, strength=fallback, device=device)
        return only, fallback, "fixed: there are no labelled validation tiles"
    best: tuple[float, Probe, float] | None = None
    probe: Probe | None = None
    for strength in sorted(strengths, reverse=True):
        probe = sound_probe(features, labels, num_classes=num_classes, strength=strength, start=probe, device=device)
        loss = cross_entropy(probe, val_features, val_labels, device=device)
        if best is None or loss < best[0]:
            best = (loss, probe, strength)
    assert best is not None
    return best[1], best[2], f"least cross-entropy on {len(val_labels)} validation tiles"


def cross_entropy(
    probe: Probe, features: NDArray, labels: NDArray, *, device: Device = "cpu", chunk: int = 16384
) -> float:
    """Mean cross-entropy of the first run of a sound probe."""
    assert probe.mean is not None and probe.std is not None
    total = 0.0
    for start in range(0, len(labels), chunk):
        block = _standardised(features[start : start + chunk], probe.mean, probe.std, device)
        target = torch.from_numpy(np.asarray(labels[start : start + chunk], np.int64)).to(device)
        logits = block @ probe.weight[0].to(device) + probe.bias[0].to(device)
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    return total / len(labels)


def standardisation(features: NDArray, chunk: int = 16384) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every dimension [d], float32; a constant dimension gets 1."""
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for start in range(0, len(features), chunk):
        total += _tensor(features[start : start + chunk]).double().sum(0)
    mean = total / len(features)
    for start in range(0, len(features), chunk):
        squares += ((_tensor(features[start : start + chunk]).double() - mean) ** 2).sum(0)
    std = (squares / len(features)).sqrt()
    constant = std <= 1e-6 * mean.abs().clamp(min=1e-6)
    return mean.float(), torch.where(constant, torch.ones_like(std), std).float()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps this small only wait for each other on several threads, by orders of magnitude where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Order:
    """Endless row numbers: one random permutation after the other."""

    def __init__(self, num_rows: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.num_rows = num_rows
        self.queue = torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> Tensor:
        while len(self.queue) < count:
            self.queue = torch.cat([self.queue, torch.randperm(self.num_rows, generator=self.generator)])
        taken, self.queue = self.queue[:count], self.queue[count:]
        return taken


def _tensor(features: NDArray) -> Tensor:
    rows = np.ascontiguousarray(features, np.float32)
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())  # torch warns of memory-mapped arrays


def _standardised(features: NDArray, mean: Tensor, std: Tensor, device: Device) -> Tensor:
    return (_tensor(features).to(device) - mean.to(device)) / std.to(device)
