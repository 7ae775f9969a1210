"""A training as a process: the threads that it was granted, and SIGTERM, on which it saves a checkpoint and leaves."""

from __future__ import annotations

import os
import signal

EXIT_RETRY = 75  # "try again" (sysexits.h): a checkpoint is saved


class Interrupted(Exception):  # noqa: N818  a request, not an error
    """The run was asked to stop (SIGTERM) and has saved a checkpoint of the step that it names."""


class Stop:
    """Set by SIGTERM, of which processes tell each other between steps."""

    def __init__(self) -> None:
        self.asked = False
        self._previous = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def release(self) -> None:
        """Give the signal back to its former handler."""
        signal.signal(signal.SIGTERM, self._previous)


def granted_threads() -> int:
    """Threads that this process may use: `OMP_NUM_THREADS`, else the CPUs it is bound to."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
