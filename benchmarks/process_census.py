"""What each process of a service holds: memory, descriptors, threads; and what Redis holds.

The processes are those that this one started, and their children, named by what they do.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import psutil

from buffer.redis_store import RedisLink

CLIENT, DRIVER = "clients", "driver"
_ROLES = {
    "ray::ServeReplica": "replica",
    "ray::LearnerActor": "learner",
    "ray::ProxyActor": "proxy",
    "ray::ServeController": "controller",
    "ray::": "idle worker",
    "gcs_server": "gcs",
    "raylet/raylet": "raylet",
    "redis_supervisor": "redis supervisor",
    "redis-server": "redis",
    "dashboard/agent.py": "dashboard agent",
    "runtime_env/agent": "runtime environment agent",
    "log_monitor.py": "log monitor",
    "dashboard.py": "dashboard",
    "multiprocessing.spawn": CLIENT,
    "ray_guard.py": "guard",
}
"""What a process's command line has in it, the first that fits, and what it is."""
_REDIS_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Holding:
    """Of one process. `pss_bytes` counts a page that several share by its part."""

    pid: int
    rss_bytes: int
    pss_bytes: int
    num_descriptors: int
    num_threads: int


@dataclass(frozen=True)
class Census:
    """At one Unix time: every process by its role, `role 2` for the second of a role."""

    at_s: float
    processes: Mapping[str, Holding]
    redis_bytes: int
    redis_keys: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class CensusTaker:
    """Reads this process, all that it started, and the Redis at `redis_url`."""

    def __init__(self, redis_url: str) -> None:
        self._redis = RedisLink(redis_url, _REDIS_TIMEOUT_S)

    def take(self) -> Census:
        """Raises StoreUnavailableError."""
        here = psutil.Process()
        found = dict(_named([here, *sorted(here.children(recursive=True), key=lambda each: each.pid)]))
        with self._redis.translated():
            used = int(self._redis.client.info("memory")["used_memory"])
            return Census(time.time(), found, used, int(self._redis.client.dbsize()))

    def close(self) -> None:
        self._redis.close()


def _named(processes: Sequence[psutil.Process]) -> Iterator[tuple[str, Holding]]:
    """Those that have ended meanwhile are left out."""
    counts: Counter[str] = Counter()
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            role = DRIVER if not counts else role_of(" ".join(process.cmdline()))
            memory = process.memory_full_info()
            holding = Holding(process.pid, memory.rss, memory.pss, process.num_fds(), process.num_threads())
            counts[role] += 1
            yield role if counts[role] == 1 else f"{role} {counts[role]}", holding


def role_of(command: str) -> str:
    """By the command line; its program's name where it is none that we know."""
    known = next((role for part, role in _ROLES.items() if part in command), None)
    return known or command.partition(" ")[0].rpartition("/")[2] or "ended"


def growth(values: Sequence[float]) -> float | None:
    """The median of the last tenth over that of the first tenth, less 1; None where there are too few."""
    tenth = len(values) // 10
    return median(values[-tenth:]) / median(values[:tenth]) - 1.0 if tenth else None
