"""The end-to-end part of stage `biomarkers`: heads with encoders of their own, fold by fold, each stored when it is done.

Finished folds lie in biomarkers/{target}/folds/{aggregator}/{repeat}-{fold}.safetensors until the aggregator's JSON is written: an
interrupted job goes on with the fold that it was at.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mad.config import Config
from mad.config.biomarkers import AggregatorConfig, TargetConfig
from mad.evaluation.bags import Bag
from mad.evaluation.finetune import FinetunedHead, fit_finetuned, load_head, save_head
from mad.evaluation.folds import Split
from mad.evaluation.slide_heads import Task
from mad.files import MadError, digest
from mad.models.encoders import TimmEncoder, load_encoder
from mad.progress import log
from mad.stages.tile_pixels import TilePixels

IGNORED = {"cache_gb", "checkpointing"}  # they change no number but by rounding


class EndToEnd:
    """The trainings of one target and aggregator."""

    RULE = (
        "the encoder learns with its attention head on the fitted slides of each fold; validation patients tell when to stop; "
        "tokens are standardised by what the encoder told of the fitted slides before"
    )

    def __init__(
        self,
        config: Config,
        target: TargetConfig,
        entry: AggregatorConfig,
        source: dict[str, Any],
        task: Task,
        device: str,
    ) -> None:
        """`source` is the audit of the embeddings.

        Raises:
            MadError: the encoder cannot be loaded, or is not the one that made the embeddings.
        """
        assert entry.encoder is not None and entry.finetune is not None
        encoder = load_encoder(config, entry.encoder)
        assert isinstance(encoder, TimmEncoder)
        if source.get("weights_sha256") != encoder.audit["weights_sha256"]:
            raise MadError(
                f"embed/{entry.encoder}: made by other weights than those of {config.encoder(entry.encoder).spec} now; run "
                f"`mad embed {entry.encoder}` again"
            )
        self._settings, self._tuning, self._task, self._device = config.biomarkers, entry.finetune, task, device
        self._encoder, self._pixels = encoder, TilePixels(config, entry.finetune.cache_gb)
        self._folder = Path(config.results) / "biomarkers" / target.name / "folds" / entry.name
        self._what = f"biomarkers {target.name} {entry.name}"
        own = {"targets", "aggregators", "baseline", "tile_shares", "map_slides", "map_target"}
        self._key = {
            "encoder": encoder.audit,
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
            side: [[bag.slide_id, *bag.names] for bag in bags]
            for side, bags in zip("fvt", (fit, val, test), strict=True)
        }
        key = {**self._key, "slides": digest(slides), "seed": seed}
        if (head := load_head(path, key, test, self._device)) is not None:
            return head
        what = f"{self._what}: repeat {split.repeat}, fold {split.fold}"
        head = fit_finetuned(
            fit, val, test, self._task, self._settings, self._tuning, encoder=self._encoder, pixels=self._pixels,
            num_kinds=num_kinds, seed=seed, device=self._device,
            watch=lambda step, loss: log(f"{what}: step {step}, validation loss {loss:.4f}"),
        )  # fmt: skip
        moved = 100 * head.facts["encoder_change"]
        log(f"{what}: step {head.facts['steps']} is kept; the encoder moved by {moved:.2g} % of its weights' norm")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_head(head, path, key)
        return head

    def forget(self) -> None:
        """Take away the folds' files, when all that they tell is written."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._folder.parent.exists() and not any(self._folder.parent.iterdir()):
            self._folder.parent.rmdir()
