"""Progress of long work: a bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


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
