"""The curves of a run as one picture, drawn from its metrics."""

from __future__ import annotations

from typing import Any

from mad.files import Pathlike, atomic_path


def draw_curves(records: list[dict[str, Any]], prototypes: int, title: str, path: Pathlike) -> None:
    """Loss against ln K, entropies, RankMe, and the parent-child figures over steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, entropies), (rank, pairs) = figure.subplots(2, 2)
    for kind in sorted({record["kinds"] for record in records}):
        same = [record for record in records if record["kinds"] == kind]
        loss.plot([r["step"] for r in same], [r["dino_of_ln_k"] for r in same], ".", markersize=2, label=kind)
    loss.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    loss.set(title="cross-entropy / ln K (1: nothing learned)", xlabel="step")
    checked = [record for record in records if "health" in record]
    steps = [record["step"] + 1 for record in checked]

    def plot(axes: Any, *names: str) -> None:
        for name in names:
            axes.plot(steps, [record["health"][name] for record in checked], marker=".", label=name.replace("_", " "))

    plot(entropies, "teacher_entropy", "target_entropy", "student_entropy")
    entropies.set(title=f"entropy / ln K (K = {prototypes})", xlabel="step")
    plot(rank, "rankme", "prototype_perplexity")
    rank.set(title="rank of the embeddings, prototypes in use", xlabel="step")
    plot(pairs, "pair_cosine_gap", "retrieval_at_1", "mean_cosine", "feature_std")
    pairs.set(title="held-out parents and children", xlabel="step")
    for axes in (loss, entropies, rank, pairs):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
