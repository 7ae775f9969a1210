"""What a run minimises, in words."""

from __future__ import annotations

from mad.config.kinds import STANDALONE
from mad.config.training import RunConfig
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
        names.append(f"{cross}: {_shown(run)} {against} {_taught(run)} ({', '.join(pairs)})")
        if run.method == "mad_global":
            names[0] += "; the student also sees these views of the parent, each against the teacher's other one"
            names[0] += f" (weight {run.parent_weight:g})" if run.parent_weight != 1 else ""
    if cropped:
        what = {"one": "one tile of each pair", "all": "every tile of a pair"}[run.pair_tiles]
        of = ", ".join(kind if kind == STANDALONE else f"{what} {kind}" for kind in cropped)
        names.append(f"{multicrop} ({'standalone tiles' if pairs else of})")
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


def _shown(run: RunConfig) -> str:
    """What of a pair the student sees."""
    return {
        "aligned": f"{run.children} children",
        "shuffled": f"{run.children} children of another parent of the slide",
        "interpolated": f"the places of {run.children} children, cut from their parent and enlarged,",
        "same": f"{run.children} views of one tile, a parent or a child,",
    }[run.pairs]


def _taught(run: RunConfig) -> str:
    """What of it the teacher sees."""
    whose = {"shuffled": "this parent", "same": "the same tile"}.get(run.pairs, "their parent")
    return f"{PARENT_VIEWS} views of {whose}"
