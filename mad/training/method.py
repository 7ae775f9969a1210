"""What a method is to the loop: targets and a loss for each step, and figures that tell how the run is doing.

`SelfDistillation` is `mad`, `mad_global` and `dinov2`: the teacher is the student's moving average. `mad.training.distill` has
`xmag`, whose teacher is a frozen encoder; there the moving average is only what is exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from mad.config.training import RunConfig
from mad.models.heads import Network
from mad.training.batch import Batch
from mad.training.health import HealthSet, check_health
from mad.training.objective import Numerics, StepLoss, Targets, step_loss, teach
from mad.training.schedule import linear

Figures = dict[str, float | None]


class Losses(Protocol):
    """A dataclass of scalar tensors: `total` is minimised, the others are told."""

    @property
    def total(self) -> Tensor:
        """The loss."""
        ...


class HeldOut(Protocol):
    """Samples that never train, for the figures of the checks."""

    @property
    def source(self) -> str:
        """The split that they are of."""
        ...

    @property
    def kind(self) -> str:
        """That of the samples."""
        ...

    @property
    def digest(self) -> str:
        """Tells another set from this one."""
        ...


class Method(Protocol):
    """All that differs between methods while a run trains; `student` and its moving `average` are networks of the method's own."""

    @property
    def numerics(self) -> Numerics:
        """How images become tensors, and where."""
        ...

    @property
    def health(self) -> HeldOut:
        """What `check` looks at."""
        ...

    def teach(self, student: Any, average: Any, batches: list[Batch], step: int) -> list[Any]:
        """Targets of the batches that one step accumulates, for `loss`; None where a batch needs none of the others."""
        ...

    def loss(self, network: nn.Module, average: Any, batch: Batch, step: int, targets: Any = None) -> Losses:
        """The loss of one process's share; its gradient, averaged over processes, is that of the global batch."""
        ...

    def check(self, student: Any, average: Any, step: int) -> Figures:
        """Figures on the held-out samples, by name."""
        ...


@dataclass(frozen=True)
class SelfDistillation:
    """DINO's way: the moving average of the student teaches it (`mad.training.objective`, `mad.training.health`)."""

    run: RunConfig
    numerics: Numerics
    health: HealthSet

    def teach(self, student: Network, average: Network, batches: list[Batch], step: int) -> list[Targets]:
        """Targets that are balanced over the whole step."""
        return teach(student, average, batches, self.run, self.numerics, teacher_temp(self.run, step))

    def loss(
        self, network: nn.Module, average: Network, batch: Batch, step: int, targets: Targets | None = None
    ) -> StepLoss:
        """DINO's cross-entropy, iBOT's and the regulariser."""
        return step_loss(network, average, batch, self.run, self.numerics, teacher_temp(self.run, step), targets)

    def check(self, student: Network, average: Network, step: int) -> Figures:
        """See `check_health`."""
        temperature = teacher_temp(self.run, step)
        return check_health(student, average, self.health, self.numerics, self.run.student_temp, temperature)


def teacher_temp(run: RunConfig, step: int) -> float:
    """Temperature of the teacher's targets at `step`."""
    return linear(step, run.teacher_temp_warmup, run.teacher_temp_start, run.teacher_temp)
