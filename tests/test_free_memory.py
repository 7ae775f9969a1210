"""Free memory within control groups of both versions, on file trees as Linux shows them."""

import pytest
import torch

from mad.training.free_memory import free_bytes

CPU = torch.device("cpu")


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal:  8000 kB\nMemAvailable:    6000 kB\n"}
JOB = "sys/fs/cgroup/slurm/job_7/"
OLD = "sys/fs/cgroup/memory/slurm/job_7/"
STAT = "anon 1\ninactive_file 1000\n"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 6000 * 1024),
        ({"proc/self/cgroup": "0::/\n"}, 6000 * 1024),  # the root group has no limit of its own
        (
            {
                "proc/self/cgroup": "0::/slurm/job_7/step\n",  # its own folder sets no limit, the one above does
                JOB + "step/memory.max": "max\n", JOB + "memory.max": "2000000\n", JOB + "memory.current": "500000\n",
                JOB + "memory.stat": STAT,
            },
            1_501_000,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/slurm/job_7\n", OLD + "memory.limit_in_bytes": "3000000\n",
                OLD + "memory.usage_in_bytes": "1000000\n", OLD + "memory.stat": "total_inactive_file 7\n",
            },
            2_000_007,
        ),
    ],
)  # fmt: skip
def test_the_least_of_machine_and_groups(tmp_path, files, wanted):
    write(tmp_path, MEMINFO | files)
    assert free_bytes(CPU, tmp_path) == wanted


def test_nothing_is_known_where_nothing_tells(tmp_path):
    assert free_bytes(CPU, tmp_path) is None


def test_this_machine_tells():
    assert free_bytes(CPU) > 1e6
