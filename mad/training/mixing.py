"""The training loop of a region mixer: regions in, masks, losses, checks, optimiser, records. Embeddings alone; minutes on a CPU.

Which regions a step sees and what of them is hidden are functions of (seed, n), and a checkpoint holds weights and optimiser
exactly: with the same number of threads a resumed run on a CPU ends bit-equal to one that was never stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mad.config.regions import MaskMix, MixerConfig
from mad.files import MadError
from mad.metrics.rankme import rankme
from mad.models.mixer import Mixer, RegionBatch
from mad.progress import Steps
from mad.training import checkpoint
from mad.training.mem import cosine_distance, draw_mask, info_nce, mem_loss
from mad.training.order import SampleOrder
from mad.training.process import Interrupted, Stop
from mad.training.records import METRICS, append_lines, trim_metrics
from mad.training.region_data import Places, read_batch
from mad.training.schedule import warmup_cosine
from mad.training.seeds import generators

MASK_STREAM, HEALTH_STREAM = (
    16,
    24,
)  # independent random streams of a seed; the n-th view of a region has MASK_STREAM + n
HEALTH_REGIONS = 512  # that a check sees at most
FORWARD = 32  # regions of one forward pass without gradients
FEWEST = 2  # tiles of a region from which one can be hidden


def train_mixer(
    mixer: Mixer,
    entry: MixerConfig,
    seed: int,
    train: Places,
    held_out: Places,
    folder: Path,
    identity: dict[str, Any],
) -> float:
    """Train from the last checkpoint in `folder` to the last step, writing metrics.jsonl and checkpoints/; returns the seconds.

    Args:
        mixer: on its device, with random weights and the train split's mean and std.
        entry: its configuration.
        seed: of order and masks.
        train: regions of the train split, of two tiles or more.
        held_out: regions of the validation patients, likewise; may be empty.
        folder: of the run.
        identity: what a checkpoint must be of.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came; a checkpoint was saved.
        MadError: a loss is not finite.
    """
    device, checkpoints = mixer.mean.device, folder / "checkpoints"
    optimiser = build_optimiser(mixer, entry)
    saved, step, earlier = checkpoint.load_latest(checkpoints, identity), 0, 0.0
    checkpoint.set_aside(checkpoints, saved)
    if saved:
        mixer.load_state_dict(saved["mixer"])
        optimiser.load_state_dict(saved["optimiser"])
        step, earlier = int(saved["step"]), float(saved["seconds"])
    trim_metrics(folder / METRICS, step)
    batch = min(entry.batch, len(train))
    order = SampleOrder({"region": len(train)}, {"region": 1.0}, batch, max(entry.steps, 1), "alternate", seed)
    progress, stop, started = Steps(entry.name, entry.steps, step, entry.runtime.log_seconds), Stop(), time.monotonic()
    seconds = earlier
    try:
        while step < entry.steps:
            begin = time.monotonic()
            numbers = range(step * batch, (step + 1) * batch)
            places = [train[order[n][1]] for n in numbers]
            mixer.train()
            losses = step_losses(mixer, entry, read_batch(places).to(device), places, seed, numbers)
            check_finite(losses["loss"], entry.name, step, places)
            lr = warmup_cosine(step, entry.steps, entry.warmup, entry.lr, entry.min_lr)
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.zero_grad(set_to_none=True)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(mixer.parameters(), entry.clip)
            check_finite(norm, entry.name, step, places)
            optimiser.step()
            record: dict[str, Any] = {"step": step, **{name: float(loss.detach()) for name, loss in losses.items()}}
            record |= {"lr": lr, "grad_norm": float(norm), "regions_per_s": batch / (time.monotonic() - begin)}
            step += 1
            done, stopping = step == entry.steps, stop.asked
            if done or step % entry.health_every == 0:
                record["health"] = check_health(mixer, entry, train, held_out, seed)
            append_lines(folder / METRICS, [json.dumps(record)])
            progress.advance(lambda record=record: _facts(record), force=done)  # type: ignore[misc]
            seconds = earlier + time.monotonic() - started
            if done or stopping or step % entry.runtime.checkpoint_steps == 0:
                state = {"identity": identity, "mixer": mixer.state_dict(), "optimiser": optimiser.state_dict()}
                checkpoint.save(checkpoints, step, {**state, "seconds": seconds})
            if stopping and not done:
                raise Interrupted(f"{entry.name}: stopped by {stop.by} at step {step}; the next start resumes there")
    finally:
        stop.release()
        progress.close()
    return seconds


def _facts(record: dict[str, Any]) -> str:
    held = record.get("health", {}).get("held_out", {})
    told = ", ".join(f"{kind} {figures['loss']:.3f}" for kind, figures in held.items())
    return f"loss {record['loss']:.3f}, {record['regions_per_s']:.0f} regions/s" + (
        f", held out: {told}" if told else ""
    )


def build_optimiser(mixer: Mixer, entry: MixerConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, biases, norms and single tokens do not."""
    groups = [
        {"params": [p for p in mixer.parameters() if (p.ndim >= 2) == decays], "weight_decay": decay}
        for decays, decay in ((True, entry.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=entry.lr)


def step_losses(
    mixer: Mixer, entry: MixerConfig, batch: RegionBatch, places: Places, seed: int, numbers: Sequence[int]
) -> dict[str, Tensor]:
    """`loss` and its parts: `mem`, the mean over the views, and with a weight on it `contrastive`.

    Args:
        batch: the regions `places`, which are samples `numbers` of the run.
    """
    vectors, parts = [], []
    for view in range(2 if entry.contrastive else 1):
        rngs = generators(seed, MASK_STREAM + view, numbers)
        hidden = draw_masks(places, entry.masks, entry.mask_ratio, rngs).to(batch.present.device)
        vector, predicted, asked = mixer.reconstruct(batch, hidden)
        parts.append(mem_loss(predicted, mixer.standardise(asked)[asked.present], asked.scale[asked.present]))
        vectors.append(vector)
    losses = {"mem": torch.stack(parts).mean()}
    if not entry.contrastive:
        return {"loss": losses["mem"], **losses}
    losses["contrastive"] = info_nce(vectors[0], vectors[1], entry.temperature)
    return {"loss": losses["mem"] + entry.contrastive * losses["contrastive"], **losses}


def draw_masks(places: Places, masks: MaskMix, ratio: float, rngs: Sequence[np.random.Generator]) -> Tensor:
    """What of each region is hidden [B, N] bool, False on padding."""
    drawn = []
    for (slide, number), rng in zip(places, rngs, strict=True):
        tiles = slide.tiles(number)
        drawn.append(torch.from_numpy(draw_mask(slide.scale[tiles], slide.place[tiles], masks, ratio, rng)[1]))
    return nn.utils.rnn.pad_sequence(drawn, batch_first=True)


def check_finite(value: Tensor, name: str, step: int, places: Places) -> None:
    """Fail before the weights change.

    Raises:
        MadError: loss or gradient is NaN or infinite; names the step and the slides.
    """
    if not bool(torch.isfinite(value)):
        slides = ", ".join(sorted({slide.slide_id for slide, _ in places})[:10])
        raise MadError(
            f"mixers.{name}: loss or gradient is not finite at step {step}, before the weights were changed; slides: {slides}. "
            "Lower lr, move this mixer's checkpoints/ away and run again: it starts anew"
        )


@torch.no_grad()
def check_health(mixer: Mixer, entry: MixerConfig, train: Places, held_out: Places, seed: int) -> dict[str, Any]:
    """Figures on masks that stay the same from check to check.

    Returns:
        `held_out`: for each way of masking that has a share, on the regions of the validation patients, `loss` (MEM) and
        `reference`, that of the mean of the seen tiles of a region as the prediction; empty without such regions. `rankme` of
        the vectors of whole regions, train split and held out, of `regions` (RankMe's upper bound, beside the width).
    """
    mixer.eval()
    held, figures = list(held_out[:HEALTH_REGIONS]), {}
    for kind, share in entry.masks.shares().items():
        if held and share:
            figures[kind] = _held_out(
                mixer, entry, held, MaskMix(**{"random": 0, "tube": 0, "magnification": 0, kind: 1}), seed
            )
    seen = [*held, *train][:HEALTH_REGIONS]
    vectors = [mixer(read_batch(part).to(mixer.mean.device))[0].float().cpu() for part in split(seen)]
    return {"held_out": figures, "rankme": rankme(torch.cat(vectors).numpy()), "regions": len(seen)}


def _held_out(mixer: Mixer, entry: MixerConfig, held: Places, masks: MaskMix, seed: int) -> dict[str, float]:
    """MEM over all held-out regions at once, of the mixer and of the reference."""
    sums = torch.zeros(2, len(mixer.mean), dtype=torch.float64, device=mixer.mean.device)
    counts = torch.zeros_like(sums[0])
    for start, part in zip(range(0, len(held), FORWARD), split(held), strict=True):
        batch = read_batch(part).to(mixer.mean.device)
        rngs = generators(seed, HEALTH_STREAM, range(start, start + len(part)))
        hidden = draw_masks(part, masks, entry.mask_ratio, rngs).to(batch.present.device)
        _, predicted, asked = mixer.reconstruct(batch, hidden)
        seen = (batch.present & ~hidden)[..., None]
        means = (mixer.standardise(batch) * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        reference = means.expand(-1, asked.present.shape[1], -1)[asked.present]
        target, scale = mixer.standardise(asked)[asked.present], asked.scale[asked.present]
        for total, prediction in zip(sums, (predicted, reference), strict=True):
            total.index_add_(0, scale, cosine_distance(prediction, target).double())
        counts += scale.bincount(minlength=len(counts))
    loss, reference_loss = (sums[:, counts > 0] / counts[counts > 0]).mean(1).tolist()
    return {"loss": loss, "reference": reference_loss}


def split(places: Places) -> list[Places]:
    """The regions in groups of one forward pass."""
    return [places[start : start + FORWARD] for start in range(0, len(places), FORWARD)]
