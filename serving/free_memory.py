"""How much memory a device has left: the least of what torch, the kernel and the container report.

Changes nothing. The query initialises CUDA on the device, so only the process that will use it should call
this.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Files of cgroup version 2 and 1: limit, usage, statistics, and the statistic of pages that the kernel can
reclaim."""


@dataclass(frozen=True)
class FreeMemory:
    """Free bytes. `host_bytes` None: the device is the host itself."""

    device_bytes: int
    host_bytes: int | None = None


def free_memory(device: torch.device) -> FreeMemory:
    """Free memory of the device that models run on, and of the host."""
    host_bytes = host_free_bytes()
    if device.type != "cuda":
        return FreeMemory(host_bytes)
    device_bytes, _ = torch.cuda.mem_get_info(device)
    return FreeMemory(device_bytes, host_bytes)


def host_free_bytes(cgroup: Path = CGROUP) -> int:
    """Bytes that the machine has available, or that the container may still take if that is less."""
    return min([psutil.virtual_memory().available, *_container_free_bytes(cgroup)])


def _container_free_bytes(cgroup: Path) -> list[int]:
    """Free bytes under each limit of the container; none if there is no limit."""
    free = []
    for limit, usage, statistics, reclaimable in _FILES:
        try:
            limit_bytes = int((cgroup / limit).read_text())  # "max" is no number
            used_bytes = int((cgroup / usage).read_text())
            lines = dict(line.split() for line in (cgroup / statistics).read_text().splitlines())
        except (OSError, ValueError):
            continue
        free.append(max(0, limit_bytes - used_bytes + int(lines.get(reclaimable, 0))))
    return free
