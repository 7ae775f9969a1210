"""Mixer and attention head trained together: which layers learn, what is mixed, and that only learning finds it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_two_scales import CHILDREN, COARSE, FINE, KINDS, REGION, REGIONS, make_bags, random_mixer, two_scales
from sklearn.metrics import roc_auc_score

from mad.config.biomarkers import BiomarkersConfig, FinetuneConfig
from mad.evaluation.bags import Bag, Scaling, fit_scaling
from mad.evaluation.finetune import FinetunedHead, fit_finetuned
from mad.evaluation.mixed_tokens import MixedTokens, layers_of, passes
from mad.evaluation.slide_heads import Task, fit_attention, fit_head
from mad.evaluation.tokens import EVERY, StoredTokens
from mad.files import MadError
from mad.models.mixer import Mixer
from mad.stages.mix import contextual_tokens
from mad.stages.slide_tokens import thinned

ALL = (COARSE, FINE)
SETTINGS = BiomarkersConfig(steps=30, lr=5e-3, hidden=16, max_tiles=20, batch=4, dropout=0.1)
TILES = 1 + CHILDREN  # of a region


class Cohort:
    """Slides whose signal lies between the scales, under an untrained mixer; some tiles of the first slide are missing."""

    def __init__(
        self, slides: int = 16, fit: int = 8, val: int = 4, seed: int = 0, wanted: tuple[int, ...] = ALL
    ) -> None:
        regions, self.task = two_scales(slides, seed)
        self.mixer = random_mixer(regions[:fit], seed)
        kept = np.ones(len(regions[0].row), bool)
        kept[[0, 5, *range(TILES, 2 * TILES), -1]] = False  # a coarse tile, a region and two fine ones
        regions[0] = thinned(regions[0], kept)
        sizes = np.diff(regions[0].bounds)
        ragged = np.insert(regions[0].scale, regions[0].bounds[:-1], REGION)
        stores = [contextual_tokens(self.mixer, slide) for slide in regions]
        self.bags = make_bags(regions[:1], stores[:1], ragged, wanted) + make_bags(
            regions[1:], stores[1:], KINDS, wanted
        )
        assert sizes.tolist() == [TILES - 2, *[TILES] * (REGIONS - 3), TILES - 1]
        self.fit, self.val, self.test = self.bags[:fit], self.bags[fit : fit + val], self.bags[fit + val :]

    def tokens(self, mixer: Mixer | None = None, **config: Any) -> MixedTokens:
        return MixedTokens(fit_scaling(self.fit, 3), "cpu", mixer or self.mixer, FinetuneConfig(**config))

    def finetuned(self, seed: int = 0, settings: BiomarkersConfig = SETTINGS, **given: Any) -> FinetunedHead:
        config = FinetuneConfig(**given)

        def learner(scaling: Scaling, seed: int) -> MixedTokens:
            return MixedTokens(scaling, "cpu", self.mixer, config)

        return fit_finetuned(
            self.fit, self.val, self.test, self.task, settings, config, learner=learner, num_kinds=3, seed=seed
        )

    def auroc(self, head: Any) -> float:
        return float(roc_auc_score(self.task.of(self.test), [head.predict(bag)[0][1] for bag in self.test]))


def gradients(tokens: MixedTokens, bags: list[Bag]) -> dict[str, torch.Tensor]:
    """Of the sum of cubes of some tokens of two slides."""
    sum(part.pow(3).sum() for part in tokens(bags[:2], [np.array([40, 0, 7]), EVERY])).backward()
    return {name: p.grad.clone() for name, p in tokens.network.named_parameters() if p.grad is not None}


def test_gradients_reach_all_that_tokens_depend_on_and_no_decoder():
    cohort = Cohort()
    plain = gradients(cohort.tokens(checkpointing=False, pass_tiles=1000), cohort.bags)
    again = gradients(cohort.tokens(pass_tiles=40), cohort.bags)
    names = {name for name, _ in cohort.mixer.named_parameters()}
    assert names - set(plain) == {name for name in names if name.startswith(("decoder", "mask", "outputs"))}
    for name, gradient in plain.items():
        if not name.endswith(
            "key_value.bias"
        ):  # half of it, the keys', has none: it shifts all scores of a query alike
            assert (gradient != 0).any(-1).all(), name
        torch.testing.assert_close(again[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_checkpointing_keeps_fewer_activations():
    cohort = Cohort()

    def kept(checkpointing: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = cohort.tokens(checkpointing=checkpointing, pass_tiles=TILES)
        weights = {p.untyped_storage().data_ptr() for p in tokens.network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = tokens(cohort.bags[:4], [EVERY] * 4)
        total = sum(size for place, size in sizes.items() if place not in weights)
        del out
        return total

    assert kept(True) < kept(False) / 10


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_layers_learn_at_their_own_rate_and_frozen_ones_not_at_all(frozen: int):
    """AdamW's first step moves every weight by its learning rate, whatever the gradient."""
    cohort = Cohort()
    tokens = cohort.tokens(lr=1e-3, layer_decay=0.5, frozen_layers=frozen, warmup=0)
    settings = SETTINGS.model_copy(update={"steps": 1, "weight_decay": 0.0})
    fit_attention(cohort.fit, cohort.val, cohort.task, settings, tokens, 0)
    layers, before = layers_of(cohort.mixer), dict(cohort.mixer.named_parameters())
    assert {layers[name] for name in ("embed.weight", "embed_norm.bias", "magnification", "region")} == {0}
    assert layers["blocks.0.mlp.0.weight"] == 1 and layers["blocks.1.norm.bias"] == layers["norm.weight"] == 2
    for name, parameter in tokens.network.named_parameters():
        moved = float((parameter - before[name]).abs().max().detach())
        if layers.get(name, -1) < frozen:
            assert moved == 0 and not parameter.requires_grad, name
        else:
            assert moved == pytest.approx(1e-3 * 0.5 ** (2 - layers[name]), rel=0.02), name


def test_a_mixer_without_a_layer_that_learns_is_refused():
    with pytest.raises(MadError, match=r"finetune.frozen_layers: 3 leaves nothing to learn: the mixer has 3 layers"):
        Cohort().tokens(frozen_layers=3)


@pytest.mark.parametrize("wanted", [ALL, (FINE,), (COARSE,), (REGION,), (*ALL, REGION)])
@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_tokens_are_those_that_stage_mix_would_write(wanted: tuple[int, ...], pooling: str):
    """Of other weights than those that standardise them, in any order, from ragged regions, in several passes."""
    cohort = Cohort(wanted=wanted)
    other = random_mixer([bag.regions for bag in cohort.bags if bag.regions], seed=5)
    other.shape = replace(other.shape, pooling=pooling)
    tokens = cohort.tokens(other, pass_tiles=50)
    bags, rng = [cohort.bags[0], cohort.bags[3]], np.random.default_rng(0)
    places = [rng.permutation(len(bags[0]))[:9], EVERY]
    for bag, some, found in zip(bags, places, tokens(bags, places), strict=True):
        assert bag.regions is not None
        stored = replace(bag, store=contextual_tokens(other, bag.regions))
        np.testing.assert_allclose(found.detach().numpy(), tokens.scaling(stored, some), atol=1e-4)


def test_a_step_draws_whole_regions_and_mixes_no_other(monkeypatch: pytest.MonkeyPatch):
    cohort, mixed = Cohort(), []
    tokens, bag, rng = cohort.tokens(), cohort.bags[2], np.random.default_rng(0)
    real = tokens.network.forward
    monkeypatch.setattr(
        tokens.network, "forward", lambda batch: mixed.extend(batch.present.sum(1).tolist()) or real(batch)
    )
    counts = np.zeros(len(bag))
    for _ in range(300):
        places = tokens.draw(rng, bag, 20)
        assert isinstance(places, np.ndarray) and len(set(places)) == 20
        assert len(set(places // TILES)) == 2  # 17 of the one and 3 of the other, or any of both
        counts[places] += 1
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()
    tokens([bag], [places])
    assert mixed == [TILES, TILES]
    one = tokens.draw(rng, bag, TILES)
    assert len(set(one // TILES)) == 1 and len(set(one)) == TILES
    assert tokens.draw(rng, bag, None) == tokens.draw(rng, bag, len(bag)) == EVERY
    regions = Cohort(wanted=(REGION,))
    assert len(set(regions.tokens().draw(rng, regions.bags[2], 4))) == 4


def test_what_does_not_learn_draws_as_a_frozen_row_does():
    cohort = Cohort()
    stored, still = StoredTokens(fit_scaling(cohort.fit, 3), "cpu"), cohort.tokens(lr=0)
    for most in (None, 20, 1000):
        one, other = (tokens.draw(np.random.default_rng(3), cohort.bags[2], most) for tokens in (stored, still))
        assert np.array_equal(one, other)


def test_passes_hold_whole_regions_within_their_tiles():
    (slide, *_), _ = two_scales(1, 0)
    kept = np.ones(len(slide.row), bool)
    kept[:10] = False
    slide = thinned(slide, kept)  # 7, 17, 17, ...
    regions = [(slide, n) for n in range(len(slide))]
    assert [len(part) for part in passes(regions, 34)] == [2, 2, 2]
    assert [len(part) for part in passes(regions, 3)] == [1] * 6
    assert [n for part in passes(regions, 60) for _, n in part] == list(range(6))


@pytest.mark.parametrize("task", ["classes", "number"])
def test_without_a_learning_rate_it_is_the_frozen_head(task: str):
    cohort = Cohort()
    if task == "number":
        cohort.task = Task(truth={name: float(n % 5) for n, name in enumerate(cohort.task.truth)}, classes=None)
    frozen = fit_head("attention", cohort.fit, cohort.val, cohort.task, SETTINGS, num_kinds=3, seed=3)
    tuned = cohort.finetuned(3, lr=0)
    assert tuned.facts == {"steps": frozen.facts["steps"], "mixer_change": 0.0}
    for bag in cohort.test:
        for one, other in zip(frozen.predict(bag), tuned.predict(bag), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)


def test_the_same_seed_gives_the_same_head():
    cohort = Cohort()
    one, same, other = (cohort.finetuned(seed, lr=1e-3).predict(cohort.test[0])[0] for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_random_mixer_does_not_relate_it_learns_to_relate(seed: int):
    """Only how coarse and fine go together tells the class; held-out slides."""
    cohort = Cohort(300, 150, 50, seed)
    before = {name: weights.clone() for name, weights in cohort.mixer.state_dict().items()}
    settings = SETTINGS.model_copy(
        update={"steps": 250, "lr": 3e-3, "hidden": 32, "max_tiles": None, "batch": 16, "check_every": 25}
    )
    frozen = fit_head("attention", cohort.fit, cohort.val, cohort.task, settings, num_kinds=3, seed=seed)
    tuned = cohort.finetuned(seed, settings, lr=3e-3, layer_decay=1.0, checkpointing=False, pass_tiles=2000)
    assert cohort.auroc(frozen) < 0.66
    assert cohort.auroc(tuned) > 0.95 and tuned.facts["mixer_change"] > 0.01
    assert all(torch.equal(before[name], weights) for name, weights in cohort.mixer.state_dict().items())
