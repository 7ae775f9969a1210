"""How much memory this process may still take: the GPU's, or the machine's within the limits of its control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

SCARCE = ("not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory")  # torch's words
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def is_exhaustion(error: BaseException) -> bool:
    """Whether an allocation has failed."""
    certain = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return certain or any(words in str(error).lower() for words in SCARCE)


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that are free on `device`; None where nothing tells. `root` is the root of the file system."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = list(_group_limits(root))
    if (meminfo := root / "proc/meminfo").exists():
        facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in facts:
            found.append(int(facts["MemAvailable"].split()[0]) * 1024)
    return min(found, default=None)


def _group_limits(root: Path) -> Iterator[int]:
    """What each control group above this process leaves; files that the kernel would drop from its cache count as free."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, (limit, used, cached) = (
            root / "sys/fs/cgroup" / ("memory" if controllers else ""),
            V1 if controllers else V2,
        )
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group == base.parent:
                break
            if (group / limit).exists() and (told := (group / limit).read_text().strip()).isdigit():
                stat = dict(fact.split() for fact in (group / "memory.stat").read_text().splitlines())
                yield int(told) - int((group / used).read_text()) + int(stat.get(cached, 0))
