"""An attention head and the network under it, trained together on the slides' labels (end to end; XMAG, 2025).

What is kept of a training, so that the heads of all folds can be asked slide by slide and each can be stored when it is done: the
head, and of an encoder the embeddings that it gave the slides that it is going to be asked for. A mixer is kept itself, once per
fold (100 MB with the default sizes): it mixes anew whatever share of the slide's tiles it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from mad.config.biomarkers import BiomarkersConfig, FinetuneConfig
from mad.evaluation.bags import Bag, Scaling, fit_scaling
from mad.evaluation.learned_tokens import LearnedTokens
from mad.evaluation.slide_heads import AttentionHead, Floats, Task, check_slides, fit_attention
from mad.evaluation.tokens import StoredTokens
from mad.files import Pathlike
from mad.models.mil import GatedAttention
from mad.models.tensors import write_tensors

OVERRIDES = ("steps", "batch", "max_tiles")  # of `biomarkers:`, where `finetune:` gives them

Learner = Callable[[Scaling, int], LearnedTokens]
"""From the standardisation and the seed of a fold to what learns, at its start."""


@dataclass(frozen=True)
class FinetunedHead:
    """A head, and what its own encoder tells of the slides that it may be asked for."""

    head: AttentionHead
    embedded: dict[str, Bag] | None
    """Slide -> its whole bag. None: the head has its network with it, which tells anew of any bag."""

    @property
    def facts(self) -> dict[str, Any]:
        """`steps` that were kept, and `encoder_change` or `mixer_change`: |weights - initial ones| / |initial ones|."""
        return self.head.facts

    def predict(self, bag: Bag) -> tuple[Floats, NDArray[np.float32]]:
        """As any head, for a bag that holds all tiles of such a slide or some of them."""
        if self.embedded is None:
            return self.head.predict(bag)
        whole = self.embedded[bag.slide_id]
        rows = pd.Index(whole.names).get_indexer(bag.names)
        return self.head.predict(replace(whole, rows=rows, kind=bag.kind, names=bag.names, tiles=bag.tiles))


def fit_finetuned(
    fit: list[Bag], val: list[Bag], tested: list[Bag], task: Task, settings: BiomarkersConfig, config: FinetuneConfig, *,
    learner: Learner, num_kinds: int, seed: int, device: str = "cpu",
    watch: Callable[[int, float], None] = lambda step, loss: None,
) -> FinetunedHead:  # fmt: skip
    """Train head and network.

    Args:
        fit: slides to fit on, with the tokens that the network gives them before; they standardise the tokens.
        val: slides that tell when to stop.
        tested: slides that the head is going to be asked for.
        task: the truth of all.
        settings: `biomarkers:`.
        config: `finetune:` of the aggregator.
        learner: makes the tokens that learn, of a network that starts from the same weights each time.
        num_kinds, seed, device: as for `fit_head`.
        watch: as for `fit_attention`.

    Raises:
        MadError: no slide to fit or to choose on, all layers are frozen, or the loss is never finite.
    """
    check_slides(fit, val, task)
    scaling = fit_scaling(fit, num_kinds)
    own = {key: value for key in OVERRIDES if (value := getattr(config, key)) is not None}
    tokens = learner(scaling, seed)
    head = fit_attention(fit, val, task, settings.model_copy(update=own), tokens, seed, config.ema, watch)
    head.facts.update({f"{tokens.learner}_change": tokens.change})
    embedded = tokens.embedded(tested)
    tokens.zero_grad()
    return FinetunedHead(head if embedded is None else replace(head, tokens=StoredTokens(scaling, device)), embedded)


def save_head(head: FinetunedHead, path: Pathlike, key: dict[str, Any]) -> None:
    """Write a head with the `key` of what it was made from."""
    scaling = head.head.tokens.scaling
    tensors = {f"model.{name}": tensor.cpu() for name, tensor in head.head.model.state_dict().items()}
    tensors |= {f"tokens.{name}": tensor.cpu() for name, tensor in head.head.tokens.state_dict().items()}
    tensors |= {"mean": torch.from_numpy(scaling.mean), "std": torch.from_numpy(scaling.std)}
    tensors |= {f"slide.{slide}": torch.from_numpy(bag.store) for slide, bag in (head.embedded or {}).items()}
    facts = {"centre": head.head.centre, "spread": head.head.spread, "classes": head.head.classes, "facts": head.facts}
    write_tensors(Path(path), tensors, {"key": json.dumps(key), "head": json.dumps(facts)})


def load_head(
    path: Pathlike, key: dict[str, Any], tested: Sequence[Bag], learner: Learner, seed: int, device: str
) -> FinetunedHead | None:
    """The head in a file; None where there is none, or it was made from something else than `key`."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            told = file.metadata()
            if told["key"] != json.dumps(key):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return None
    facts = json.loads(told["head"])
    weights, network, slides = (
        {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        for part in ("model.", "tokens.", "slide.")
    )
    hidden, dim = weights["embed.weight"].shape
    model = GatedAttention(dim, hidden, len(weights["output.bias"]))
    model.load_state_dict(weights)
    scaling = Scaling(mean=tensors["mean"].numpy(), std=tensors["std"].numpy())
    tokens = learner(scaling, seed) if network else StoredTokens(scaling, device)
    tokens.load_state_dict(network)
    head = AttentionHead(
        model.to(device).eval(), tokens, facts["centre"], facts["spread"], facts["classes"], facts["facts"]
    )
    if network:
        return FinetunedHead(head, None)
    return FinetunedHead(
        head,
        {bag.slide_id: replace(bag, store=slides[bag.slide_id].numpy(), rows=np.arange(len(bag))) for bag in tested},
    )
