"""The curves of a run as one picture, drawn from its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mad.files import Pathlike, atomic_path
from mad.training.watch import Watch

MOST_DOTS = 2000  # per kind of sample
BINS = 60  # of the lines through noisy figures

Record = dict[str, Any]


def draw_curves(records: list[Record], watch: Watch, title: str, path: Pathlike) -> None:
    """Loss, learning rate and gradient, and the health checks' figures that `watch` names over steps, as a PNG.

    Red crosses stand where a health check warned. What the records lack is left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, *upper), (rates, *lower) = figure.subplots(2, 3)
    panels = dict(zip(watch.panels, [*upper, *lower], strict=True))
    checked = [record for record in records if "health" in record]
    for kind in sorted({record["kinds"] for record in records}):
        same = [record for record in records if record["kinds"] == kind]
        shown = same[:: max(1, len(same) // MOST_DOTS)]
        dots = loss.plot(*_curve(shown, watch.share), ".", markersize=2, alpha=0.25)
        loss.plot(*_curve(_means(same, watch.share), watch.share), color=dots[0].get_color(), label=kind)
    loss.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    loss.set(title=watch.title)
    for panel, axes in panels.items():
        _plot(axes, checked, *panel.figures)
        for level in panel.levels:
            axes.axhline(level, color="grey", linewidth=0.8, linestyle="--")
        axes.set(title=panel.title)
        if panel.from_zero:
            axes.set_ylim(0, None)

    rates.plot(*_curve(_means(records, "grad_norm"), "grad_norm"), label="gradient norm")
    rates.set(title="gradient norm, learning rate", yscale="log")
    twin = rates.twinx()
    twin.spines["top"].set_visible(False)
    twin.plot(*_curve(records, "lr"), color="C1")
    twin.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.plot([], [], color="C1", label="learning rate (right)")

    for name, figure_name in watch.marks.items():
        axes = next((axes for panel, axes in panels.items() if figure_name in panel.figures), loss)
        warned = [record for record in checked if name in record.get("warnings", ())]
        if warned:
            axes.plot(*_curve(warned, figure_name), "x", color="red", label=f"warning: {name}")
    for axes in (loss, rates, *panels.values()):
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


def draw_mixer_curves(records: list[Record], title: str, path: Pathlike) -> None:
    """Losses of a region mixer over its steps, the held-out ones by way of masking with their references, and RankMe, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, held, rank = figure.subplots(1, 3)
    for name in ("mem", "contrastive"):
        if records and name in records[0]:
            loss.plot(*_curve(_means(records, name), name), label=name)
    checked = [record for record in records if "health" in record]
    steps = [record["step"] + 1 for record in checked]
    for kind in checked[-1]["health"]["held_out"] if checked else ():
        figures = [record["health"]["held_out"][kind] for record in checked]
        line = held.plot(steps, [each["loss"] for each in figures], marker=".", label=kind)
        held.axhline(figures[-1]["reference"], color=line[0].get_color(), linewidth=0.8, linestyle="--")
    rank.plot(steps, [record["health"]["rankme"] for record in checked], marker=".", label="RankMe")
    loss.set(title="training loss")
    held.set(title="held-out MEM (dashed: mean of the seen tiles)")
    rank.set(title="rank of the region vectors", ylim=(0, None))
    for axes in (loss, held, rank):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, framealpha=0.6, edgecolor="none")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})


def draw_adapter_curves(records: list[Record], start: Record, uniform: float, title: str, path: Pathlike) -> None:
    """Losses of a cross-scale adapter over its steps, and its figures on held-out pairs, with those of the `start`, as a PNG.

    `uniform` is the loss `align` where nothing is learned.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    FigureCanvasAgg(figure)
    align, terms, pairs, rank = figure.subplots(1, 4)
    checked = [{"step": -1, "health": start}] + [record for record in records if record.get("health")] if start else []
    if records:
        align.plot(*_curve(_means(records, "align"), "align"), label="align")
        for name in ("keep", "koleo"):
            terms.plot(*_curve(_means(records, name), name), label=name)
    align.axhline(uniform, color="grey", linewidth=0.8, linestyle="--")
    _plot(pairs, checked, "child_to_parent", "parent_to_child", "pair_cosine_gap")
    _plot(rank, checked, "rankme_coarse", "rankme_fine")
    align.set(title="alignment loss (dashed: nothing learned)")
    terms.set(title="what holds it back")
    pairs.set(title="held-out parents and children")
    rank.set(title="rank of the embeddings", ylim=(0, None))
    for axes in (align, terms, pairs, rank):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, framealpha=0.6, edgecolor="none")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
