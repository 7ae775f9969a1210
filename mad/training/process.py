"""A training as a process: the threads that it was granted; SIGTERM and Ctrl-C, on which it saves a checkpoint and leaves."""

from __future__ import annotations

import os
import signal

EXIT_RETRY = 75  # "try again" (sysexits.h): a checkpoint is saved


class Interrupted(Exception):  # noqa: N818  a request, not an error
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved a checkpoint of the step that it names."""


class Stop:
    """Set by SIGTERM or Ctrl-C, of which processes tell each other between steps. A second Ctrl-C does not wait for the step."""

    def __init__(self) -> None:
        self.asked = False
        self.by = "SIGTERM"
        wanted = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background of a shell
            wanted.remove(signal.SIGINT)
        self._previous = {number: signal.signal(number, self._ask) for number in wanted}

    def _ask(self, number: int, _: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked, self.by = True, signal.Signals(number).name

    def release(self) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def granted_threads() -> int:
    """Threads that this process may use: `OMP_NUM_THREADS`, else the CPUs it is bound to."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
