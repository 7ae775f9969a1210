"""Several training processes, started by torchrun's own agent, and what torchrun does not do: an orderly end.

Upon SIGTERM `torchrun` gives its processes 30 s and leaves with code 1, whatever their codes were. Here SIGTERM is only passed
on: the processes save a checkpoint, however long that takes, and leave with 75 ("try again"); so does the launcher. A cluster
that signals every process of a job at once, as Slurm does, has the same effect.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass

import psutil
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mad.files import MadError
from mad.training.process import EXIT_RETRY

EXIT_SIGTERM = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Layout:
    """`processes` on each of `nodes` machines, which meet at `rendezvous` (host:port on one of them; one machine needs none)."""

    processes: int
    nodes: int = 1
    rendezvous: str | None = None


def is_launched() -> bool:
    """Whether this process is one of several that `launch`, torchrun or the like has started."""
    return "WORLD_SIZE" in os.environ


def launch(layout: Layout, arguments: list[str], threads: int) -> int:
    """Run `python ARGUMENTS` in each process, which share this machine's `threads`, and wait for all; returns the exit code.

    Returns:
        0; 75 where they were stopped and have saved; otherwise the code of the first that failed.

    Raises:
        MadError: there are fewer GPUs than processes, or machines have nowhere to meet.
    """
    if 0 < (gpus := torch.cuda.device_count()) < layout.processes:
        raise MadError(f"runtime.processes: {layout.processes} processes need a GPU each; this machine grants {gpus}")
    if layout.nodes > 1 and not layout.rendezvous:
        raise MadError(
            "--nodes: machines need a place to meet; add --rendezvous HOST:PORT with one of them, e.g. node01:29500"
        )
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // layout.processes))
    config = LaunchConfig(
        min_nodes=layout.nodes,
        max_nodes=layout.nodes,
        nproc_per_node=layout.processes,
        rdzv_backend="c10d",
        rdzv_endpoint=layout.rendezvous or "localhost:0",
        run_id=os.environ.get("SLURM_JOB_ID", "mad"),
        max_restarts=0,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    signal.signal(signal.SIGTERM, _pass_on)
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if EXIT_RETRY in codes:
            return EXIT_RETRY
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0


def _pass_on(*_: object) -> None:
    children = psutil.Process().children()
    for child in children:
        child.terminate()
    if not children:
        sys.exit(EXIT_SIGTERM)
