"""Slide-level targets of the synthetic cohort, on request (`synthetic.targets`). Standard library only.

Each target is a score per slide, drawn from two normal distributions of variance 1 whose means lie `APART` away from each other,
one per class. The score moves latents of the slide; the class is told by nothing else. So the classes overlap: who read
every score exactly would reach an AUROC of Phi(APART / sqrt 2), .92, on average.

    ordered_fibrils  how much the fibrils run in one direction, which 40x shows and the area mean of 10x removes
    patchy_texture   patches of the architecture, which 10x and 2.5x show and which are too wide for 40x
    scales_agree     whether the spacing of the fibrils follows the period of the architecture around them (or its reverse);
                     over a slide either is distributed alike in both classes, so that neither magnification alone tells
    fibril_score     the score behind ordered_fibrils, a number

Which latent bears which target, and by how much the score moves it, was chosen by how well hand-made features of single tiles,
averaged over the slide, read it; never by how a method fares.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mad.config.synthetic import SyntheticConfig

TARGETS = ("ordered_fibrils", "patchy_texture", "scales_agree")
SCORE = "fibril_score"
APART = 2.0


def draw_target(config: SyntheticConfig, index: int, target: str) -> tuple[bool, float]:
    """The class of a slide and its score. Of slides 2n and 2n + 1 one is positive: by lot, and so on its own of other targets."""
    lot = random.Random(f"{config.seed}/{index // 2}/{target}").random() < 0.5
    positive = (index % 2 == 1) == lot
    noise = random.Random(f"{config.seed}/{index}/{target} score").gauss(0, 1)
    return positive, (APART / 2 if positive else -APART / 2) + noise


def best_auroc() -> float:
    """What the exact scores reach on average, Phi(APART / sqrt 2)."""
    return 0.5 * (1 + math.erf(APART / 2))


def target_columns(config: SyntheticConfig, index: int) -> dict[str, str]:
    """Column of the cohort sheet -> cell."""
    drawn = {target: draw_target(config, index, target) for target in TARGETS}
    cells = {target: str(int(positive)) for target, (positive, _) in drawn.items()}
    return {**cells, SCORE: f"{drawn[TARGETS[0]][1]:.4f}"}
