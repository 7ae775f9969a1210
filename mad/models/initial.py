"""Where a run starts: the file of weights that `init` names, and the licences of what it builds on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
from torch import nn

from mad.config.encoders import EncoderConfig
from mad.config.training import RunConfig
from mad.config.weights import WEIGHT_FILES
from mad.files import MadError
from mad.models.export import OWN_LICENCE
from mad.models.hub import Source, card_licence, hub_weights, local_weights, stated_mean_std
from mad.models.vit import mean_std


def find_source(run: RunConfig, results: Path) -> Source | None:
    """The weights that `run.init` names, downloaded where they are on the hub; None for `random` and `timm`.

    Raises:
        MadError: they are missing, gated or out of reach; the text says what would mend it.
    """
    kind, _, target = run.init.partition(":")
    if kind == "run":
        path = results / "train" / target / "encoder" / WEIGHT_FILES[0]
        if not path.exists():
            raise MadError(f"{path}: no such weights; train the run that `init` names first")
        return Source(path, card_licence(path.parent / "README.md"), stated_mean_std(path.parent.joinpath))
    if kind == "file":
        return local_weights(target, f"runs.{run.name}.init")
    if kind == "hf-hub":
        instead = "download the weights where that is possible and set init: file:PATH"
        return hub_weights(target, f"runs.{run.name}.init: hf-hub:{target}", instead)
    return None


def check_normalisation(run: RunConfig, source: Source, model: nn.Module) -> None:
    """Fail where the weights that `run` starts from know images normalised otherwise, unless it names mean and deviation itself.

    Raises:
        MadError: the text names the keys.
    """
    stated, own = source.mean_std, mean_std(model)
    if stated is None or run.backbone.mean is not None or np.allclose(stated, own, atol=1e-4):
        return
    mean, std = ([round(value, 4) for value in part] for part in stated)
    raise MadError(
        f"runs.{run.name}.backbone: the weights of `init` were made with images normalised by mean {mean} and std {std}, "
        f"{run.backbone.model} would have them by {[list(part) for part in own]}; set backbone.mean: {mean} and backbone.std: {std}"
    )


def initial_licence(run: RunConfig, source: Source | None, model: nn.Module) -> str | None:
    """Licence of the weights that `run` starts from; random ones come with this package's, None where it is unknown."""
    if run.init == "random":
        return OWN_LICENCE
    if source:
        return source.licence
    cfg: Any = model.pretrained_cfg
    return cfg.get("license")


def encoder_licence(entry: EncoderConfig, audit: dict[str, Any], results: Path) -> str | None:
    """Licence of an encoder of the configuration, from the published list, its model card, or timm; None where it is unknown."""
    kind, _, target = entry.spec.partition(":")
    if kind == "random" or entry.spec == "colour":
        return OWN_LICENCE
    if kind in ("run", "local-dir"):
        folder = results / "train" / target / "encoder" if kind == "run" else Path(target)
        return card_licence(folder / "README.md")
    if kind == "timm" and (cfg := timm.get_pretrained_cfg(target)):
        return cfg.license
    licence = audit.get("licence")
    return None if licence is None else str(licence)


def common_licence(*licences: str | None) -> str | None:
    """The licence of all of them; None where they differ, or one is unknown."""
    known = {None if licence is None else licence.lower() for licence in licences}
    return known.pop() if len(known) == 1 else None
