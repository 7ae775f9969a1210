"""AdamW as DINOv2 sets it up: which parameters decay, how fast each learns, and a backbone that may wait for its head.

Facts of DINOv2 (`utils/param_groups.py`, `configs/train/vit{l,g}14.yaml`): biases, norms and LayerScale do not decay; class,
register and mask tokens and position embeddings do; the patch embedding learns at .2 of the rate; layer decay is 1.0.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import group_parameters
from timm.optim._param_groups import auto_group_layers
from torch import nn

from mad.config.training import RunConfig
from mad.files import MadError
from mad.models.heads import Trainee
from mad.training.schedule import cosine, ramp, warmup_cosine

FINAL_NORM = "fc_norm"
MASK_TOKEN = "mask_token"  # timm's matchers do not know it; it enters with the patches


def layer_of(backbone: nn.Module) -> dict[str, int]:
    """Depth of each parameter of a backbone, from 0 (patches, tokens, positions), by timm's own grouping.

    Unlike DINOv2's, it counts the final norm to the last block, and register tokens to the patches. The norm that timm gives
    averaged patch tokens (`fc_norm`) is such a final norm.
    """
    matcher: Any = getattr(backbone, "group_matcher", None)
    layers: dict[str, int] = (
        group_parameters(backbone, matcher(coarse=False), reverse=True) if matcher else auto_group_layers(backbone)
    )
    last = max((layer for name, layer in layers.items() if not name.startswith(FINAL_NORM)), default=0)
    return {name: min(layer, last) for name, layer in layers.items()}


def lr_scales(student: nn.Module, run: RunConfig) -> dict[str, float]:
    """Factor on the learning rate of every parameter of a student (`backbone.…` and the rest).

    The head is the top layer: with n layers of the backbone, layer l learns at `layer_decay ** (n - l)`.

    Raises:
        MadError: a key has no effect on this backbone.
    """
    layers = {f"backbone.{name}": layer for name, layer in layer_of(student.backbone).items()}  # type: ignore[arg-type]
    top = max(layers.values()) + 1
    if run.layer_decay != 1 and top == 1:
        raise MadError(f"runs.{run.name}.layer_decay: timm knows no layers of {run.backbone.model}; take it off")
    if run.patch_embed_lr != 1 and not any("patch_embed" in name for name in layers):
        raise MadError(f"runs.{run.name}.patch_embed_lr: {run.backbone.model} has no patch embedding; take it off")
    scales = {}
    for name, _ in student.named_parameters():
        depth = 0 if MASK_TOKEN in name else layers.get(name, top)
        scale = run.layer_decay ** (top - depth) * (run.backbone_lr if of_encoder(name) else 1.0)
        scales[name] = scale * (run.patch_embed_lr if "patch_embed" in name else 1.0)
    return scales


def of_encoder(name: str) -> bool:
    """Whether the student's parameter of this name is the encoder's: its backbone, and the token that masks its patches."""
    return name.startswith("backbone.") or MASK_TOKEN in name


def parameter_groups(student: nn.Module, run: RunConfig) -> list[dict[str, Any]]:
    """Groups for the optimiser: `params`, and for `set_schedules` `decays`, `lr_scale` and `waits` (for `freeze_backbone`).

    Matrices, kernels and tokens decay; biases, norms and other vectors do not.
    """
    scales = lr_scales(student, run)
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for decays in (True, False):
        for name, parameter in student.named_parameters():
            if (parameter.ndim >= 2) == decays:
                waits = run.freeze_backbone > 0 and of_encoder(name)
                groups.setdefault((decays, scales[name], waits), []).append(parameter)
    return [
        {"params": params, "decays": decays, "lr_scale": scale, "waits": waits}
        for (decays, scale, waits), params in groups.items()
    ]


def build_optimiser(student: nn.Module, run: RunConfig) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; `set_schedules` gives each group its rate and decay before every step."""
    return torch.optim.AdamW(parameter_groups(student, run), lr=run.lr, fused=True)


def set_schedules(optimiser: torch.optim.Optimizer, run: RunConfig, step: int) -> float:
    """Put the learning rates and weight decays of `step` into the optimiser; returns the head's learning rate.

    A backbone that has waited for its head has a warm-up of its own, since its moments start at zero.
    """
    lr = warmup_cosine(step, run.steps, run.warmup, run.lr, run.min_lr)
    decay = cosine(step, run.steps, run.weight_decay, run.weight_decay_end)
    rise = ramp(step - run.freeze_backbone, run.warmup)
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_scale"] * (rise if group["waits"] else 1.0)
        group["weight_decay"] = decay if group["decays"] else 0.0
    return lr


def describe_rates(optimiser: torch.optim.Optimizer, run: RunConfig) -> str:
    """The effective peak learning rates in words, for the first lines of a run's log."""
    scales = sorted({group["lr_scale"] for group in optimiser.param_groups})
    text = f"peak lr {run.lr:g}"
    if scales != [1.0]:
        text += f" (head), {run.lr * scales[0]:.3g} to {run.lr * scales[-1]:.3g} by layer"
    return text + (f", backbone frozen for {run.freeze_backbone} steps" if run.freeze_backbone else "")


class BackboneFreeze:
    """Holds the backbone still for the first `freeze_backbone` steps: no gradients, no dropped paths, no running statistics."""

    def __init__(self, student: Trainee, steps: int) -> None:
        self._backbone, self._steps = student.backbone, steps
        self._trained = [p for name, p in student.named_parameters() if of_encoder(name) and p.requires_grad]
        self._frozen = False

    def apply(self, step: int) -> bool:
        """Put the backbone into the state that `step` asks for; True where its gradients are switched on or off."""
        frozen = step < self._steps
        if self._steps:
            self._backbone.train(not frozen)
        changed, self._frozen = frozen != self._frozen, frozen
        if changed:
            for parameter in self._trained:
                parameter.requires_grad_(not frozen)
        return changed
