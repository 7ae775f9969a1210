"""Configuration of the encoders to be compared: one entry of `encoders:` is a row of every table."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mad.config.base import SLUG, Section


class EncoderConfig(Section):
    """One encoder to be compared."""

    name: str = Field(pattern=SLUG)
    """Folder under `results/embed/` and row of every table."""
    spec: str
    """`run:NAME` (the encoder of a run), `random:NAME` (that architecture untrained), `colour` (channel mean and standard
    deviation), `published:NAME` (`mad encoders` lists them: uni, uni2-h, virchow2, ...), `timm:MODEL`, `hf-hub:OWNER/MODEL`,
    `local-dir:FOLDER`, `python:MODULE:FACTORY` (your own, docs/encoders.md), or `adapter:NAME` (the embeddings of another entry
    behind a head of `adapters:`, docs/adapter.md)."""
    weights: str | None = None
    """`published:` the file of its weights, or its folder, instead of the hub."""
    pooling: Literal["auto", "cls", "avg", "cls+avg"] = "auto"
    """`auto`: the model's own. `cls+avg`: class token beside the mean of the patch tokens."""
    args: dict[str, Any] = {}
    """Further arguments of `timm.create_model` for `timm:`, `hf-hub:`, `local-dir:` and `published:`; `{img_size: 224}` keeps a
    model's own size, to which tiles of another size are then resized. `mlp_layer`, `act_layer` and `norm_layer` are names of
    classes in timm.layers or torch.nn, as `SwiGLUPacked` and `SiLU`."""
    batch: int | None = Field(None, ge=1)
    """Tiles per forward pass, at most; not given: 64 on a CPU, 256 on a GPU, and there twice as many (up to 2048) as long as the
    network takes 5 % more tiles a second. Halved where the memory does not suffice."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of forward passes. `auto`: bf16 where the device is good at it (CUDA from Ampere, CPU with avx512_bf16 or AMX)."""

    @model_validator(mode="after")
    def _has_use_for_weights(self) -> EncoderConfig:
        if self.weights and not self.spec.startswith("published:"):
            raise ValueError(f"weights: only `published:NAME` takes weights from a disk; {self.spec!r} names its own")
        return self
