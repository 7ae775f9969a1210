"""A real Slurm on this machine alone: controller, one node with pretended GPUs, and munge, all in one folder on 127.0.0.1.

Nothing of the system's own Slurm is touched. There is no accounting (slurmdbd), so states come from squeue.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "munged")
SBIN = "/usr/sbin:/sbin"
CPUS, MEMORY_MB = 2, 100_000  # pretended (`config_overrides`): rules ask for what a cluster has
CONFIG = """\
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
SlurmdParameters=config_overrides
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=200
GresTypes=gpu
ReturnToService=2
MinJobAge=3600
KillWait=20
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 NodeHostname={host} CPUs={cpus} RealMemory={memory} Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks."""
    path = os.pathsep.join([os.environ["PATH"], SBIN])
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start a cluster in `folder`, yield the environment in which `sbatch` and the others mean it, stop it.

    Raises:
        TimeoutError: its node does not become idle.
    """
    for name in ("etc", "run", "log", "state", "spool", "bin", "dev"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    conf, gpu = folder / "etc" / "slurm.conf", folder / "dev" / "gpu0"
    settings = {"host": host, "user": getpass.getuser(), "folder": folder, "ports": free_ports(2)}
    conf.write_text(CONFIG.format(**settings, cpus=CPUS, memory=MEMORY_MB))
    os.mknod(gpu, 0o666 | 0o020000, os.makedev(1, 3))  # a GPU is a character device; this one is /dev/null
    (folder / "etc" / "gres.conf").write_text(f"NodeName={host} Name=gpu File={gpu}\n")
    key = folder / "etc" / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    environment["PATH"] = os.pathsep.join([os.environ["PATH"], SBIN])
    srun = folder / "bin" / "srun"  # the executor plugin's job step takes SLURM_CONF away from srun
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which("srun", path=environment["PATH"])} "$@"\n')
    srun.chmod(0o755)
    environment["PATH"] = os.pathsep.join([str(srun.parent), environment["PATH"]])
    files = [f"--{what}={folder}/{where}" for what, where in
             (("key-file", "etc/munge.key"), ("socket", "run/munge.socket"), ("pid-file", "run/munged.pid"),
              ("log-file", "log/munged.log"), ("seed-file", "run/munged.seed"))]  # fmt: skip
    try:
        for command in (["munged", "--force", "--num-threads=4", *files], ["slurmctld", "-c"], ["slurmd", "-c"]):
            subprocess.run(command, env=environment, check=True)
        wait_for_node(environment)
        yield environment
    finally:
        end_jobs(environment)
        for name in ("slurmd", "slurmctld", "munged"):
            stop(folder / "run" / f"{name}.pid")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for_node(environment: dict[str, str], seconds: float = 30) -> None:
    """Until the node takes jobs."""
    state, deadline = "", time.monotonic() + seconds
    while time.monotonic() < deadline:
        asked = subprocess.run(["sinfo", "--noheader", "-o", "%T"], env=environment, capture_output=True, text=True)
        state = asked.stdout.strip() or asked.stderr.strip()
        if state.startswith("idle"):
            return
        time.sleep(0.2)
    raise TimeoutError(f"the node is not idle after {seconds:.0f} s: {state}")


def end_jobs(environment: dict[str, str], seconds: float = 60) -> None:
    """Cancel what still runs and wait for its end, or its processes would outlive the cluster."""
    deadline = time.monotonic() + seconds
    with suppress(subprocess.SubprocessError):
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=environment, timeout=seconds)
        while time.monotonic() < deadline:
            asked = ["squeue", "--noheader", "--states=RUNNING,COMPLETING,PENDING"]
            if not subprocess.run(asked, env=environment, capture_output=True, timeout=seconds).stdout:
                return
            time.sleep(0.2)


def stop(pid_file: Path, seconds: float = 20) -> None:
    """End a daemon and wait until it has gone."""
    if not pid_file.exists():
        return
    with suppress(ProcessLookupError):
        pid, deadline = int(pid_file.read_text()), time.monotonic() + seconds
        os.kill(pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
