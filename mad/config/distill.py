"""Configuration of cross-magnification distillation (XMAG, 2025): the section `distill:` of a run with method `xmag`.

A sample is a tile at a coarse magnification and its s x s children at the next finer one: at 5x and 20x one and 16. A frozen
encoder embeds the children, the student learns to tell their embeddings from the coarse tile alone. What the paper leaves
open, and what is ours: docs/xmag.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from mad.config.base import SLUG, Section, merge

if TYPE_CHECKING:
    from mad.config.model import Config
    from mad.config.training import RunConfig

XMAG = "xmag"
DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.05,
    "weight_decay_end": 0.05,
    "clip": 1.0,
    "ema": 0.999,
    "ema_end": 0.999,
    "photometric": {"jitter": 0.5, "grayscale": 0.0, "blur": [0.0, 0.0, 0.0], "solarize": 0.0},
    "koleo": 0.0,
    "freeze_last_layer": 0,
}
"""Of a run with method `xmag`, where its entry does not say otherwise. The strength of the colour jitter is ours."""
UNUSED = (
    "head", "ibot", "views", "children", "pairs", "pair_tiles", "student_temp", "teacher_temp", "teacher_temp_start",
    "teacher_temp_warmup", "centring", "centre_momentum", "spread", "kde_kappa",
)  # fmt: skip


class DistillConfig(Section):
    """What the student of a run with method `xmag` learns, and from whom."""

    teacher: str = Field(pattern=SLUG)
    """The frozen teacher: the name of an entry of `encoders:`."""
    global_weight: float = Field(1.0, ge=0)
    """Weight of the global term: the embedding of the tile against the mean of the teacher's embeddings of its children."""
    local_weight: float = Field(0.5, ge=0)
    """Weight of the local term: the mean of the patch tokens in each child's place against the teacher's embedding of that
    child. 0 where `teacher_level` is `coarse`."""
    head_hidden: int | None = Field(None, ge=1)
    """Width of the heads, each Linear, LayerNorm, GELU, Linear; not given: the dimension of the teacher's embeddings."""
    input: Literal["pyramid", "resized"] = "pyramid"
    """What the student sees. `pyramid`: the tile that was cut from the slide's own level. `resized` (the paper's): its children put
    together and shrunk by area to the side of one tile."""
    teacher_level: Literal["fine", "coarse"] = "fine"
    """`coarse` is a control: the teacher embeds what the student sees, and not the children."""
    cache: bool = True
    """`true`: the teacher's embeddings are read from `embed/{teacher}/`, and follow the student's flips by changing places: the
    teacher never sees flips or colours. `false`: the teacher embeds the children anew, with the student's flips and colours."""

    @model_validator(mode="before")
    @classmethod
    def _coarse_has_no_places(cls, value: Any) -> Any:
        coarse = isinstance(value, dict) and value.get("teacher_level") == "coarse"
        return {"local_weight": 0.0, **value} if coarse else value

    @model_validator(mode="after")
    def _is_consistent(self) -> DistillConfig:
        if not self.global_weight + self.local_weight > 0:
            raise ValueError("global_weight and local_weight are both 0: there is nothing to learn")
        if self.teacher_level == "coarse" and self.local_weight:
            raise ValueError(
                "local_weight: with teacher_level 'coarse' no child is embedded, so there is no local term; 0"
            )
        if self.teacher_level == "coarse" and self.input == "resized" and self.cache:
            raise ValueError(
                "cache: the stored embeddings are of the slide's own level; 'resized' tiles need cache: false"
            )
        return self


def with_defaults(entry: dict[str, Any]) -> dict[str, Any]:
    """An unchecked entry of `runs:` with the defaults of its method under its own keys."""
    return merge(DEFAULTS, entry) if entry.get("method") == XMAG else entry


def check_method(run: RunConfig) -> None:
    """Fail where `distill` and `method` do not go together, or a key has no effect under `xmag`.

    Raises:
        ValueError: names the key.
    """
    if (run.distill is not None) != (run.method == XMAG):
        raise ValueError(
            "method 'xmag' needs a section `distill` with a teacher"
            if run.distill is None
            else f"distill: method {run.method!r} does not distil; set method: xmag, or take the section away"
        )
    if run.distill is None:
        return
    if run.preset is not None:
        raise ValueError(
            f"preset: {run.preset!r} has the numbers of self-distillation, not of method 'xmag'; take it away"
        )
    fields = type(run).model_fields
    unused = [key for key in UNUSED if getattr(run, key) != fields[key].default]
    unused += [key for key in ("koleo", "freeze_last_layer") if getattr(run, key)]
    unused += ["photometric.solarize"] if run.photometric.solarize else []
    if unused:
        raise ValueError(f"{', '.join(unused)}: without effect under method 'xmag'; take them away")
    if other := sorted(kind for kind, weight in run.mix.items() if weight and kind.count("-") != 1):
        raise ValueError(f"mix: method 'xmag' learns from a tile and its children, as in '5x-20x', not from {other}")
    if run.loader == "stream":
        raise ValueError("loader: 'stream' shows some children of a pair; method 'xmag' needs all: take indexed")


def check_teachers(config: Config) -> None:
    """Fail where a run's teacher, or what the test for non-inferiority compares with, is no encoder, or the run its own teacher.

    Raises:
        ValueError: names the key.
    """
    specs = {encoder.name: encoder.spec for encoder in config.encoders}
    for key in ("reference", "against"):
        if (name := getattr(config.evaluate, key)) not in (None, *specs):
            raise ValueError(f"evaluate.{key} names {name!r}; encoders has {sorted(specs)}")
    if config.evaluate.against and not config.evaluate.reference:
        raise ValueError("evaluate.against: without effect; the table that it is for needs evaluate.reference")
    for run in config.runs:
        if run.distill is None:
            continue
        if run.distill.teacher not in specs:
            raise ValueError(
                f"runs: the teacher of {run.name!r} is {run.distill.teacher!r}; encoders has {sorted(specs)}"
            )
        if specs[run.distill.teacher] == f"run:{run.name}":
            raise ValueError(f"runs: the teacher of {run.name!r} is its own encoder")
