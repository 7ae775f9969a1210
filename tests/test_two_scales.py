"""The method's own proof: a signal that lies in no magnification, only in how two of them go together.

Every slide has regions of one coarse tile and its 16 fine ones. The coarse tile of a region is of one of two kinds, half of each
slide's regions of either, and so are the fine ones. In slides of class 1 the kinds of coarse and fine agree within a region, in
class 0 they are opposite. So the bag of the coarse tiles is alike in both classes, that of the fine ones too, and so is their
union.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mad.config.biomarkers import BiomarkersConfig
from mad.config.regions import MixerConfig
from mad.evaluation.bags import Bag
from mad.evaluation.slide_heads import Task, fit_head
from mad.models.mixer import Mixer, MixerShape
from mad.stages.mix import contextual_tokens
from mad.training.mixing import train_mixer
from mad.training.region_data import SlideRegions, mean_and_std

BAGS, FIT, VAL = 300, 150, 50
DIM, REGIONS, CHILDREN, UNIT_UM = 16, 6, 16, 28.0
COARSE, FINE, REGION = 0, 1, 2
SETTINGS = BiomarkersConfig(steps=300, lr=3e-3, hidden=32, max_tiles=None, dropout=0.1, patience=10)


def _slide(number: int, positive: bool, axes: np.ndarray, rng: np.random.Generator) -> SlideRegions:
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
        slide_id=f"S{number}",
        table=pd.DataFrame({"tile_id": [f"S{number}_{row}" for row in range(n)]}),
        bounds=np.arange(REGIONS + 1) * (1 + CHILDREN),
        row=np.arange(n),
        scale=np.tile([COARSE] + [FINE] * CHILDREN, REGIONS),
        place=np.tile([-1, *child], REGIONS),
        where=UNIT_UM * np.stack([x.ravel(), y, side], 1),
        vectors=vectors,
        key=str(number),
    )


def _bags(
    slides: list[SlideRegions], stores: list[np.ndarray], kinds: np.ndarray, wanted: tuple[int, ...]
) -> list[Bag]:
    rows = np.flatnonzero(np.isin(kinds, wanted))
    return [
        Bag(slide_id=s.slide_id, store=store, rows=rows, kind=kinds[rows], names=rows.astype(object), tiles=len(rows))
        for s, store in zip(slides, stores, strict=True)
    ]


def _mixer(slides: list[SlideRegions], steps: int, seed: int, folder: Path) -> Mixer:
    entry = MixerConfig(name="m", encoder="e", width=32, depth=2, heads=4, steps=steps, batch=64, lr=2e-3, warmup=20)
    torch.manual_seed(seed)
    shape = MixerShape(
        dim=DIM,
        magnifications=[10.0, 40.0],
        unit_um=UNIT_UM,
        width=32,
        depth=2,
        heads=4,
        attention="region",
        pooling="token",
    )
    mixer = Mixer(shape)
    mean, std = mean_and_std(slides[:FIT], 2)
    mixer.mean.copy_(mean)
    mixer.std.copy_(std)
    train, held_out = (
        [(s, r) for s in part for r in range(REGIONS)] for part in (slides[:FIT], slides[FIT : FIT + VAL])
    )
    train_mixer(mixer, entry, seed, train, held_out, folder, {"recipe_digest": "a", "data_digest": "b"})
    return mixer.eval()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mixing_finds_what_no_magnification_shows(seed: int, tmp_path: Path):
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(DIM, 2)))[0].T
    truth = np.arange(BAGS) % 2
    slides = [_slide(n, bool(truth[n]), axes, rng) for n in range(BAGS)]
    task = Task(truth={s.slide_id: float(label) for s, label in zip(slides, truth, strict=True)}, classes=["0", "1"])

    def auroc(bags: list[Bag]) -> float:
        head = fit_head("attention", bags[:FIT], bags[FIT : FIT + VAL], task, SETTINGS, num_kinds=3, seed=seed)
        test = bags[FIT + VAL :]
        return float(roc_auc_score(truth[FIT + VAL :], [head.predict(bag)[0][1] for bag in test]))

    plain = [slide.vectors for slide in slides]
    found = {
        name: auroc(_bags(slides, plain, slides[0].scale, wanted))
        for name, wanted in (("finest", (FINE,)), ("coarsest", (COARSE,)), ("union", (COARSE, FINE)))
    }
    assert max(found.values()) < 0.66, found
    mixer = _mixer(slides, 150, seed, tmp_path)
    kinds = np.tile([REGION, COARSE] + [FINE] * CHILDREN, REGIONS)
    mixed = auroc(_bags(slides, [contextual_tokens(mixer, slide) for slide in slides], kinds, (COARSE, FINE)))
    assert mixed > 0.9, (mixed, found)
