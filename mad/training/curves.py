"""The curves of a run as one picture, drawn from its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mad.files import Pathlike, atomic_path
from mad.training.health import FARTHEST_APART, LOWEST_RANK

MOST_DOTS = 2000  # per kind of sample
BINS = 60  # of the lines through noisy figures
MARKS = {"uniform collapse": "dino_of_ln_k", "rank collapse": "rankme", "scale separation": "scale_separation"}

Record = dict[str, Any]


def draw_curves(records: list[Record], prototypes: int, title: str, path: Pathlike) -> None:
    """Loss, learning rate and gradient, and the figures of the health checks over steps, as a PNG.

    Red crosses stand where a health check warned. What the records lack is left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, entropies, ranks), (rates, pairs, apart) = figure.subplots(2, 3)
    checked = [record for record in records if "health" in record]
    for kind in sorted({record["kinds"] for record in records}):
        same = [record for record in records if record["kinds"] == kind]
        shown = same[:: max(1, len(same) // MOST_DOTS)]
        dots = loss.plot(*_curve(shown, "dino_of_ln_k"), ".", markersize=2, alpha=0.25)
        loss.plot(*_curve(_means(same, "dino_of_ln_k"), "dino_of_ln_k"), color=dots[0].get_color(), label=kind)
    loss.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    loss.set(title="cross-entropy / ln K (1: nothing learned)")
    _plot(entropies, checked, "teacher_entropy", "target_entropy", "student_entropy", "mean_cosine", "feature_std")
    entropies.set(title=f"entropy / ln K (K = {prototypes}), spread of the embeddings")
    _plot(ranks, checked, "rankme", "rankme_coarse", "rankme_fine", "prototype_perplexity")
    ranks.axhline(LOWEST_RANK, color="grey", linewidth=0.8, linestyle="--")
    ranks.set(title="rank of the embeddings, prototypes in use", ylim=(0, None))
    _plot(pairs, checked, "retrieval_at_1", "knn_coarse_to_fine", "pair_cosine_gap")
    pairs.set(title="held-out parents and children")
    _plot(apart, checked, "scale_separation")
    apart.axhline(FARTHEST_APART, color="grey", linewidth=0.8, linestyle="--")
    apart.axhline(0, color="grey", linewidth=0.8)
    apart.set(title="distance of the magnifications / spread within one")

    rates.plot(*_curve(_means(records, "grad_norm"), "grad_norm"), label="gradient norm")
    rates.set(title="gradient norm, learning rate", yscale="log")
    twin = rates.twinx()
    twin.spines["top"].set_visible(False)
    twin.plot(*_curve(records, "lr"), color="C1")
    twin.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.plot([], [], color="C1", label="learning rate (right)")

    for (name, figure_name), axes in zip(MARKS.items(), (loss, ranks, apart), strict=True):
        warned = [record for record in checked if name in record.get("warnings", ())]
        if warned:
            axes.plot(*_curve(warned, figure_name), "x", color="red", label=f"warning: {name}")
    for axes in (loss, entropies, ranks, rates, pairs, apart):
        axes.set_xlabel("step")
        axes.spines["top"].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, framealpha=0.6, edgecolor="none")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})


def _plot(axes: Any, checked: list[Record], *names: str) -> None:
    for name in names:
        steps, values = _curve(checked, name)
        if steps:
            axes.plot(steps, values, marker=".", label=name.replace("_", " "))


def _curve(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps done, and the figure `name` of the records or of their health checks, where it is known."""
    found = [(record["step"] + 1, record.get(name, record.get("health", {}).get(name))) for record in records]
    return [step for step, value in found if value is not None], [value for _, value in found if value is not None]


def _means(records: Sequence[Record], name: str) -> list[Record]:
    """The records by `BINS` groups of consecutive ones: mean step and mean figure of each."""
    size = max(1, len(records) // BINS)
    groups = [records[start : start + size] for start in range(0, len(records), size)]
    return [{key: sum(record[key] for record in group) / len(group) for key in ("step", name)} for group in groups]
