"""DINOv2's published training configurations as entries of `runs:` (`preset: dinov2_vitg14`).

Numbers are those of github.com/facebookresearch/dinov2: [d] `dinov2/configs/ssl_default_config.yaml`, [l]
`configs/train/vitl16_short.yaml`, which is [d] throughout, [g] `configs/train/vitg14.yaml` over [d]; [r] its README's number of
GPUs; [p] the paper (Oquab et al. 2023, table 16). They write lengths in epochs of 1250 steps and the learning rate for a batch
of 1024, times sqrt(batch / 1024). A preset is written out before an entry is checked: what the entry says itself wins, an
entry that changes `batch` alone gets the learning rate of its batch, and nothing else follows `batch` or `steps`.

Not a number of theirs: `koleo` .2. They add .1 times the loss of each of two global crops, we take the mean of the crops. Nor is
`clip` 3.0 quite theirs: they clip the gradients of the backbone and of each head apart, here one norm is that of all. And no key
tells KoLeo's least distance (mad.training.objective) and the spread of a head's first weights (mad.models.heads).
What stands nowhere here is the default, or not theirs to say: local crops are 3/7 of the tile (96 or 98 of 224 px, as theirs),
colour augmentation is theirs already, and `method` says which views there are.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from mad.config.base import merge

PresetName = Literal["dinov2_vitl16", "dinov2_vitg14"]
BATCH = TypeAdapter(Annotated[int, Field(ge=1)])
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # data/transforms.py; timm has .5 for this ViT
EPOCH = 1250  # steps [d]
LR_BATCH = 1024  # for which `base_lr` is meant [d]

VITL16: dict[str, Any] = {  # all [d] unless said
    "backbone": {"model": "vit_large_patch16_224", "args": {"init_values": 1e-5}, "pooling": "cls"} | IMAGENET,
    "steps": 100 * EPOCH,
    "batch": 2048,  # [d] 64 per GPU, [r] 32 GPUs
    "base_lr": 4e-3,
    "warmup": 10 * EPOCH,
    "min_lr": 1e-6,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "layer_decay": 0.9,
    "patch_embed_lr": 0.2,
    "clip": 3.0,
    "ema": 0.992,
    "ema_end": 1.0,
    "student_temp": 0.1,  # DINOLoss
    "teacher_temp": 0.07,
    "teacher_temp_start": 0.04,
    "teacher_temp_warmup": 30 * EPOCH,
    "head": {"hidden": 2048, "bottleneck": 256, "prototypes": 65536},
    "freeze_last_layer": EPOCH,
    "centring": "ema",
    "centre_momentum": 0.9,  # DINOLoss
    "ibot": {"weight": 1.0, "head": "shared", "probability": 0.5, "ratio": [0.1, 0.5]},
    "drop_path": 0.3,
    "spread": "koleo",
    "koleo": 0.2,
    "views": {"global_crops": 2, "local_crops": 8, "global_scale": [0.32, 1.0], "local_scale": [0.05, 0.32]},
}
VITG14 = VITL16 | {  # all [g] unless said
    "backbone": {"model": "vit_giant_patch14_dinov2", "pooling": "cls"},
    "steps": 500 * EPOCH,
    "batch": 3072,  # [p]
    "base_lr": 2e-4,  # 3.5e-4 at this batch, as in [p]
    "warmup": 80 * EPOCH,
    "weight_decay_end": 0.2,
    "layer_decay": 1.0,
    "ema": 0.994,
    "head": {"hidden": 2048, "bottleneck": 384, "prototypes": 131072},
    "centring": "sinkhorn",
    "ibot": VITL16["ibot"]
    | {"head": "separate", "hidden": 2048, "bottleneck": 256, "prototypes": 131072},  # widths [d]
    "drop_path": 0.4,
}
HEAD_SIZES = ("hidden", "bottleneck", "prototypes")
PRESETS: dict[str, dict[str, Any]] = {"dinov2_vitl16": VITL16, "dinov2_vitg14": VITG14}


def resolve_preset(entry: dict[str, Any]) -> dict[str, Any]:
    """An unchecked entry of `runs:` with the numbers of its `preset` under its own; one without a known preset as it is.

    Sections are merged key by key; an entry that names a backbone's `model` gets nothing of the preset's backbone, one that wants
    a shared head for patches no sizes of a separate one.
    """
    preset = PRESETS.get(str(entry.get("preset")))
    if preset is None:
        return entry
    numbers = {key: value for key, value in preset.items() if key != "base_lr"}
    backbone, batch = entry.get("backbone"), entry.get("batch", preset["batch"])
    if isinstance(backbone, dict) and "model" in backbone:
        del numbers["backbone"]
    ibot = entry.get("ibot")
    if isinstance(ibot, dict) and ibot.get("head") == "shared":
        numbers["ibot"] = {key: value for key, value in numbers["ibot"].items() if key not in HEAD_SIZES}
    with suppress(ValidationError):  # what is no batch is refused by the checks that follow
        numbers["lr"] = preset["base_lr"] * math.sqrt(BATCH.validate_python(batch) / LR_BATCH)
    return merge(numbers, entry)
