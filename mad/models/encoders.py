"""Encoders to be compared: our runs, untrained twins, colour statistics, published ones by name, and any timm model.

An encoder maps uint8 RGB tiles [n, h, w, 3] to float32 embeddings [n, d] and tells with `audit` all that decides them:
weights, pooling, normalisation, and the um/px that the network saw after any resizing.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import timm
import timm.layers
import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from torch.nn import functional as F

from mad.config import Config
from mad.config.encoders import EncoderConfig
from mad.config.weights import WEIGHT_FILES, weights_file
from mad.files import MadError, sha256_file
from mad.models.export import WEIGHTS, load_exported
from mad.models.hub import MissingWeightsError, check_local, config_file, hub_weights, local_weights
from mad.models.own_encoder import OwnEncoder
from mad.models.precision import choose_dtype
from mad.models.registry import PUBLISHED, Published
from mad.models.vit import initial_backbone, mean_std, patch_px
from mad.models.weights import load_weights
from mad.progress import log

LAYER_KEYS = {"mlp_layer", "act_layer", "norm_layer"}


def weights_sha256(model: nn.Module) -> str:
    """Digest of all parameters and buffers, in the order of their names."""
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        hasher.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


class Encoder(Protocol):
    """What every encoder offers."""

    @property
    def audit(self) -> dict[str, Any]:
        """Spec, weights digest, pooling, transform and dimension, JSON-able."""
        ...

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        """uint8 RGB [n, h, w, 3] -> float32 [n, d]."""
        ...


@dataclass(frozen=True, eq=False)
class ColourEncoder:
    """The honesty row: mean and standard deviation of each channel, in [0, 1]; d = 6."""

    audit: dict[str, Any] = field(
        default_factory=lambda: {"spec": "colour", "dim": 6, "pooling": "channel mean and std"}
    )

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        return np.stack([np.concatenate(cv2.meanStdDev(tile)).ravel() for tile in tiles]).astype(np.float32) / 255


class TimmEncoder:
    """A timm model with its own normalisation, on one device.

    Tiles whose side the model does not take are resized (bicubic, antialiased); `audit["resize"]` then says from and to,
    since that changes the scale that the network sees.
    """

    def __init__(
        self, model: nn.Module, entry: EncoderConfig, tile_px: int, published: Published | None = None
    ) -> None:
        """`published` replaces the model's own normalisation, and its pooling where the entry leaves it to the model.

        Raises:
            MadError: the model gives tokens or maps instead of one vector per tile.
        """
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device)
        self._dtype = choose_dtype(entry.precision, self._device)
        self._pooling = published.pooling if published and entry.pooling == "auto" else entry.pooling
        mean, std = published.mean_std if published else mean_std(model)
        self._mean = torch.tensor(mean, device=self._device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(std, device=self._device).view(1, 3, 1, 1) * 255
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        self._side = size[0] if size else tile_px
        probe = self(np.zeros((1, tile_px, tile_px, 3), np.uint8))
        if probe.ndim != 2:
            raise MadError(
                f"encoders: {entry.name!r} ({entry.spec}) gives an array {probe.shape[1:]} per tile, not a vector: its tokens or "
                "maps are not pooled; set the entry's `pooling` to cls, avg or cls+avg"
            )
        cfg: Any = model.pretrained_cfg
        self.audit: dict[str, Any] = {
            "spec": entry.spec,
            "architecture": str(cfg.get("architecture", type(model).__name__)),
            "weights_sha256": weights_sha256(model),
            "pooling": self._pooling if self._pooling != "auto" else str(getattr(model, "global_pool", "model's own")),
            "mean": list(mean),
            "std": list(std),
            "dim": int(probe.shape[1]),
            "resize": None if self._side == tile_px else [tile_px, self._side],
            "mpp_factor": tile_px / self._side,
            "dtype": str(self._dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        if args := {**(published.args if published else {}), **entry.args}:
            self.audit["args"] = args  # such as act_layer and num_heads, of which weights keep no trace
        if unseen := self._side % (patch_px(model) or 1):
            self.audit["unseen_px"] = unseen
            log(
                f"WARNING: {entry.name}: {self._side} px are no whole number of patches of {patch_px(model)} px: the last {unseen} "
                "columns and rows of every tile are not seen"
            )
        if published:
            self.audit |= {"published_transform": published.transform, "licence": published.licence}

    @property
    def model(self) -> nn.Module:
        """The network, in evaluation mode."""
        return self._model

    @torch.inference_mode()
    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        return self.embed(torch.from_numpy(tiles)).cpu().numpy()

    def embed(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 RGB [n, h, w, 3] -> float32 [n, d] on the encoder's device, with gradients where autograd is on."""
        images = tiles.to(self._device).permute(0, 3, 1, 2).float()
        if images.shape[-1] != self._side:
            images = F.interpolate(images, size=(self._side, self._side), mode="bicubic", antialias=True).clamp(0, 255)
        images = (images - self._mean) / self._std
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            vectors = self._embed(images)
        return vectors.float()

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        if self._pooling == "auto":
            return self._model(images)
        model: Any = self._model
        tokens = model.forward_features(images)
        if tokens.ndim != 3:
            raise MadError(
                f"pooling {self._pooling!r} needs a transformer's tokens; this model gives maps: use pooling auto"
            )
        patches = tokens[:, getattr(model, "num_prefix_tokens", 1) :].mean(dim=1)
        parts = {"cls": [tokens[:, 0]], "avg": [patches], "cls+avg": [tokens[:, 0], patches]}[self._pooling]
        return torch.cat(parts, dim=1)


def load_encoder(config: Config, name: str) -> Encoder:
    """Load the encoder that `encoders:` calls `name`.

    Raises:
        MissingWeightsError: published weights that cannot be had here, gated ones for one.
        MadError: a run's weights are missing, or the spec is of no known form; the text says what would mend it.
    """
    entry = config.encoder(name)
    kind, _, target = entry.spec.partition(":")
    tile_px = config.tile.tile_px
    if entry.spec == "colour":
        return ColourEncoder()
    if kind == "run":
        return _load_run(Path(config.results) / "train" / target / "encoder", entry, tile_px)
    if kind == "random":
        return TimmEncoder(initial_backbone(config, target), entry, tile_px)
    if kind == "local-dir":
        return _load_local(Path(target), entry, tile_px)
    if kind == "python":
        return OwnEncoder(target, entry, tile_px)
    if kind == "published":
        return _load_published(target, entry, tile_px)
    if kind == "adapter":
        raise MadError(
            f"encoders: {name!r} ({entry.spec}) takes the embeddings of another encoder and each tile's magnification, no images; "
            "run `mad embed`, then `mad evaluate` on the cohort"
        )
    if kind in ("timm", "hf-hub", "hf_hub"):
        return _timm_encoder(target if kind == "timm" else f"hf-hub:{target}", entry, tile_px)
    raise MadError(
        f"encoders: {name!r} has spec {entry.spec!r}; known forms are run:NAME, random:NAME, colour, published:NAME, timm:MODEL, "
        "hf-hub:OWNER/MODEL, local-dir:FOLDER, python:MODULE:FACTORY and adapter:NAME"
    )


def layer_classes(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `timm.create_model` with the classes that `mlp_layer`, `act_layer` and `norm_layer` name.

    Raises:
        MadError: neither timm.layers nor torch.nn has such a class.
    """
    found = dict(args)
    for key in LAYER_KEYS & args.keys():
        if isinstance(name := args[key], str):
            found[key] = getattr(timm.layers, name, None) or getattr(nn, name, None)
            if found[key] is None:
                raise MadError(f"encoders: {key}: neither timm.layers nor torch.nn has a class {name!r}")
    return found


def build_published(published: Published, tile_px: int, args: dict[str, Any] | None = None) -> nn.Module:
    """The architecture of a published encoder with random weights, made for images of `tile_px`."""
    given = {"num_classes": 0, "global_pool": "token", "img_size": tile_px, **published.args, **(args or {})}
    return timm.create_model(published.model, pretrained=False, **layer_classes(given))


def _load_published(name: str, entry: EncoderConfig, tile_px: int) -> TimmEncoder:
    if name not in PUBLISHED:
        near = ", ".join(difflib.get_close_matches(name, PUBLISHED, n=2)) or ", ".join(PUBLISHED)
        raise MadError(f"encoders: {entry.name!r}: no published encoder is called {name!r}; did you mean {near}?")
    published, key = PUBLISHED[name], f"encoders.{entry.name}"
    if entry.weights:
        source = local_weights(entry.weights, f"{key}.weights")
    else:
        instead = f"download the weights where that is possible and set {key}.weights to their file"
        source = hub_weights(published.hub, f"{key}: {published.title}", instead)
    model = build_published(published, tile_px, entry.args)
    try:
        load_weights(model, source.path)
    except MadError as error:  # it advises on the backbone of a run, which a published encoder has not
        fault = re.split(r"[.;] [^.;]*\bbackbone\.(?:model|args)", str(error))[0]
        raise MadError(
            f"{key}.weights: {fault.replace('the backbone of this run', published.title)}. {published.title} takes the file of "
            f"https://huggingface.co/{published.hub}, and no args that change its shape"
        ) from None
    return TimmEncoder(model, entry, tile_px, published)


def _timm_encoder(source: str, entry: EncoderConfig, tile_px: int) -> TimmEncoder:
    encoder = TimmEncoder(_load_timm(source, entry, tile_px), entry, tile_px)
    if config := config_file(source, entry.args.get("cache_dir")):
        encoder.audit["config_sha256"] = sha256_file(config)
    return encoder


def _load_timm(source: str, entry: EncoderConfig, tile_px: int) -> nn.Module:
    """A timm model with its weights, made for tiles of `tile_px` where its input size is a choice: the scale stays theirs."""
    args = {"num_classes": 0, **layer_classes(entry.args)}
    try:
        try:
            return timm.create_model(source, pretrained=True, **{"img_size": tile_px, **args})
        except TypeError:  # a model without an input size of its own
            return timm.create_model(source, pretrained=True, **args)
    except (HfHubHTTPError, OSError) as error:
        check_local(error, f"encoders: {entry.name!r} ({entry.spec})")
        raise MissingWeightsError(
            f"encoders: {entry.name!r} ({entry.spec}) cannot be had: {type(error).__name__}: {str(error)[:300]}. For a gated model "
            "accept its licence on its Hugging Face page and set HF_TOKEN; offline, download it and use spec local-dir:FOLDER"
        ) from error
    except Exception as error:
        raise MadError(
            f"encoders: {entry.name!r} ({entry.spec}) cannot be loaded: {type(error).__name__}: {str(error)[:300]}"
        ) from error


def _load_run(folder: Path, entry: EncoderConfig, tile_px: int) -> TimmEncoder:
    if not (folder / WEIGHTS).exists():
        raise MadError(f"encoders: {entry.name!r}: {folder} holds no {WEIGHTS}; train run {folder.parent.name!r} first")
    return TimmEncoder(load_exported(folder), entry, tile_px)


def _load_local(folder: Path, entry: EncoderConfig, tile_px: int) -> TimmEncoder:
    try:
        whole = (folder / "config.json").exists() and weights_file(str(folder)).is_file()
    except PermissionError as error:
        raise MadError(f"encoders: {entry.name!r}: {folder}: {error.strerror}; mend its permissions") from None
    if not whole:
        raise MadError(
            f"encoders: {entry.name!r}: {folder} holds no config.json of timm beside {' or '.join(WEIGHT_FILES)}; name the "
            "folder of a model as timm or `mad` exported it, or as the Hugging Face hub has it"
        )
    return _timm_encoder(f"local-dir:{folder}", entry, tile_px)
