"""From a bag of tokens to a slide's prediction: gated attention, or the mean and a linear model.

Both standardise the tokens by the slides that they are fitted on, kind by kind, and choose on the inner validation slides:
attention when to stop, the linear model its penalty. Neither is fitted again with the validation slides: both see the same ones.
Classification gives probabilities by softmax; regression is fitted to standardised values and gives them in their own unit.
`fit_attention` also trains the encoder or mixer of its tokens where that learns (`mad.evaluation.finetune`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mad.config.biomarkers import BiomarkersConfig
from mad.evaluation.bags import Bag, Scaling, fit_scaling
from mad.evaluation.tokens import EVERY, StoredTokens
from mad.files import MadError
from mad.models.mil import GatedAttention, pad_bags
from mad.training.average import MovingAverage

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is predicted."""

    truth: dict[str, float]
    """Slide -> code of its class, or its value."""
    classes: list[str] | None
    """Names in the order of the codes; None: a regression."""

    def of(self, bags: list[Bag]) -> Floats:
        """The truth of some slides [n]."""
        return np.array([self.truth[bag.slide_id] for bag in bags])


class Head(Protocol):
    """A fitted head."""

    @property
    def facts(self) -> dict[str, Any]:
        """What was chosen on the validation slides."""
        ...

    def predict(self, bag: Bag) -> tuple[Floats, NDArray[np.float32]]:
        """Probabilities of the classes [C], or the value [1], and the attention of the tokens [n], of sum 1."""
        ...


def fit_head(
    kind: str, fit: list[Bag], val: list[Bag], task: Task, settings: BiomarkersConfig, *,
    num_kinds: int, seed: int, device: str = "cpu",
) -> Head:  # fmt: skip
    """Fit a head of this kind ("attention" or "mean").

    Args:
        fit: slides to fit on.
        val: slides to choose on.
        task: the truth of both.
        settings: `biomarkers:`.
        num_kinds: kinds of token.
        seed: of weights, order and draws; on a CPU with one thread the same seed gives the same head.
        device: of an attention head.

    Raises:
        MadError: no slide to fit or to choose on.
    """
    check_slides(fit, val, task)
    scaling = fit_scaling(fit, num_kinds)
    if kind == "mean":
        return _fit_mean(fit, val, task, settings, scaling)
    return fit_attention(fit, val, task, settings, StoredTokens(scaling, device), seed)


def check_slides(fit: list[Bag], val: list[Bag], task: Task, what: str = "a head") -> None:
    """Fail where a head, `what` in the message, cannot be fitted.

    Raises:
        MadError: no slide to fit or to choose on, or a class without one to fit on.
    """
    if not fit or not val:
        raise MadError(f"{what}: needs slides to fit and to validate on; it has {len(fit)} and {len(val)}")
    if task.classes is not None and (lost := set(range(len(task.classes))) - {int(code) for code in task.of(fit)}):
        raise MadError(
            f"{what}: no slide of class {task.classes[min(lost)]!r} is left to fit on; where its slides lack tissue "
            "(report/qc.html), add patients of it, or leave it empty or merge it with another class in the cohort sheet"
        )


@dataclass(frozen=True)
class MeanHead:
    """Logistic or ridge regression on the mean of the standardised tokens, itself standardised."""

    model: Any
    scaling: Scaling
    centre: Floats
    spread: Floats
    facts: dict[str, Any]

    def predict(self, bag: Bag) -> tuple[Floats, NDArray[np.float32]]:
        pooled = (self.scaling(bag).mean(0, dtype=np.float64) - self.centre) / self.spread
        predict = getattr(self.model, "predict_proba", self.model.predict)
        return np.ravel(predict(pooled[None])), np.full(len(bag), 1 / len(bag), np.float32)


def _fit_mean(fit: list[Bag], val: list[Bag], task: Task, settings: BiomarkersConfig, scaling: Scaling) -> MeanHead:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import log_loss

    pooled = [np.stack([scaling(bag).mean(0, dtype=np.float64) for bag in bags]) for bags in (fit, val)]
    centre, spread = pooled[0].mean(0), pooled[0].std(0)
    spread[spread < 1e-9] = 1
    x, x_val = ((part - centre) / spread for part in pooled)
    y, y_val = task.of(fit), task.of(val)
    best: tuple[float, float, Any] | None = None
    for strength in sorted(settings.strengths, reverse=True):
        if task.classes is None:
            model = Ridge(alpha=strength * len(x)).fit(x, y)
            loss = float(np.mean((model.predict(x_val) - y_val) ** 2))
        else:
            model = LogisticRegression(C=1 / (strength * len(x)), max_iter=1000).fit(x, y.astype(int))
            loss = float(log_loss(y_val.astype(int), model.predict_proba(x_val), labels=range(len(task.classes))))
        if best is None or loss < best[0]:
            best = loss, strength, model
    assert best is not None
    return MeanHead(best[2], scaling, centre, spread, {"strength": best[1]})


@dataclass(frozen=True)
class AttentionHead:
    """Gated attention pooling."""

    model: GatedAttention
    tokens: StoredTokens
    centre: float
    spread: float
    """Of the values of a regression."""
    classes: int | None
    facts: dict[str, Any]

    @torch.no_grad()
    def predict(self, bag: Bag) -> tuple[Floats, NDArray[np.float32]]:
        output, attention = self.model(self.tokens([bag], [EVERY])[0])
        values = output.double().cpu()
        scores = values * self.spread + self.centre if self.classes is None else values.softmax(-1)
        return scores.numpy(), attention.float().cpu().numpy()

    def loss(self, output: Tensor, truth: Floats) -> Tensor:
        """Mean loss of outputs [b, C] (logits) or [b, 1] (standardised values)."""
        if self.classes is None:
            wanted = torch.from_numpy((truth - self.centre) / self.spread)
            return F.mse_loss(output[:, 0], wanted.to(output))
        return F.cross_entropy(output, torch.from_numpy(truth.astype(np.int64)).to(output.device))

    @torch.no_grad()
    def mean_loss(self, bags: list[Bag], truth: Floats) -> float:
        """Mean loss over whole slides, one at a time."""
        self.model.eval()
        outputs = [self.model(self.tokens([bag], [EVERY])[0])[0] for bag in bags]
        self.model.train()
        return float(self.loss(torch.stack(outputs), truth))


def fit_attention(
    fit: list[Bag], val: list[Bag], task: Task, settings: BiomarkersConfig, tokens: StoredTokens, seed: int,
    momentum: float | None = None, watch: Callable[[int, float], None] = lambda step, loss: None,
) -> AttentionHead:  # fmt: skip
    """Fit gated attention, and with it what of `tokens` learns, until the validation slides' loss no longer falls.

    Args:
        momentum: of a moving average of all that learns, which is then validated and kept.
        watch: is told the step and the loss at every look at the validation slides.

    Raises:
        MadError: the loss is never finite.
    """
    truth, truth_val, rng = task.of(fit), task.of(val), np.random.default_rng(seed)
    dim, outputs = fit[0].store.shape[1], 1 if task.classes is None else len(task.classes)
    spread = float(truth.std()) or 1.0
    batch = min(settings.batch, len(fit))
    with _seeded(seed, tokens.device):
        model = GatedAttention(dim, settings.hidden, outputs, dropout=settings.dropout).to(tokens.device).train()
        classes = None if task.classes is None else outputs
        head = AttentionHead(model, tokens, float(truth.mean()), spread, classes, {})
        learning = nn.ModuleList([model, tokens])
        groups = [{"params": list(model.parameters())}, *tokens.groups()]
        optimiser = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        average = MovingAverage(learning, momentum)
        best, best_step, state, queue = np.inf, 0, {}, np.empty(0, np.int64)
        for step in range(1, settings.steps + 1):
            while len(queue) < batch:
                queue = np.concatenate([queue, rng.permutation(len(fit))])
            chosen, queue = queue[:batch], queue[batch:]
            drawn = [fit[n] for n in chosen]
            bags = tokens(drawn, [tokens.draw(rng, bag, settings.max_tiles) for bag in drawn])
            loss = head.loss(model(*pad_bags(bags))[0], truth[chosen])
            optimiser.zero_grad()
            loss.backward()
            tokens.before_step(optimiser, step - 1, settings.steps)
            optimiser.step()
            average.update()
            if step % settings.check_every == 0 or step == settings.steps:
                with average.applied():
                    found = head.mean_loss(val, truth_val)
                    if found < best:
                        best, best_step = found, step
                        state = {name: tensor.clone() for name, tensor in learning.state_dict().items()}
                watch(step, found)
                if step - best_step >= settings.patience * settings.check_every:
                    break
    if not state:
        raise MadError("an attention head's loss is not finite; are the embeddings, or is biomarkers.lr too high?")
    learning.load_state_dict(state)
    model.eval()
    head.facts.update(steps=best_step)
    return head


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random stream (weights, dropout) at a seed, and as it was afterwards."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        yield
