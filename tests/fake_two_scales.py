"""Simulated slides with a signal that lies in no magnification, only in how two of them go together.

Every slide has regions of one coarse tile and its 16 fine ones. The coarse tile of a region is of one of two kinds, half of each
slide's regions of either, and so are the fine ones. In slides of class 1 the kinds of coarse and fine agree within a region, in
class 0 they are opposite. So the bag of the coarse tiles is alike in both classes, that of the fine ones too, and so is their
union.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from mad.evaluation.bags import Bag
from mad.evaluation.slide_heads import Task
from mad.models.mixer import Mixer, MixerShape
from mad.training.region_data import SlideRegions, mean_and_std

DIM, REGIONS, CHILDREN, UNIT_UM = 16, 6, 16, 28.0
COARSE, FINE, REGION = 0, 1, 2
KINDS = np.tile([REGION, COARSE] + [FINE] * CHILDREN, REGIONS)  # of a mixer's tokens
SHAPE = MixerShape(
    dim=DIM, magnifications=[10.0, 40.0], unit_um=UNIT_UM, width=32, depth=2, heads=4, attention="region", pooling="token"
)  # fmt: skip


def two_scales(slides: int, seed: int) -> tuple[list[SlideRegions], Task]:
    """Slides of both classes by turns."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(DIM, 2)))[0].T
    truth = {f"S{n}": float(n % 2) for n in range(slides)}
    return [_slide(name, truth[name] == 1, axes, rng) for name in truth], Task(truth=truth, classes=["0", "1"])


def _slide(name: str, positive: bool, axes: np.ndarray, rng: np.random.Generator) -> SlideRegions:
    coarse = rng.permutation([1, -1] * (REGIONS // 2))
    fine = coarse if positive else -coarse
    signal = np.concatenate(
        [[2 * c * axes[0], *[2 * f * axes[1]] * CHILDREN] for c, f in zip(coarse, fine, strict=True)]
    )
    vectors = (signal + 0.5 * rng.normal(size=signal.shape)).astype(np.float32)
    child = np.arange(CHILDREN)
    x = np.concatenate([[2.0], child % 4 + 0.5])[None] + 4 * np.arange(REGIONS)[:, None]
    y = np.tile(np.concatenate([[2.0], child // 4 + 0.5]), REGIONS)
    side = np.tile([4.0] + [1.0] * CHILDREN, REGIONS)
    n = len(vectors)
    return SlideRegions(
        slide_id=name,
        table=pd.DataFrame({"tile_id": [f"{name}_{row}" for row in range(n)]}),
        bounds=np.arange(REGIONS + 1) * (1 + CHILDREN),
        row=np.arange(n),
        scale=np.tile([COARSE] + [FINE] * CHILDREN, REGIONS),
        place=np.tile([-1, *child], REGIONS),
        where=UNIT_UM * np.stack([x.ravel(), y, side], 1),
        vectors=vectors,
        key=name,
    )


def random_mixer(slides: list[SlideRegions], seed: int) -> Mixer:
    """An untrained mixer that standardises by some slides."""
    torch.manual_seed(seed)
    mixer = Mixer(SHAPE)
    for own, found in zip((mixer.mean, mixer.std), mean_and_std(slides, 2), strict=True):
        own.copy_(found)
    return mixer.eval()


def make_bags(
    slides: list[SlideRegions], stores: list[np.ndarray], kinds: np.ndarray, wanted: tuple[int, ...]
) -> list[Bag]:
    """The rows of some kinds."""
    rows = np.flatnonzero(np.isin(kinds, wanted))
    return [
        Bag(slide_id=slide.slide_id, store=store, rows=rows, kind=kinds[rows], names=rows.astype(object),
            tiles=len(rows), regions=slide)
        for slide, store in zip(slides, stores, strict=True)
    ]  # fmt: skip
