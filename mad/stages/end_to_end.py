"""The end-to-end part of stage `biomarkers`: heads with an encoder or a mixer of their own, fold by fold, each stored when done.

Finished folds lie in biomarkers/{target}/folds/{aggregator}/{repeat}-{fold}.safetensors until those of other data or settings take
their place: an interrupted job goes on with the fold that it was at, and a finished one, asked again, trains nothing.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mad.config import Config
from mad.config.biomarkers import AggregatorConfig, TargetConfig
from mad.evaluation.bags import Bag
from mad.evaluation.finetune import FinetunedHead, Learner, fit_finetuned, load_head, save_head
from mad.evaluation.folds import Split
from mad.evaluation.slide_heads import Task
from mad.files import MadError, digest, read_json, sha256_file
from mad.progress import log
from mad.tiles.embeddings import encoder_digest

VERSION = 1  # raised when the code changes what an unchanged configuration trains
IGNORED = {"cache_gb", "checkpointing"}  # they change no number but by rounding
RULE = (
    "the {0} learns with its attention head on the fitted slides of each fold; validation patients tell when to stop; "
    "tokens are standardised by what the {0} told of the fitted slides before"
)
Start = tuple[Learner, dict[str, Any]]
"""What learns, and what its start is made from."""


class EndToEnd:
    """The trainings of one target and aggregator."""

    def __init__(
        self,
        config: Config,
        target: TargetConfig,
        entry: AggregatorConfig,
        source: dict[str, Any],
        task: Task,
        device: str,
    ) -> None:
        """`source` is the audit of the embeddings, or the summary of the mixer.

        Raises:
            MadError: the network cannot be loaded, or is not the one that made the tokens.
        """
        assert entry.finetune is not None
        kind, starting = ("encoder", encoder_learner) if entry.encoder else ("mixer", mixer_learner)
        self._learner, made_from = starting(config, entry, source, device)
        self._settings, self._tuning, self._task, self._device = config.biomarkers, entry.finetune, task, device
        self.rules = {"finetune" if entry.encoder else "finetune_mixer": RULE.format(kind)}
        self._kind = kind
        self._folder = Path(config.results) / "biomarkers" / target.name / "folds" / entry.name
        self._what = f"biomarkers {target.name} {entry.name}"
        own = {"targets", "aggregators", "baseline", "tile_shares", "map_slides", "map_target"}
        self._dense = Path(config.results) / "embed" / str(entry.encoder) / "dense"
        self._key = {
            **made_from,
            "version": VERSION,
            "task": digest([task.truth, task.classes]),
            "settings": config.biomarkers.model_dump(mode="json", exclude=own),
            "finetune": entry.finetune.model_dump(mode="json", exclude=IGNORED),
            "tile": digest(config.tile.model_dump(mode="json")),
        }

    def fit(
        self, split: Split, fit: list[Bag], val: list[Bag], test: list[Bag], *, num_kinds: int, seed: int
    ) -> FinetunedHead:
        """The head of one fold: from its file, or trained and written there."""
        path = self._folder / f"{split.repeat}-{split.fold}.safetensors"
        slides = {
            side: [[bag.slide_id, *bag.names, self._made_from(bag)] for bag in bags]
            for side, bags in zip("fvt", (fit, val, test), strict=True)
        }
        key = {**self._key, "slides": digest(slides), "seed": seed}
        if (head := load_head(path, key, test, self._learner, seed, self._device)) is not None:
            return head
        what = f"{self._what}: repeat {split.repeat}, fold {split.fold}"
        head = fit_finetuned(
            fit, val, test, self._task, self._settings, self._tuning, learner=self._learner,
            num_kinds=num_kinds, seed=seed, device=self._device,
            watch=lambda step, loss: log(f"{what}: step {step}, validation loss {loss:.4f}"),
        )  # fmt: skip
        moved = 100 * head.facts[f"{self._kind}_change"]
        log(f"{what}: step {head.facts['steps']} is kept; the {self._kind} moved by {moved:.2g} % of its weights' norm")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_head(head, path, key)
        return head

    def keep(self, splits: list[Split]) -> None:
        """Take away the files of other folds than these: there were more of them before."""
        kept = {f"{split.repeat}-{split.fold}.safetensors" for split in splits}
        for path in self._folder.glob("*.safetensors"):
            if path.name not in kept:
                path.unlink()

    def _made_from(self, bag: Bag) -> str:
        """The key of a slide's embeddings, which tells of the slide's pixels as well."""
        if bag.regions is not None:
            return bag.regions.key
        key: str = read_json(self._dense / f"{bag.slide_id}.json")["key"]
        return key


def encoder_learner(config: Config, entry: AggregatorConfig, source: dict[str, Any], device: str) -> Start:
    """An encoder on the pixels of the slides.

    Raises:
        MadError: it cannot be loaded, or is not the one that made the embeddings.
    """
    from mad.evaluation.encoded_tokens import EncodedTokens  # here, as below, for it loads timm: frozen rows do without
    from mad.models.encoders import TimmEncoder, load_encoder
    from mad.stages.tile_pixels import TilePixels

    assert entry.encoder is not None and entry.finetune is not None
    encoder, tuning = load_encoder(config, entry.encoder), entry.finetune
    assert isinstance(encoder, TimmEncoder)
    if encoder_digest(source) != encoder_digest(encoder.audit):
        raise MadError(
            f"embed/{entry.encoder}: made by other weights or arguments than those of {config.encoder(entry.encoder).spec} now; "
            f"run `mad embed {entry.encoder}` again"
        )
    pixels = TilePixels(config, tuning.cache_gb)
    return lambda scaling, seed: EncodedTokens(scaling, device, encoder, pixels, tuning, seed), {
        "encoder": encoder.audit
    }


def mixer_learner(config: Config, entry: AggregatorConfig, source: dict[str, Any], device: str) -> Start:
    """A mixer on the embeddings of the slides' tiles.

    Raises:
        MadError: it cannot be loaded, or is not the one that made the tokens.
    """
    from mad.evaluation.mixed_tokens import MixedTokens
    from mad.models.export import WEIGHTS as TENSORS
    from mad.models.mixer import load_mixer
    from mad.stages.mix import WEIGHTS

    assert entry.mixer is not None and entry.finetune is not None
    folder, tuning = Path(config.results) / "mix" / entry.mixer / WEIGHTS, entry.finetune
    mixer = load_mixer(folder).to(device)
    sha256 = sha256_file(folder / TENSORS)
    if source.get("weights_sha256") != sha256:
        raise MadError(
            f"mix/{entry.mixer}: made by other weights than those in {folder}; run `mad mix {entry.mixer}` again"
        )
    mixed = {"weights_sha256": sha256, "region_tiles": config.mixer(entry.mixer).region_tiles, **asdict(mixer.shape)}
    return lambda scaling, seed: MixedTokens(scaling, device, mixer, tuning), {"mixer": mixed}
