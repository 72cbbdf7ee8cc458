"""What other processes did to the processor meanwhile: the whole machine's busy seconds, less our own.

Our own are those of this process and of all that it started, and their children. Time that a hypervisor took
counts as others': it was not ours.
"""

import time
from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class ProcessorTimes:
    """Seconds since some beginning."""

    at_s: float
    machine_s: float
    """Busy, on all cores together."""
    own_s: float


@dataclass(frozen=True)
class Load:
    """Cores in use on average over some time."""

    wall_s: float
    num_cores: int
    own_cores: float
    other_cores: float

    def __str__(self) -> str:
        others = f"other processes used {self.other_cores:.1f} of {self.num_cores} cores"
        return f"{others}, everdraft's own {self.own_cores:.1f}"


def processor_times() -> ProcessorTimes:
    times = psutil.cpu_times()._asdict()
    machine_s = sum(times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    here = psutil.Process()
    own_s = sum(map(_seconds, [here, *here.children(recursive=True)]))
    return ProcessorTimes(time.monotonic(), machine_s, own_s)


def load_between(before: ProcessorTimes, after: ProcessorTimes) -> Load:
    wall_s = after.at_s - before.at_s
    own_s = max(0.0, after.own_s - before.own_s)
    other_s = max(0.0, after.machine_s - before.machine_s - own_s)
    return Load(wall_s, psutil.cpu_count() or 1, own_s / wall_s, other_s / wall_s)


def _seconds(process: psutil.Process) -> float:
    """With those of its ended children, which are theirs no longer; 0 once it is gone itself."""
    with suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)
    return 0.0
