"""Encoders as folders that timm, and through it transformers' TimmWrapper, load without this package.

encoder/config.json          architecture, arguments, pooling, image size, mean and standard deviation
encoder/model.safetensors    the weights, fp32
encoder/README.md            the model card
encoder/provenance.json      recipe and data that made it, SHA-256 of the weights; written last
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from mad.config import Config
from mad.config.recipe import freeze_recipe
from mad.config.training import RunConfig
from mad.files import MadError, Pathlike, atomic_path, digest, read_json, sha256_file, write_json
from mad.models.tensors import write_tensors
from mad.models.vit import embedding_dim, initial_backbone, mean_std

WEIGHTS = "model.safetensors"
OWN_LICENCE = "apache-2.0"
TIMM_WRAPPER = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"]}


def export_encoder(
    model: nn.Module,
    folder: Pathlike,
    *,
    image_px: int,
    card: str,
    provenance: dict[str, Any],
    licence: str | None = OWN_LICENCE,
) -> str:
    """Write the backbone `model` to `folder` and return the SHA-256 of its weights. Equal weights give equal bytes.

    `licence` is that of the weights that training started from; None where it is unknown.

    Raises:
        StorageError: the disk is full.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in _state(model).items()}
    write_tensors(folder / WEIGHTS, tensors)
    mean, std = mean_std(model)
    data = {"input_size": (3, image_px, image_px), "mean": mean, "std": std, "crop_pct": 1.0, "crop_mode": "center"}
    with atomic_path(folder / "config.json") as temporary:
        settings = {**TIMM_WRAPPER, "pretrained_cfg": {"license": licence or "other"}}
        save_config_for_hf(model, str(temporary), model_config=settings, data_config=data)
        written = read_json(temporary)
        # transformers passes num_classes=0 beside model_args, and timm reads it from the root: named twice, the call fails.
        written.get("model_args", {}).pop("num_classes", None)
        temporary.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    sha256 = sha256_file(folder / WEIGHTS)
    write_json(folder / "provenance.json", {**provenance, "weights_sha256": sha256})
    return sha256


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}


def load_exported(folder: Pathlike) -> nn.Module:
    """The encoder in `folder` as a timm model in evaluation mode: images [B, 3, H, W] to embeddings [B, D]."""
    folder = Path(folder)
    if not (folder / WEIGHTS).exists():
        raise MadError(f"{folder}: no {WEIGHTS}; is the run finished?")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def read_provenance(folder: Pathlike) -> dict[str, Any] | None:
    """What made the encoder in `folder`, or None unless it is there with the very weights that it names."""
    folder = Path(folder)
    if not (folder / "provenance.json").exists() or not (folder / WEIGHTS).exists():
        return None
    provenance: dict[str, Any] = read_json(folder / "provenance.json")
    return provenance if provenance.get("weights_sha256") == sha256_file(folder / WEIGHTS) else None


def export_untrained(config: Config, name: str, out: Pathlike) -> str:
    """Write the architecture of run `name` with random weights (those it starts from where `init` is `random`)."""
    recipe = freeze_recipe(config, name)
    run = config.run(name).model_copy(update={"init": "random"})
    model = initial_backbone(config, name)
    provenance = {"recipe_digest": digest(recipe), "data_digest": None, "steps": 0, "untrained": True}
    card = model_card(run, recipe, model, f"`{name}`, untrained", ["none: random weights"], {}, {}, "0 steps")
    return export_encoder(model, out, image_px=recipe["tile_px"], card=card, provenance=provenance)


def model_card(
    run: RunConfig,
    recipe: dict[str, Any],
    model: nn.Module,
    title: str,
    losses: list[str],
    samples: dict[str, int],
    tiles: dict[str, int],
    length: str,
    licence: str | None = OWN_LICENCE,
    teacher: str | None = None,
) -> str:
    """The model card of an exported encoder as Markdown with the front matter of the Hugging Face hub.

    `licence` is that of the weights that training started from, and of the frozen `teacher`'s where it has one (in words); None
    where it is unknown, or the two differ.
    """
    magnifications = recipe["magnifications"]
    scales = ", ".join(f"{value:g}x ({10 / value:g} um/px)" for value in magnifications)
    data = "none"
    if samples:
        data = "; ".join(", ".join(f"{n} {kind}" for kind, n in counts.items()) for counts in (samples, tiles))
        data = data.replace("; ", " samples; distinct tiles: ")
    mean, std = mean_std(model)
    start, terms = f"init `{run.init}`", "Licence: Apache-2.0."
    if run.init != "random":
        start += f" (licence of these weights: {licence or 'unknown'})"
        terms = "The licence of the weights that training started from governs this encoder too."
    taught = ""
    if teacher:
        taught = f"- Frozen teacher: {teacher}\n"
        terms = "The licences of the teacher and of the weights that training started from govern this encoder too."
    listed = "\n".join(f"- {loss}" for loss in losses)
    return f"""---
license: {licence or "other"}
library_name: timm
tags: [image-feature-extraction, timm, pathology, {run.method}]
---
# {title}

A tile encoder for histology, made by `mad`: {run.backbone.model}, embeddings of {embedding_dim(model)} dimensions
(pooling: {run.backbone.pooling}), {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters.

- Method: `{run.method}`, {start}, {length}, {run.batch} samples per step
{taught}- Magnifications: {scales}
- Tiles: {recipe["tile_px"]} x {recipe["tile_px"]} px at native resolution, never resized
- Training data: {data}
- Recipe: `{digest(recipe)}` (provenance.json)

Losses:

{listed}

## Use

```python
import timm, torch

encoder = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
images = ...  # [B, 3, {recipe["tile_px"]}, {recipe["tile_px"]}], RGB in [0, 1]
mean, std = torch.tensor({list(mean)}), torch.tensor({list(std)})
embeddings = encoder((images - mean[:, None, None]) / std[:, None, None])  # [B, {embedding_dim(model)}]
```

For research, not for diagnosis. {terms}
"""
