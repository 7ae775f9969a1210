"""The method's own proof: a signal that lies in no magnification, only in how two of them go together (`fake_two_scales`)."""

from pathlib import Path

import pytest
from fake_two_scales import COARSE, FINE, KINDS, REGIONS, make_bags, random_mixer, two_scales
from sklearn.metrics import roc_auc_score

from mad.config.biomarkers import BiomarkersConfig
from mad.config.regions import MixerConfig
from mad.evaluation.bags import Bag
from mad.evaluation.slide_heads import fit_head
from mad.models.mixer import Mixer
from mad.stages.mix import contextual_tokens
from mad.training.mixing import train_mixer
from mad.training.region_data import SlideRegions

BAGS, FIT, VAL = 300, 150, 50
SETTINGS = BiomarkersConfig(steps=300, lr=3e-3, hidden=32, max_tiles=None, dropout=0.1, patience=10)


def _mixer(slides: list[SlideRegions], steps: int, seed: int, folder: Path) -> Mixer:
    entry = MixerConfig(name="m", encoder="e", width=32, depth=2, heads=4, steps=steps, batch=64, lr=2e-3, warmup=20)
    mixer = random_mixer(slides[:FIT], seed)
    train, held_out = (
        [(s, r) for s in part for r in range(REGIONS)] for part in (slides[:FIT], slides[FIT : FIT + VAL])
    )
    train_mixer(mixer, entry, seed, train, held_out, folder, {"recipe_digest": "a", "data_digest": "b"})
    return mixer.eval()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mixing_finds_what_no_magnification_shows(seed: int, tmp_path: Path):
    slides, task = two_scales(BAGS, seed)

    def auroc(bags: list[Bag]) -> float:
        head = fit_head("attention", bags[:FIT], bags[FIT : FIT + VAL], task, SETTINGS, num_kinds=3, seed=seed)
        test = bags[FIT + VAL :]
        return float(roc_auc_score(task.of(test), [head.predict(bag)[0][1] for bag in test]))

    plain = [slide.vectors for slide in slides]
    found = {
        name: auroc(make_bags(slides, plain, slides[0].scale, wanted))
        for name, wanted in (("finest", (FINE,)), ("coarsest", (COARSE,)), ("union", (COARSE, FINE)))
    }
    assert max(found.values()) < 0.66, found
    mixer = _mixer(slides, 150, seed, tmp_path)
    mixed = auroc(make_bags(slides, [contextual_tokens(mixer, slide) for slide in slides], KINDS, (COARSE, FINE)))
    assert mixed > 0.9, (mixed, found)
