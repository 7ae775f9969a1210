"""What a training tells while it runs: metrics.jsonl, TensorBoard, progress, and warnings when they come and go.

One line of JSON per step: losses, rates, gradient norm, kinds of samples, seconds of waiting for data, images per second, and
at a health check `health` and the names of its `warnings`. What follows a checkpoint is done again when a killed run resumes;
`trim_metrics` and TensorBoard's purge step take it away first.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mad.config.training import RunConfig
from mad.files import FULL, MadError, StorageError, atomic_path
from mad.progress import RECENT, Steps, log
from mad.training.watch import watch_of

FETCH_STEPS = 20  # whose losses are fetched from a GPU at once: each fetch waits for it
GRACE_STEPS = 1000  # of warm-up: until then a loss at ln K is no news
METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
NO_SCALARS = ("step", "kinds", "health", "warnings")


class Records:
    """The records of one run from `step` on, kept by one process. `close` it, whatever happens.

    Losses stay on their device until `FETCH_STEPS` are there or somebody asks; on a CPU each is written at once.
    """

    def __init__(self, run: RunConfig, folder: Path, step: int, device: torch.device) -> None:
        self._run, self._path, self._watched = run, folder / METRICS, watch_of(run)
        self._at_once = 1 if device.type == "cpu" else FETCH_STEPS
        self._pending: list[tuple[dict[str, Any], list[str], Tensor]] = []
        self._pace: deque[tuple[int, float, float]] = deque(maxlen=RECENT)  # images, seconds, seconds of waiting
        earlier = read_metrics(self._path) if step else []
        self._last: dict[str, Any] = {}
        # the later half of the steps since the last check: a training that starts above ln K is not collapsed
        recent = (run.runtime.health_every + 1) // 2
        self._recent = deque((record[self._watched.loss] for record in earlier), maxlen=recent)
        self._warned: set[str] = set(next((r["warnings"] for r in reversed(earlier) if "warnings" in r), []))
        self._board = Board(folder / TENSORBOARD, step) if run.runtime.tensorboard else None
        self._steps = Steps(run.name, run.steps, step, run.runtime.log_seconds)

    def add(
        self,
        losses: Iterable[str],
        values: Tensor,
        *,
        step: int,
        lr: float,
        grad_norm: float,
        kinds: str,
        data_wait_s: float,
        images: int,
        seconds: float,
        health: dict[str, float | None] | None = None,
        show: bool = False,
    ) -> None:
        """Record step `step`.

        Args:
            losses: names of the `values` [n], "total" and the loss that is watched among them.
            kinds: of the samples, joined by "+".
            data_wait_s: seconds that this process waited for data, of `seconds`.
            images: that went through teacher or student, on all processes.
            health: of a check after this step.
            show: whether a line of progress is due in any case.
        """
        record = {"step": step, "lr": lr, "grad_norm": grad_norm, "kinds": kinds, "data_wait_s": data_wait_s}
        record |= {"images_per_s": images / seconds} | ({} if health is None else {"health": health})
        self._pending.append((record, list(losses), values))
        self._pace.append((images, seconds, data_wait_s))
        if health is not None or len(self._pending) >= self._at_once:
            self._fetch()
        self._steps.advance(self._facts, force=show)

    def flush(self) -> None:
        """Write everything that was added: before a checkpoint, which promises the records of all steps before it."""
        self._fetch()
        if self._board:
            self._board.flush()

    def close(self) -> None:
        """Write what is left and let go of the terminal."""
        try:
            self._fetch()
        finally:
            self._steps.close()
            if self._board:
                self._board.close()

    def _facts(self) -> str:
        self._fetch()
        images, seconds, waited = (math.fsum(column) for column in zip(*self._pace, strict=True))
        watch = self._watched
        return (
            f"loss {self._last['loss']:.3f} ({self._last[watch.share]:.3f} {watch.words}) {images / seconds:.0f} images/s, "
            f"{waited / seconds:.0%} waiting for data"
        )

    def _fetch(self) -> None:
        """Bring the pending losses to the host, and write their records."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        rows = torch.stack([values for _, _, values in pending]).tolist()
        records = [self._complete(facts, names, row) for (facts, names, _), row in zip(pending, rows, strict=True)]
        append_lines(self._path, [json.dumps(record) for record in records])
        self._last = records[-1]
        if self._board:
            for record in records:
                self._board.add(record)

    def _complete(self, facts: dict[str, Any], names: list[str], row: list[float]) -> dict[str, Any]:
        losses, watch = dict(zip(names, row, strict=True)), self._watched
        record = {"step": facts["step"], "loss": losses.pop("total"), **losses}
        self._recent.append(record[watch.loss])
        record |= {watch.share: record[watch.loss] / watch.unit, **facts}
        return record | ({"warnings": self._watch(facts)} if "health" in facts else {})

    def _watch(self, facts: dict[str, Any]) -> list[str]:
        """The names of the warnings that hold after a health check; those that come or go are told."""
        run, done, found = self._run, facts["step"] + 1, {}
        if done >= min(run.warmup, GRACE_STEPS):
            found = self._watched.warn(math.fsum(self._recent) / len(self._recent), facts["health"])
        for name in found:
            if name not in self._warned:
                log(f"{run.name}: WARNING: step {done}: {name}: {found[name]}")
        for name in sorted(self._warned - found.keys()):
            log(f"{run.name}: step {done}: {name} is over")
        self._warned = set(found)
        return list(found)


def require_tensorboard(run: RunConfig) -> None:
    """Fail early where a run asks for TensorBoard and the package is absent.

    Raises:
        MadError: says what to install.
    """
    if run.runtime.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise MadError(
            f"runs.{run.name}.runtime.tensorboard: the package tensorboard is not installed; `pip install tensorboard`, or set "
            "it to false: metrics.jsonl and curves.png hold the same numbers"
        )


class Board:
    """TensorBoard's events, which hide those of step `step` and later that a killed run has left.

    The figures are in metrics.jsonl too: where events cannot be written, a warning says so and the run goes on without them.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer: Any = None
        with self._unharmed():
            self._writer = SummaryWriter(str(folder), purge_step=step)

    def add(self, record: dict[str, Any]) -> None:
        """Add the figures of a step."""
        scalars = {name: value for name, value in record.items() if name not in NO_SCALARS}
        scalars |= {f"health/{name}": value for name, value in record.get("health", {}).items()}
        with self._unharmed():
            for name, value in scalars.items():
                if self._writer and value is not None:
                    self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """Write what was added."""
        with self._unharmed():
            if self._writer:
                self._writer.flush()

    def close(self) -> None:
        """Write what is left, and close the file."""
        with self._unharmed():
            if self._writer:
                self._writer.close()

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            log(
                f"WARNING: {self._folder}: cannot be written ({error.strerror or error}); the run goes on without TensorBoard, its "
                "figures are in metrics.jsonl"
            )


def append_lines(path: Path, lines: list[str]) -> None:
    """Add lines to a text file.

    Raises:
        StorageError: the disk is full.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StorageError(f"{path}: cannot be written ({error.strerror}); make room, then the run resumes") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1] if line]


def trim_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the records of steps before `step`: what a killed run did after its last checkpoint is done again."""
    records = [record for record in read_metrics(path) if record["step"] < step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return records
