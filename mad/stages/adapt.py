"""Stage `adapt`: one entry of `adapters:`, a head on the embeddings of a frozen encoder that brings its magnifications together.

Reads `embed/{encoder}/`, the shard tables (which tile is whose child) and the tile tables (classes, for figures alone); writes
`adapt/{name}/`: recipe.json, config.json and model.safetensors (the head), metrics.jsonl, curves.png and, last, summary.json. It
learns on pairs of the train split and shows its figures on the validation patients; the test split is not looked at. A minute
or two on a CPU: a stopped run starts again, and ends with equal bytes where the number of threads is equal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mad.config import Config
from mad.config.adapters import AdapterConfig, find_adapter
from mad.evaluation.cross_scale import HeldOut, Rows, held_out_pairs, pair_figures, transfer_figures
from mad.evaluation.data import Embedded, plain
from mad.files import atomic_path, digest, sha256_file, write_json
from mad.models.adapter import Adapter, AdapterShape, save_adapter
from mad.progress import log
from mad.stages.evaluate import load
from mad.tiles.embeddings import read_audit
from mad.training.adapter import PairSource, train_adapter, uniform
from mad.training.curves import draw_adapter_curves
from mad.training.index import Index, Pairs
from mad.training.process import granted_threads
from mad.training.records import METRICS

VERSION = 1  # raised when the code changes what an unchanged configuration trains
FINAL_SHARE = 0.1  # of the steps, over which the final losses are averaged


def run(config: Config, name: str) -> None:
    """Train adapter `name`.

    Where its encoder is absent, summary.json says `"status": "absent"` and why.

    Raises:
        MadError: there is no such adapter, its encoder has not embedded the cohort, or there is nothing to learn from.
    """
    entry = find_adapter(config, name)
    results = Path(config.results)
    folder, base = results / "adapt" / name, results / "embed" / entry.encoder
    (folder / "summary.json").unlink(missing_ok=True)  # it vouches for the head
    audit = read_audit(base)
    if audit.get("status") == "absent":
        log(f"WARNING: adapt {name}: the encoder {entry.encoder} is absent, and so is this adapter")
        write_json(folder / "summary.json", {"status": "absent", "reason": audit["reason"], "name": name})
        return
    torch.set_num_threads(granted_threads())
    recipe = freeze_adapter(config, entry)
    write_json(folder / "recipe.json", recipe)
    data = load(config, entry.encoder)
    index = pair_index(data, "train", entry.children)
    train, magnifications = data.rows("train", labelled=False), data.tiles["magnification"].to_numpy(float)
    torch.manual_seed(recipe["seed"])
    taken = entry.model_dump(include={"scales", "hidden", "unit"})
    adapter = Adapter(AdapterShape(dim=data.features.shape[1], magnifications=recipe["magnifications"], **taken))
    adapter.fit_moments(data.features[train], magnifications[train])
    adapter.to("cuda" if torch.cuda.is_available() else "cpu")
    source = PairSource(entry, recipe["seed"], index, data.features, adapter)
    log(
        f"{name}: {sum(p.numel() for p in adapter.parameters()) / 1e6:.2f} M parameters on {entry.encoder}, pairs {source.counts}, "
        f"{torch.get_num_threads()} threads"
    )
    watch = Watch(data, magnifications, recipe["seed"])
    validation = {"encoder": watch.everything(None), "standardised": watch.everything(adapter)}
    start = time.monotonic()
    adapter, records = train_adapter(adapter, entry, recipe["seed"], source, watch)
    seconds = time.monotonic() - start
    validation["adapted"] = watch.everything(adapter)
    sha256 = save_adapter(adapter, folder)
    with atomic_path(folder / METRICS) as temporary:
        temporary.write_text("".join(json.dumps(plain(record)) + "\n" for record in records), encoding="utf-8")
    level, title = uniform(entry, source), f"{name} ({entry.loss} on {entry.encoder})"
    draw_adapter_curves(records, validation["standardised"], level, title, folder / "curves.png")
    last = records[-max(1, round(FINAL_SHARE * entry.steps)) :]
    summary = {
        "status": "ok", "name": name, "encoder": entry.encoder, "weights_sha256": sha256, "recipe_digest": digest(recipe),
        "audit_sha256": sha256_file(base / "audit.json"), "data_digest": index.digest, "pairs": source.counts,
        "steps": entry.steps, "seconds": round(seconds, 1), "uniform": level, "held_out": watch.told, "validation": validation,
        "losses": {key: float(np.mean([r[key] for r in last])) for key in ("align", "keep", "koleo")} if last else {},
    }  # fmt: skip
    write_json(folder / "summary.json", plain(summary))
    for what, figures in validation.items():
        log(f"{name}: {what}: {_line(figures)}")


def freeze_adapter(config: Config, entry: AdapterConfig) -> dict[str, Any]:
    """The recipe: everything that decides the weights except the embeddings, as JSON values."""
    return {
        "version": VERSION,
        "adapter": entry.model_dump(mode="json", exclude={"seed"}),
        "magnifications": [float(value) for value in config.tile.magnifications],
        "seed": config.seed if entry.seed is None else entry.seed,
    }


def pair_index(data: Embedded, split: str, min_children: int) -> Index:
    """The pairs of a split with `min_children` embedded children or more; rows are those of `data.tiles`."""
    rows = data.tiles.rename(columns={"slide_id": "slide"})
    inside = data.pairs[(data.tiles["split"] == split).to_numpy()[data.pairs["parent"]]]
    pairs = {}
    for kind in sorted(inside["kind"].unique(), key=lambda name: float(str(name).split("x-")[0])):
        own = inside[inside["kind"] == kind]
        parents, place = np.unique(own["parent"].to_numpy(np.int64), return_inverse=True)
        children = np.full((len(parents), int(own["position"].max()) + 1), -1, np.int64)
        children[place, own["position"].to_numpy()] = own["child"]
        usable = (children >= 0).sum(axis=1) >= min_children
        pairs[str(kind)] = Pairs(parents[usable], children[usable])
    ids = data.tiles["tile_id"].to_numpy()
    named = {kind: [ids[own.parents].tolist(), own.children.shape[1]] for kind, own in pairs.items()}
    return Index(Path(), rows, pairs, np.zeros(0, np.int64), digest(named))


class Watch:
    """Figures on the validation patients; called with an adapter, those of the pairs alone."""

    def __init__(self, data: Embedded, magnifications: NDArray, seed: int) -> None:
        self._data, self._magnifications, self._seed = data, magnifications, seed
        self._held: HeldOut | None = held_out_pairs(data, "val", seed=seed)
        self.told = (
            "there are no validation pairs"
            if self._held is None
            else f"{self._held.kind} pairs of the validation patients"
        )

    def __call__(self, adapter: Adapter) -> dict[str, Any]:
        return {} if self._held is None else pair_figures(self._held, self._embed(adapter), seed=self._seed)

    def everything(self, adapter: Adapter | None) -> dict[str, Any]:
        """Those of the pairs and of labels; of the encoder as it is where `adapter` is None."""
        if self._held is None:
            return {}
        embed = self._embed(adapter)
        labelled = transfer_figures(self._data, self._held.kind, "val", embed, seed=self._seed)
        return {**pair_figures(self._held, embed, seed=self._seed), **labelled}

    def _embed(self, adapter: Adapter | None) -> Callable[[Rows], NDArray]:
        features, at = self._data.features, self._magnifications
        return lambda rows: features[rows] if adapter is None else adapter.apply_to(features[rows], at[rows])


def _line(figures: dict[str, Any]) -> str:
    shown = {key: value for key, value in figures.items() if isinstance(value, float) and not key.endswith("chance")}
    return ", ".join(f"{key} {value:.3g}" for key, value in shown.items()) or "no validation pairs"
