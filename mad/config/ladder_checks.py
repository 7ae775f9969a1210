"""Whether caps, mixes and tables name what the ladder `tile.magnifications` has, and which tables follow it by themselves."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from mad.config.kinds import STANDALONE

if TYPE_CHECKING:
    from mad.config.evaluation import EvaluationConfig
    from mad.config.model import Config


def follow_ladder(evaluate: EvaluationConfig, ladder: list[float]) -> EvaluationConfig:
    """The section with the ladder's two finest magnifications where it names none itself."""
    finest = {"transition": tuple(ladder[-2:]), "segmentation_magnifications": ladder[-2:]}
    if len(ladder) < 2:
        del finest["transition"]
    return evaluate.model_copy(
        update={key: value for key, value in finest.items() if key not in evaluate.model_fields_set}
    )


def check_ladder(config: Config) -> None:
    """Fail where another section names a magnification, or a kind of sample, that the ladder lacks.

    Raises:
        ValueError: names the key, and what the ladder has.
    """
    names = [f"{magnification:g}x" for magnification in config.tile.magnifications]
    pairs = ["-".join(pair) for pair in pairwise(names)]
    has = f"the ladder {config.tile.magnifications} has"
    for key, kinds in (("max_pairs", pairs), ("max_standalone", names)):
        caps = {kind: cap for kind, cap in getattr(config.sample, key).items() if cap is not None}
        if unknown := sorted(set(caps) - set(kinds)):
            raise ValueError(
                f"sample.{key} names {unknown}; {has} {kinds}. Caps that come from the file that this one is merged over are "
                "taken away by null"
            )
        classes = {name for cap in caps.values() if isinstance(cap, dict) for name in cap}
        if unknown := sorted(classes - set(config.label.classes)):
            raise ValueError(
                f"sample.{key} names {unknown}; label.classes has {config.label.classes}, and tiles of no class are capped by "
                "sample.max_unlabelled"
            )
    kinds = [*pairs, *("-".join(triple) for triple in zip(names, names[1:], names[2:], strict=False)), STANDALONE]
    for run in config.runs:
        if unknown := sorted(kind for kind, weight in run.mix.items() if weight and kind not in kinds):
            raise ValueError(
                f"runs: `mix` of {run.name!r} names {unknown}; {has} {kinds}. If this run comes from the file that this one is "
                "merged over, give `runs:` of your own"
            )
    transition = "-".join(f"{magnification:g}x" for magnification in config.evaluate.transition)
    if pairs and transition not in pairs:
        raise ValueError(f"evaluate.transition names {transition!r}; {has} {pairs}")
    if unknown := sorted(set(config.evaluate.segmentation_magnifications) - set(config.tile.magnifications)):
        raise ValueError(f"evaluate.segmentation_magnifications names {unknown}; {has} {names}")
