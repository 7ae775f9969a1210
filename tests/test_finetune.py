"""Encoder and attention head trained together: what learns, how fast, from where, and that it pays where only learning can."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import roc_auc_score

from mad.config.biomarkers import BiomarkersConfig, FinetuneConfig
from mad.config.encoders import EncoderConfig
from mad.evaluation.bags import Bag, Scaling, fit_scaling
from mad.evaluation.encoded_tokens import EncodedTokens
from mad.evaluation.finetune import fit_finetuned, load_head, save_head
from mad.evaluation.slide_heads import Task, fit_attention, fit_head
from mad.evaluation.tokens import EVERY
from mad.files import MadError
from mad.models.encoders import TimmEncoder
from mad.training.average import MovingAverage
from mad.training.optimiser import layer_of

SIDE = 16
SETTINGS = BiomarkersConfig(steps=40, lr=5e-3, hidden=16, max_tiles=6, batch=8, dropout=0.1, weight_decay=0.0)


def make_encoder(seed: int = 0, blind: bool = False) -> TimmEncoder:
    """A small vision transformer with random weights; `blind`: to blue, by the weights of its patches."""
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=SIDE, patch_size=8)
    if blind:
        with torch.no_grad():
            model.patch_embed.proj.weight[:, 2] = 0
    return TimmEncoder(model, EncoderConfig(name="e", spec="random:e", precision="fp32"), SIDE)


class Cohort:
    """Slides of `tiles` tiles of noise; in every other one a third of the tiles are bluer."""

    def __init__(self, encoder: TimmEncoder, *, slides: int = 30, tiles: int = 9, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.images = {f"S{n}": rng.integers(60, 200, (tiles, SIDE, SIDE, 3), dtype=np.uint8) for n in range(slides)}
        self.task = Task(truth={name: float(n % 2) for n, name in enumerate(self.images)}, classes=["0", "1"])
        for name, images in self.images.items():
            if self.task.truth[name]:
                images[: tiles // 3, ..., 2] += 50
        self.bags = [self.bag(name, encoder) for name in self.images]
        part = 3 * slides // 5
        self.fit, self.val, self.test = self.bags[:part], self.bags[part : part + 6], self.bags[part + 6 :]

    def bag(self, name: str, encoder: TimmEncoder) -> Bag:
        store = encoder(self.images[name])
        names = np.array([f"{name}_{n}" for n in range(len(store))], object)
        rows, kind = np.arange(len(store)), np.zeros(len(store), np.int64)
        return Bag(slide_id=name, store=store, rows=rows, kind=kind, names=names, tiles=len(store))

    def pixels(self, bag: Bag, places: Any = EVERY) -> np.ndarray:
        wanted = [int(name.split("_")[1]) for name in bag.names[places]]
        return self.images[bag.slide_id][wanted]

    def finetuned(
        self, encoder: TimmEncoder, seed: int = 0, settings: BiomarkersConfig = SETTINGS, **config: Any
    ) -> Any:
        self.looks: list[tuple[int, float]] = []
        return fit_finetuned(
            self.fit, self.val, self.test, self.task, settings, FinetuneConfig(**config),
            learner=self.learner(encoder, **config), num_kinds=1, seed=seed, watch=lambda *look: self.looks.append(look),
        )  # fmt: skip

    def learner(self, encoder: TimmEncoder, **config: Any) -> Any:
        def start(scaling: Scaling, seed: int) -> EncodedTokens:
            return EncodedTokens(scaling, "cpu", encoder, self.pixels, FinetuneConfig(**config), seed)

        return start

    def tokens(self, encoder: TimmEncoder, **config: Any) -> EncodedTokens:
        return self.learner(encoder, **config)(fit_scaling(self.fit, 1), 0)

    def auroc(self, head: Any) -> float:
        return float(roc_auc_score(self.task.of(self.test), [head.predict(bag)[0][1] for bag in self.test]))


def gradients(tokens: EncodedTokens, cohort: Cohort) -> dict[str, torch.Tensor]:
    """Of the sum of squares of some tokens of two slides."""
    found = tokens(cohort.bags[:2], [np.array([4, 0, 7]), EVERY])
    assert [len(part) for part in found] == [3, 9]
    sum(part.square().sum() for part in found).backward()
    return {name: p.grad.clone() for name, p in tokens.network.named_parameters() if p.grad is not None}


def test_gradients_reach_every_layer_and_do_not_depend_on_checkpointing():
    encoder = make_encoder()
    cohort = Cohort(encoder)
    plain = gradients(cohort.tokens(encoder, turns=False, checkpointing=False), cohort)
    again = gradients(cohort.tokens(encoder, turns=False, pass_tiles=5), cohort)
    assert set(plain) == {name for name, _ in encoder.model.named_parameters()}
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(again[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_tokens_begin_as_the_stored_ones():
    encoder = make_encoder()
    cohort = Cohort(encoder)
    tokens, places = cohort.tokens(encoder, turns=False), np.array([8, 2])
    stored = fit_scaling(cohort.fit, 1)(cohort.bags[3], places)
    np.testing.assert_allclose(tokens([cohort.bags[3]], [places])[0].detach().numpy(), stored, atol=2e-4)
    turning = cohort.tokens(encoder)
    assert not np.allclose(turning([cohort.bags[3]], [places])[0].detach().numpy(), stored, atol=0.1)
    with torch.no_grad():  # validation and test see them as they are
        np.testing.assert_allclose(turning([cohort.bags[3]], [places])[0].numpy(), stored, atol=2e-4)


def test_checkpointing_keeps_fewer_activations():
    encoder = make_encoder()
    cohort = Cohort(encoder)

    def kept(checkpointing: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = cohort.tokens(encoder, checkpointing=checkpointing, pass_tiles=3)
        weights = {p.untyped_storage().data_ptr() for p in tokens.network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = tokens(cohort.bags[:4], [EVERY] * 4)
        total = sum(size for place, size in sizes.items() if place not in weights)
        del out
        return total

    assert kept(True) < kept(False) / 20


@pytest.mark.parametrize("frozen", [0, 2])
def test_layers_learn_at_their_own_rate_and_frozen_ones_not_at_all(frozen: int):
    """AdamW's first step moves every weight by its learning rate, whatever the gradient."""
    encoder = make_encoder()
    cohort = Cohort(encoder)
    tokens = cohort.tokens(encoder, lr=1e-3, layer_decay=0.5, frozen_layers=frozen, warmup=0)
    settings = SETTINGS.model_copy(update={"steps": 1})
    fit_attention(cohort.fit, cohort.val, cohort.task, settings, tokens, 0)
    layers, before = layer_of(encoder.model), dict(encoder.model.named_parameters())
    top = max(layers.values())
    for name, parameter in tokens.network.named_parameters():
        moved = float((parameter - before[name]).abs().max().detach())
        if layers[name] < frozen:
            assert moved == 0 and not parameter.requires_grad, name
        else:
            assert moved == pytest.approx(1e-3 * 0.5 ** (top - layers[name]), rel=0.02), name


def test_rates_rise_and_fall_and_the_gradient_is_clipped():
    encoder = make_encoder()
    cohort = Cohort(encoder)
    tokens = cohort.tokens(encoder, lr=1e-3, layer_decay=1.0, warmup=4, clip=1e-3)
    optimiser = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))]}, *tokens.groups()], lr=0.5)
    gradients(tokens, cohort)
    rates = []
    for step in range(20):
        tokens.before_step(optimiser, step, 20)
        assert optimiser.param_groups[0]["lr"] == 0.5
        rates.append({group["lr"] for group in optimiser.param_groups[1:]})
    assert all(len(rate) == 1 for rate in rates)
    flat = [rate.pop() for rate in rates]
    assert flat[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3]) and flat[-1] == pytest.approx(0, abs=1e-12)
    assert flat[3:] == sorted(flat[3:], reverse=True)
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in tokens.learning]))
    assert float(norm) == pytest.approx(1e-3, rel=0.01)
    assert {g["weight_decay"] for g in optimiser.param_groups[1:] if g["params"][0].ndim < 2} == {0.0}


@pytest.mark.parametrize("task", ["classes", "number"])
def test_without_a_learning_rate_it_is_the_frozen_head(task: str):
    encoder = make_encoder()
    cohort = Cohort(encoder)
    if task == "number":
        cohort.task = Task(truth={name: float(n % 5) for n, name in enumerate(cohort.images)}, classes=None)
    frozen = fit_head("attention", cohort.fit, cohort.val, cohort.task, SETTINGS, num_kinds=1, seed=3)
    tuned = cohort.finetuned(encoder, seed=3, lr=0, turns=False)
    assert tuned.facts == {"steps": frozen.facts["steps"], "encoder_change": 0.0}
    for bag in cohort.test:
        for one, other in zip(frozen.predict(bag), tuned.predict(bag), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_blind_encoder_does_not_see_it_learns_to_see(seed: int):
    encoder = make_encoder(seed, blind=True)
    cohort = Cohort(encoder, slides=60, seed=seed)
    settings = SETTINGS.model_copy(update={"steps": 60})
    frozen = fit_head("attention", cohort.fit, cohort.val, cohort.task, settings, num_kinds=1, seed=seed)
    tuned = cohort.finetuned(encoder, seed, settings, lr=1e-3, layer_decay=1.0, warmup=5)
    assert cohort.auroc(frozen) < 0.8
    assert [step for step, _ in cohort.looks] == [10, 20, 30, 40, 50, 60]
    assert dict(cohort.looks)[tuned.facts["steps"]] == min(loss for _, loss in cohort.looks)
    assert cohort.auroc(tuned) > 0.95 and tuned.facts["encoder_change"] > 0.01
    assert not encoder.model.patch_embed.proj.weight[:, 2].any()  # the given one is left as it is


def test_the_same_seed_gives_the_same_head():
    encoder = make_encoder()
    cohort = Cohort(encoder)
    settings = SETTINGS.model_copy(update={"steps": 10})
    one, same, other = (
        cohort.finetuned(encoder, seed, settings, lr=1e-3).predict(cohort.test[0])[0] for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_own_steps_batch_and_tiles_replace_the_heads():
    encoder = make_encoder()
    cohort, asked = Cohort(encoder), []
    pixels = cohort.pixels
    cohort.pixels = lambda bag, places=EVERY: asked.append(places) or pixels(bag, places)  # type: ignore[method-assign]
    cohort.finetuned(encoder, lr=1e-3, steps=2, batch=3, max_tiles=4)
    drawn = [places for places in asked if not isinstance(places, slice)]
    assert len(drawn) == 2 * 3 and all(len(places) == 4 for places in drawn)


def test_parts_of_a_slide_are_told_as_they_are_in_the_whole(tmp_path: Path):
    encoder = make_encoder()
    cohort = Cohort(encoder)
    head = cohort.finetuned(encoder, lr=1e-3, steps=10)
    whole = cohort.test[1]
    places = np.array([1, 4, 5])
    part = Bag(
        slide_id=whole.slide_id, store=whole.store, rows=whole.rows[places], kind=whole.kind[places],
        names=whole.names[places], tiles=3,
    )  # fmt: skip
    own = head.embedded[whole.slide_id]
    alone = Bag(slide_id="x", store=own.store[places], rows=np.arange(3), kind=part.kind, names=part.names, tiles=3)
    for one, other in zip(head.predict(part), head.head.predict(alone), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(KeyError):
        head.predict(cohort.fit[0])

    save_head(head, tmp_path / "0-0.safetensors", {"seed": 1})

    def load(name: str, seed: int) -> Any:
        return load_head(tmp_path / name, {"seed": seed}, cohort.test, cohort.learner(encoder), seed, "cpu")

    read = load("0-0.safetensors", 1)
    assert read is not None and read.facts == head.facts
    for bag in cohort.test:
        assert all(np.array_equal(*both) for both in zip(read.predict(bag), head.predict(bag), strict=True))
    assert load("0-0.safetensors", 2) is None and load("0-1.safetensors", 1) is None


def test_the_moving_average_is_validated_and_kept():
    network = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 2.0]]))
        average = MovingAverage(network, 0.75)
        network.weight.copy_(torch.tensor([[5.0, 2.0]]))
    average.update()
    with average.applied():
        assert network.weight.tolist() == [[2.0, 2.0]]
    assert network.weight.tolist() == [[5.0, 2.0]]
    encoder = make_encoder()
    cohort = Cohort(encoder)
    live, mean = (cohort.finetuned(encoder, lr=1e-3, steps=5, ema=ema) for ema in (None, 0.9))
    assert 0 < mean.facts["encoder_change"] < 0.5 * live.facts["encoder_change"]


def test_an_encoder_without_a_layer_that_learns_is_refused():
    encoder = make_encoder()
    with pytest.raises(MadError, match=r"finetune.frozen_layers: 99 leaves nothing to learn"):
        Cohort(encoder).tokens(encoder, frozen_layers=99)
