"""The frozen teacher of a distillation: an entry of `encoders:`, as a network or by its stored embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mad.config import Config
from mad.config.distill import DistillConfig
from mad.config.encoders import EncoderConfig
from mad.files import MadError, digest
from mad.models.embedding import usual_batch
from mad.models.encoders import Encoder, load_encoder
from mad.models.initial import encoder_licence
from mad.tiles.embeddings import encoder_digest, read_audit
from mad.training.features import Features
from mad.training.index import Index


@dataclass(frozen=True)
class Teacher:
    """Where the targets come from; `encoder` is None where they are stored in `folder`."""

    entry: EncoderConfig
    audit: dict[str, Any]
    licence: str | None
    folder: Path
    encoder: Encoder | None

    @property
    def dim(self) -> int:
        """Dimension of its embeddings."""
        return int(self.audit["dim"])

    @property
    def sha256(self) -> str:
        """`encoder_digest`; one of all that it tells of itself where it has no weights (colours, somebody's own function)."""
        return encoder_digest(self.audit) or digest(self.audit)

    @property
    def batch(self) -> int:
        """Tiles per forward pass, not searched for by time: the last digits of targets depend on it, and a run resumes equal."""
        return self.entry.batch or usual_batch()

    def features(self, index: Index) -> Features | None:
        """Its stored embeddings of an index's tiles; None where it embeds anew."""
        return Features(self.folder, index) if self.encoder is None else None

    def __str__(self) -> str:
        return f"`{self.entry.name}` ({self.entry.spec}), weights `{self.sha256}`, licence: {self.licence or 'unknown'}"


def find_teacher(config: Config, distill: DistillConfig) -> Teacher:
    """The teacher that a run names, its weights loaded unless its embeddings are stored.

    Raises:
        MadError: it cannot be had, or its stored embeddings are not there, or were made with other settings.
    """
    entry, results = config.encoder(distill.teacher), Path(config.results)
    folder = results / "embed" / entry.name
    if not distill.cache:
        encoder = load_encoder(config, entry.name)
        return Teacher(entry, encoder.audit, encoder_licence(entry, encoder.audit, results), folder, encoder)
    audit = read_audit(folder)
    if audit.get("status") == "absent":
        raise MadError(f"encoders: {entry.name!r}, a teacher, is absent: {audit['reason']}")
    wanted, made = entry.model_dump(mode="json"), audit["config"]
    if changed := sorted(key for key in wanted if key != "batch" and made.get(key, wanted[key]) != wanted[key]):
        what = ", ".join(changed)
        raise MadError(
            f"{folder}: embedded with another {what} than encoders.{entry.name} has now; run `mad embed {entry.name}` again"
        )
    return Teacher(entry, audit, encoder_licence(entry, audit, results), folder, None)
