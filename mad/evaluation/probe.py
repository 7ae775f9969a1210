"""Linear probes on frozen embeddings.

`paper_probe` is the paper's (MAD, Downstream Tasks): one linear layer, cross-entropy, Adam at 1e-4, batches of 64. It ranks
embeddings by their norm too, since its learning rate is fixed. `sound_probe` therefore stands beside it: embeddings
standardised by the training tiles, the L2-penalised optimum over the full batch, its strength chosen on validation patients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.data import Embedded
from mad.evaluation.lbfgs import Lbfgs
from mad.evaluation.standardised import StandardisedRows, standardisation, standardised
from mad.metrics.rows import Features, as_tensor, refuse_not_finite

Device = str | torch.device
AHEAD = 64  # steps whose batches are drawn at once


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
    converged: bool = True
    """Whether a sound probe came to its optimum in the passes that it was granted."""

    def predict(self, features: Features, *, device: Device = "cpu", chunk: int = 16384) -> NDArray[np.int64]:
        """Class codes [r, n] of features [n, d].

        Raises:
            ValueError: a row is not finite.
        """
        weight, bias = self.weight.to(device), self.bias.to(device)
        predicted = np.empty((len(weight), len(features)), np.int64)
        for start in range(0, len(features), chunk):
            rows = as_tensor(features[start : start + chunk]).to(device)
            if self.mean is not None and self.std is not None:
                rows = (rows - self.mean.to(device)) / self.std.to(device)
            logits = rows.to(weight.dtype) @ weight + bias
            if not torch.isfinite(logits).all():
                refuse_not_finite(features)
            predicted[:, start : start + chunk] = logits.argmax(-1).cpu().numpy()
        return predicted


def paper_probe(
    features: Features,
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
        ValueError: no training tile, or a row is not finite.
    """
    if not len(labels):
        raise ValueError("a probe needs training tiles")
    refuse_not_finite(features)
    codes = torch.from_numpy(np.asarray(labels, np.int64))
    orders = [_Order(len(codes), seed) for seed in seeds]
    bound = features.shape[1] ** -0.5  # the initialisation of torch.nn.Linear
    weight, bias = (
        torch.stack(
            [(torch.rand(num_classes, width, generator=order.generator) * 2 - 1) * bound for order in orders]
        ).to(device)
        for width in (features.shape[1], 1)
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
            rows = as_tensor(features[index.numpy()]).to(device).view(len(seeds), batch, -1)
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
    features: Features,
    labels: NDArray,
    *,
    num_classes: int,
    strength: float,
    start: Probe | None = None,
    **options: Any,
) -> Probe:
    """Multinomial logistic regression at its optimum: mean cross-entropy + strength / 2 |W|^2, bias free.

    Equals scikit-learn's `LogisticRegression(C=1 / (n strength))` on standardised features (of two classes, where scikit-learn
    penalises one vector instead of two, C=2 / (n strength)). Arguments as `sound_probes`.
    """
    return sound_probes(features, labels, num_classes=num_classes, strengths=[strength], start=start, **options)[0]


def sound_probes(
    features: Features,
    labels: NDArray,
    *,
    num_classes: int,
    strengths: list[float],
    start: Probe | None = None,
    device: Device = "cpu",
    max_iterations: int = 1000,
    chunk: int = 4096,
) -> list[Probe]:
    """The sound probe of every strength. All are minimised side by side by L-BFGS and share the passes over the rows.

    The variables are the weights along the principal axes of (a sample of) the rows, each scaled by the root of the curvature
    that it has where all classes are equally likely: the same optimum, in fewer passes.

    Args:
        features: [n, d].
        labels: [n] class codes.
        num_classes: C.
        strengths: L2 penalties.
        start: a probe on the same features to start from.
        device: where the chunks are multiplied.
        max_iterations: passes over the rows at most; before, a probe is done when no entry of its gradient exceeds 1e-6 or its
            loss falls by less than 1e-9 of itself.
        chunk: rows at once.

    Raises:
        ValueError: no training tile, or a row is not finite.
    """
    if not len(labels):
        raise ValueError("a probe needs training tiles")
    mean, std = standardisation(features) if start is None else (start.mean, start.std)
    assert mean is not None and std is not None
    rows = StandardisedRows(features, labels, mean, std, device, chunk)
    variances, axes = rows.principal_axes()
    with_bias = torch.cat([variances, torch.ones(1, dtype=torch.float64)]) / num_classes
    scales = [(with_bias + strength) ** -0.5 for strength in strengths]
    theta = torch.zeros(num_classes, len(mean) + 1, dtype=torch.float64)  # the last column is the bias
    if start is not None:
        theta = torch.cat([start.weight[0].T.double() @ axes, start.bias[0].T.double()], dim=1)
    runs = [Lbfgs((theta / scale).flatten()) for scale in scales]

    def unscaled(point: Tensor, scale: Tensor) -> Tensor:
        """Weights and bias [C, d + 1] of the standardised features."""
        along = point.view(num_classes, -1) * scale
        return torch.cat([along[:, :-1] @ axes.T, along[:, -1:]], dim=1)

    for _ in range(max_iterations):
        going = [place for place, run in enumerate(runs) if not run.done]
        if not going:
            break
        weights = torch.stack([unscaled(runs[place].point, scales[place]) for place in going])
        for place, weight, loss, gradient in zip(going, weights, *rows.loss(weights), strict=True):
            gradient[:, :-1] += strengths[place] * weight[:, :-1]
            along = torch.cat([gradient[:, :-1] @ axes, gradient[:, -1:]], dim=1) * scales[place]
            value = float(loss) + strengths[place] / 2 * float((weight[:, :-1] ** 2).sum())
            runs[place].tell(value, along.flatten(), converged=float(gradient.abs().max()) <= 1e-6)
    found = []
    for run, scale in zip(runs, scales, strict=True):
        theta = unscaled(run.best, scale).float().T
        weight, bias = theta[None, :-1].contiguous(), theta[None, -1:].contiguous()
        found.append(Probe(weight=weight, bias=bias, mean=mean, std=std, converged=run.done))
    return found


def choose_sound_probe(
    features: Features,
    labels: NDArray,
    *,
    num_classes: int,
    strengths: list[float],
    fallback: float,
    val_features: Features,
    val_labels: NDArray,
    device: Device = "cpu",
) -> tuple[Probe, float, str]:
    """The sound probe whose strength gives the least cross-entropy on the validation tiles; ties take the stronger one.

    Validation tiles of a class that training lacks are left out: how improbable a probe makes what it has never seen tells
    nothing of its strength.

    Returns:
        The probe, its strength, and how that was chosen.

    Raises:
        ValueError: no training tile, or a row is not finite.
    """
    known = np.isin(val_labels, labels)
    if not known.all():
        val_features, val_labels = val_features[known], val_labels[known]
    if not len(val_labels):
        only = sound_probe(features, labels, num_classes=num_classes, strength=fallback, device=device)
        return only, fallback, "fixed: there are no labelled validation tiles of the classes trained on"
    refuse_not_finite(val_features)
    order = sorted(strengths, reverse=True)
    probes = sound_probes(features, labels, num_classes=num_classes, strengths=order, device=device)
    losses = [cross_entropy(probe, val_features, val_labels, device=device) for probe in probes]
    best = int(np.argmin(losses))
    chosen = f"least cross-entropy on {len(val_labels)} validation tiles"
    if short := [f"{strength:g}" for strength, probe in zip(order, probes, strict=True) if not probe.converged]:
        chosen += f"; stopped before their optimum: {', '.join(short)}"
    return probes[best], order[best], chosen


def cohort_probe(
    data: Embedded, train: NDArray[np.int64], val: NDArray[np.int64], config: EvaluationConfig, device: Device = "cpu"
) -> tuple[Probe, float, str]:
    """`choose_sound_probe` of the classes of a cohort, from rows `train`, chosen on rows `val`."""
    return choose_sound_probe(
        data.part(train), data.codes[train], num_classes=len(data.classes), strengths=config.sound_strengths,
        fallback=config.sound_strength, val_features=data.part(val), val_labels=data.codes[val], device=device,
    )  # fmt: skip


def cross_entropy(
    probe: Probe, features: Features, labels: NDArray, *, device: Device = "cpu", chunk: int = 16384
) -> float:
    """Mean cross-entropy of the first run of a sound probe."""
    assert probe.mean is not None and probe.std is not None
    total = 0.0
    for start in range(0, len(labels), chunk):
        block = standardised(features[start : start + chunk], probe.mean, probe.std, device)
        target = torch.from_numpy(np.asarray(labels[start : start + chunk], np.int64)).to(device)
        logits = block @ probe.weight[0].to(device) + probe.bias[0].to(device)
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    return total / len(labels)


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
