"""What a run minimises, in words."""

from __future__ import annotations

from mad.config.training import STANDALONE, RunConfig
from mad.training.distill import describe
from mad.training.objective import PARENT_VIEWS


def loss_names(run: RunConfig, kinds: list[str]) -> list[str]:
    """The losses of a run in words, for its model card."""
    if run.distill is not None:
        return describe(run.distill, kinds)
    crops, ibot = run.views, run.ibot
    targets = {"sinkhorn": "Sinkhorn-Knopp targets", "ema": f"targets centred by EMA {run.centre_momentum:g}"}[
        run.centring
    ]
    cross = f"DINO cross-entropy, {targets}, K = {run.head.prototypes}"
    multicrop = f"{cross}: multi-crop, {crops.global_crops} global + {crops.local_crops} local"
    pairs = [] if run.method == "dinov2" else [kind for kind in kinds if kind != STANDALONE]
    cropped = [kind for kind in kinds if kind not in pairs]
    names = []
    if pairs:
        against = "each against its own place in" if run.targets == "cell" else "against"
        names.append(
            f"{cross}: {run.children} children {against} {PARENT_VIEWS} views of their parent ({', '.join(pairs)})"
        )
        if run.method == "mad_global":
            names[0] += "; the student also sees these views of the parent, each against the teacher's other one"
            names[0] += f" (weight {run.parent_weight:g})" if run.parent_weight != 1 else ""
    if cropped:
        names.append(f"{multicrop} ({'standalone tiles' if pairs else ', '.join(cropped)})")
    if ibot.weight:
        seen = ["the student's views of parents"] if run.method == "mad_global" and pairs else []
        seen += ["global crops"] if cropped else []
        head = (
            "the shared head"
            if ibot.head == "shared"
            else f"its own head, K = {ibot.prototypes or run.head.prototypes}"
        )
        names.append(
            f"iBOT, weight {ibot.weight:g}, {targets}, {head}: {ibot.probability:.0%} of {' and '.join(seen)} lose "
            f"{ibot.ratio[0]:.0%} to {ibot.ratio[1]:.0%} of their patches"
        )
    spread = {"koleo": "KoLeo", "kde": f"KDE uniformity (kappa {run.kde_kappa:g})"}[run.spread]
    return names + ([f"{spread}, weight {run.koleo:g}, per view position"] if run.koleo else [])
