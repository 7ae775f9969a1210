"""Progress of long work: a bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

RECENT = 200  # steps whose pace tells the time left
BAR_SECONDS = 0.5  # between two refreshes of a bar's facts


def log(message: str) -> None:
    """One line to standard error with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def track(
    items: Iterable[Item], what: str, total: int | None = None, unit: str = "", every_s: float = 10.0
) -> Iterator[Item]:
    """Yield `items` while showing how many are done, the rate, and the time left.

    On a terminal a rich bar; elsewhere a line at most every `every_s` seconds and one at the end.
    """
    total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(items, description=what, total=total, console=Console(stderr=True), transient=True)
        return
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= every_s:
            last, rate = now, done / (now - start)
            left = f", {(total - done) / rate:.0f} s left" if total else ""
            log(f"{what}: {done}{f'/{total}' if total else ''} {unit} ({rate:.1f}/s{left})")
    seconds = time.monotonic() - start
    log(f"{what}: {done} {unit} in {seconds:.1f} s")


class Steps:
    """Progress of a loop that has facts of its own to tell: a live bar on a terminal, elsewhere a line every `every_s` seconds.

    The time left goes by the pace of the last `RECENT` steps and what happened between them, not by the first ones, which are
    slow. What `log` tells meanwhile stands above the bar.
    """

    def __init__(self, what: str, total: int, done: int = 0, every_s: float = 10.0) -> None:
        self.what, self.total, self.done = what, total, done
        self._bar = _bar(what, total, done) if sys.stderr.isatty() else None
        self._every_s = min(every_s, BAR_SECONDS) if self._bar else every_s
        self._shown_at = time.monotonic()
        self._times = deque([self._shown_at], maxlen=RECENT + 1)

    def advance(self, facts: Callable[[], str], force: bool = False) -> None:
        """One more step is done; `facts` is asked when something is shown, in any case with `force`."""
        self.done += 1
        now = time.monotonic()
        self._times.append(now)
        if not force and now - self._shown_at < self._every_s:
            return
        self._shown_at = now
        told = f"{facts()}, {duration(self.left_s())} left"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.done, facts=told)
        if self._bar is None or force:
            log(f"{self.what}: step {self.done}/{self.total} {told}")

    def left_s(self) -> float:
        """Seconds left at the pace of the recent steps."""
        return (self.total - self.done) * (self._times[-1] - self._times[0]) / max(len(self._times) - 1, 1)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar:
            self._bar.stop()


def _bar(what: str, total: int, done: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    name, facts = TextColumn("{task.description}"), TextColumn("{task.fields[facts]}")
    bar = Progress(name, BarColumn(20), MofNCompleteColumn(), facts, console=Console(stderr=True), transient=True)
    bar.add_task(what, total=total, completed=done, facts="")
    bar.start()
    return bar


def duration(seconds: float) -> str:
    """A time in the unit that a person would use: "95 s", "48 min", "7.5 h", "3.2 days"."""
    for limit, size, unit, digits in ((100, 1, "s", 0), (6000, 60, "min", 0), (172_800, 3600, "h", 1)):
        if seconds < limit:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"
