"""Figure 3 of the MAD paper: parents and their children in the plane of the first two principal components."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from mad.config.evaluation import EvaluationConfig
from mad.evaluation.consistency import test_pairs
from mad.evaluation.data import Embedded
from mad.metrics.pca import fit_pca


def projection(
    data: Embedded, config: EvaluationConfig, *, seed: int, device: str | torch.device = "cpu"
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The first two principal components of all test tiles of the transition, for a draw of its pairs.

    Returns:
        Table (tile_id, parent_id, role, label, x, y) of `figure_parents` parents, spread evenly over the classes, with all
        of their children; and what was fitted on.
    """
    pairs, labelled = test_pairs(data, config.transition)
    parent_rows, child_rows = np.unique(pairs["parent"]), pairs["child"].to_numpy()
    pca = fit_pca(data.features[np.concatenate([parent_rows, child_rows])], 2, device=device)
    generator = np.random.default_rng(seed)
    codes = data.codes[parent_rows] if labelled else np.zeros(len(parent_rows), np.int64)
    shuffled = generator.permutation(len(parent_rows))
    turn = pd.Series(codes[shuffled]).groupby(codes[shuffled]).cumcount().to_numpy()  # n-th of its class
    drawn = parent_rows[shuffled[np.argsort(turn, kind="stable")][: config.figure_parents]]
    shown = pairs[pairs["parent"].isin(drawn)]
    rows = np.concatenate([np.sort(drawn), shown["child"].to_numpy()])
    ids = data.tiles["tile_id"].to_numpy()
    places = pca.project(data.features[rows])
    if places.shape[1] < 2:
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    table = pd.DataFrame(
        {
            "tile_id": ids[rows],
            "parent_id": np.concatenate([np.full(len(drawn), None), ids[shown["parent"].to_numpy()]]),
            "role": ["parent"] * len(drawn) + ["child"] * len(shown),
            "label": data.tiles["label"].to_numpy()[rows],
            "x": places[:, 0],
            "y": places[:, 1],
        }
    )
    explained = [float(share) for share in pca.explained] + [0.0] * (2 - len(pca.explained))
    return table, {"explained": explained, "tiles": len(parent_rows) + len(child_rows), "parents_drawn": len(drawn)}
