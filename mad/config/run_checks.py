"""Whether the keys of a run go together: what would fail later, or would change nothing, is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mad.config.distill import check_method
from mad.config.kinds import STANDALONE, is_triple

if TYPE_CHECKING:
    from mad.config.training import RunConfig

NEEDS = {
    "parent_weight": ("method", "mad_global"),
    "pair_tiles": ("method", "dinov2"),
    "centre_momentum": ("centring", "ema"),
    "kde_kappa": ("spread", "kde"),
}
"""Keys that have an effect only under a certain value of another one."""


def check_run(run: RunConfig) -> None:
    """Fail where keys of a run contradict each other, or one has no effect.

    Raises:
        ValueError: names the key.
    """
    check_method(run)
    if any(weight < 0 for weight in run.mix.values()) or (run.mix and not sum(run.mix.values()) > 0):
        raise ValueError(f"mix: weights are not negative and not all zero; got {run.mix}")
    if run.warmup >= run.steps:
        raise ValueError(f"warmup ({run.warmup}) must be shorter than steps ({run.steps})")
    if run.min_lr > run.lr:
        raise ValueError(f"min_lr ({run.min_lr:g}) is the end of a decline and must not be above lr ({run.lr:g})")
    if run.teacher_temp_warmup > run.steps:
        raise ValueError(
            f"teacher_temp_warmup ({run.teacher_temp_warmup}) must not be longer than steps ({run.steps}), or the targets never "
            "have the temperature teacher_temp"
        )
    if not run.teacher_temp_warmup and run.teacher_temp_start != type(run).model_fields["teacher_temp_start"].default:
        raise ValueError("teacher_temp_start: changes nothing without teacher_temp_warmup, over which it rises")
    if run.ema == run.ema_end == 1:
        raise ValueError("ema and ema_end are both 1: the teacher, which is what is exported, would never learn")
    if run.ibot.weight and run.method == "mad" and run.mix and not run.mix.get(STANDALONE):
        raise ValueError(
            "ibot: under method 'mad' only standalone tiles are masked, and `mix` has none; take method 'mad_global'"
        )
    if run.pairs != "aligned" and run.method == "dinov2":
        raise ValueError(f"pairs: {run.pairs!r} changes nothing under method 'dinov2', which crops single tiles")
    if run.targets == "cell" and (run.method not in ("mad", "mad_global") or run.pairs == "same"):
        raise ValueError(
            "targets: 'cell' needs children under a parent: method 'mad' or 'mad_global', and pairs other than 'same'"
        )
    paired = not run.mix or any(weight for kind, weight in run.mix.items() if kind != STANDALONE)
    if not paired and (run.pairs != "aligned" or run.targets != "tile"):
        raise ValueError("pairs and targets: `mix` has no pairs; give a kind such as '10x-40x' a weight")
    for key, (other, wanted) in NEEDS.items():
        value, chosen = getattr(run, key), getattr(run, other)
        if chosen != wanted and value != type(run).model_fields[key].default:
            raise ValueError(f"{key}: {value!r} changes nothing under {other} {chosen!r}; take {wanted}")
    triples = [kind for kind in run.mix if is_triple(kind)]
    if triples and (run.pairs == "interpolated" or run.children % 2):
        raise ValueError(f"mix: {triples[0]!r} needs an even number of children, and pairs other than 'interpolated'")
    if run.loader == "stream" and (triples or run.pairs == "shuffled"):
        what = f"mix: {triples[0]!r}" if triples else "pairs: 'shuffled'"
        raise ValueError(f"{what} joins tiles of several samples, which a stream lacks; take loader: indexed")
    if run.runtime.shard_url is not None and run.loader != "stream":
        raise ValueError("runtime.shard_url: only `loader: stream` reads from there; set it, or remove the key")
    if run.freeze_last_layer >= run.steps:
        raise ValueError(
            f"freeze_last_layer ({run.freeze_last_layer}) must be shorter than steps ({run.steps}), or the prototypes never "
            "learn; 0 suits short runs"
        )
    if run.freeze_backbone >= run.steps:
        raise ValueError(f"freeze_backbone ({run.freeze_backbone}) must be shorter than steps ({run.steps})")
    if run.init == f"run:{run.name}":
        raise ValueError(f"init: {run.init!r} would start the run from itself")
