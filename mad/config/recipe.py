"""The recipe of a run: everything that decides the trained weights except the data, as one sorted dictionary.

Snakemake freezes it into `train/{run}/recipe.json` while it parses, so this module imports neither torch nor pandas. Two
runs with equal recipe and equal data are the same run: one may resume or reuse the other's files.
"""

from __future__ import annotations

import json
from typing import Any

from mad.config.model import Config

VERSION = 1  # raised when the code changes what an unchanged configuration trains
SINCE = {
    "targets": "tile",
    "parent_weight": 1.0,
}  # keys that came later: at these values a recipe is what it was before


def freeze_recipe(config: Config, name: str) -> dict[str, Any]:
    """The recipe of run `name`: its entry without `runtime`, the tiles' side, the ladder and the seed.

    That of a run with method `xmag` holds its teacher's entry of `encoders:` too; others have no `distill`.

    Returns:
        A dictionary of JSON values with sorted keys.

    Raises:
        MadError: `runs` has no such entry.
    """
    run = config.run(name)
    left_out: dict[str, Any] = {"runtime": True, "seed": True}
    left_out |= {"distill": True} if run.distill is None else {}
    left_out |= {key: True for key, before in SINCE.items() if getattr(run, key) == before}
    left_out |= {"backbone": {"mean", "std"}} if run.backbone.mean is None else {}  # as those of SINCE
    entry = run.model_dump(mode="json", exclude=left_out)
    recipe = {
        "version": VERSION,
        "run": entry,
        "tile_px": config.tile.tile_px,
        "magnifications": [float(value) for value in config.tile.magnifications],
        "seed": config.seed if run.seed is None else run.seed,
    }
    if run.distill is not None:
        recipe["teacher"] = config.encoder(run.distill.teacher).model_dump(mode="json", exclude={"batch"})
    sorted_recipe: dict[str, Any] = json.loads(json.dumps(recipe, sort_keys=True))
    return sorted_recipe
