"""What keeps the memory of this service off the disk: no core dumps, no swap, temporary files in memory.

Linux alone; what cannot be had is said and not guessed. Starts nothing.
"""

import resource
import shutil
from pathlib import Path

_IN_MEMORY = Path("/dev/shm")


def forbid_core_dumps() -> None:
    """Of this process and of those that it starts from now on. A limit of one byte also forbids the kernel to
    hand a dump to a program, as a limit of none would not."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0 if hard == 0 else 1, hard))


def folder_in_memory(num_bytes: int = 0) -> Path | None:
    """Where so many bytes of files can be kept in memory alone; None: nowhere."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kinds = {line.split()[1]: line.split()[2] for line in mounts}
    is_memory = kinds.get(str(_IN_MEMORY)) == "tmpfs"
    return _IN_MEMORY if is_memory and shutil.disk_usage(_IN_MEMORY).free > num_bytes else None


def may_swap(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> bool:
    """Whether the kernel may write memory of this process, and of those that it starts, to a disk. Whoever
    cannot tell may."""
    try:
        if not (proc / "swaps").read_text(encoding="utf-8").splitlines()[1:]:
            return False
        own = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
        paths = [line.removeprefix("0::").strip("/") for line in own if line.startswith("0::")]
        return (cgroups / paths[0] / "memory.swap.max").read_text(encoding="utf-8").strip() != "0"
    except (OSError, IndexError):
        return True
