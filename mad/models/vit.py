"""Backbones: any timm model, wrapped by its own arguments rather than subclassed.

A backbone maps images [B, 3, H, W], normalised by its own mean and standard deviation, to embeddings [B, D]. It is created
without a classifier and with the wanted pooling, so that `model(images)` is the embedding in training, in the export and in
whatever loads the export.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from torch import nn

from mad.config import Config
from mad.config.recipe import freeze_recipe
from mad.config.training import BackboneConfig, RunConfig
from mad.files import MadError


def build_backbone(config: BackboneConfig, image_px: int, *, pretrained: bool = False) -> nn.Module:
    """Create the timm model of `config` for square images of `image_px`.

    Models with a fixed input size (ViTs) are created for `image_px` and, where they can, for other sizes too, since local
    crops are smaller. `pretrained` loads the weights that timm publishes under this name.

    Raises:
        MadError: timm knows no such model, or the model refuses the arguments, the pooling or the image size.
    """
    if not timm.is_model(config.model):
        near = difflib.get_close_matches(config.model, timm.list_models(), n=3)
        raise MadError(
            f"backbone.model: timm has no model {config.model!r}; similar names: {', '.join(near) or 'none'}"
        )
    default = timm.get_pretrained_cfg(config.model)
    fixed_size = bool(default and default.fixed_input_size)
    args: dict[str, Any] = {"num_classes": 0, **config.args}
    args["global_pool"] = "avg" if config.pooling == "avg" else "token"
    attempts = [{"img_size": image_px, "dynamic_img_size": True}, {"img_size": image_px}] if fixed_size else [{}]
    for attempt in attempts:
        try:
            model = timm.create_model(config.model, pretrained=pretrained, **{**attempt, **args})
            break
        except TypeError as error:
            if attempt is attempts[-1] or "dynamic_img_size" not in str(error):
                raise MadError(f"backbone: {config.model} refuses an argument of {attempt | args}: {error}") from None
        except (AssertionError, RuntimeError, ValueError) as error:
            raise MadError(f"backbone: {config.model} cannot be made with {attempt | args}: {error}") from None
        except OSError as error:  # what downloads raise
            raise MadError(
                f"init: timm: the weights of {config.model} cannot be had ({str(error)[:200]}); download them where there is "
                f"a network (the cache is set by HF_HOME), or set init: random"
            ) from None
    check_size(model, config, image_px)
    if config.mean and config.std:
        told: Any = model
        told.pretrained_cfg = {**told.pretrained_cfg, "mean": config.mean, "std": config.std}
    return model


def check_size(model: nn.Module, config: BackboneConfig, image_px: int) -> None:
    """One forward pass on an empty image: the embedding is a vector of `num_features`.

    Raises:
        MadError: it is not, or the model takes no images of this size.
    """
    training = model.training
    try:
        with torch.no_grad():
            shape = tuple(model.eval()(torch.zeros(1, 3, image_px, image_px)).shape)
    except (AssertionError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise MadError(
            f"backbone: {config.model} with pooling {config.pooling!r} fails at {image_px} px: {error}"
        ) from None
    finally:
        model.train(training)
    if shape != (1, embedding_dim(model)):
        raise MadError(
            f"backbone: {config.model} with pooling {config.pooling!r} gives {shape} at {image_px} px, not one vector of "
            f"{embedding_dim(model)}; pooling 'avg' suits models without a class token"
        )


def initial_backbone(config: Config, name: str) -> nn.Module:
    """The architecture of run `name`, untrained: the very weights it starts from where its `init` is `random`."""
    recipe = freeze_recipe(config, name)
    torch.manual_seed(recipe["seed"])
    return build_backbone(config.run(name).backbone, recipe["tile_px"])


def embedding_dim(model: nn.Module) -> int:
    """Dimension D of the embedding."""
    return int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]


def mean_std(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel mean and standard deviation, of intensities in [0, 1], that the model's images are normalised by."""
    cfg: Any = model.pretrained_cfg
    return tuple(cfg["mean"]), tuple(cfg["std"])


def patch_px(model: nn.Module) -> int | None:
    """Side of a patch token in pixels, or None for a model without patch tokens."""
    embed = getattr(model, "patch_embed", None)
    if embed is None or not hasattr(embed, "feat_ratio"):
        return None
    ratio = embed.feat_ratio()
    return int(ratio if isinstance(ratio, int) else ratio[0])


def local_crop_px(model: nn.Module, image_px: int) -> int:
    """Default side of local crops: 3/7 of the image (DINOv2: 98 or 96 of 224), a whole number of patches."""
    patch = patch_px(model) or 8
    return max(patch, round(image_px * 3 / 7 / patch) * patch)


def local_side(model: nn.Module, run: RunConfig, image_px: int) -> int:
    """Side of a run's local crops.

    Raises:
        MadError: the run has local crops, and the model takes no images of this size.
    """
    side = run.views.local_px or local_crop_px(model, image_px)
    if run.distill is None and run.views.local_crops:
        try:
            check_size(model, run.backbone, side)
        except MadError as error:
            raise MadError(
                f"runs.{run.name}.views: the backbone takes no local crops of {side} px; set local_px to a side that it takes, "
                f"or local_crops: 0 ({error})"
            ) from None
    return side
