"""A lock file that says who holds it: one holder at a time, and free again however that one dies.

It is the kernel's own lock (flock), which lasts as long as any process has the descriptor open. A program
that is executed gets the descriptor only if it is passed on; then the lock outlives the process that took
it until that program has ended too, and a later start waits for what a killed one left. Invariants: a
file that was left behind blocks nobody, and what it says is estimated only while the lock is held. The file
is never removed, for another file of the same name would be another lock.
"""

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

LEFTOVERS_S = 10.0
"""What a killed process leaves has ended by then: its Redis flushes for 3 s at most, its Ray takes 5."""
_POLL_S = 0.05


@dataclass(frozen=True)
class Holder:
    """The process that took a lock. It may be gone while a program of its own still holds the lock."""

    pid: int = 0
    process_started_at_s: float = 0.0
    """Unix time; together with the pid it names one process for good."""
    about: str = ""
    """What it said of itself, such as the URL that it answers at."""

    def lives(self) -> bool:
        return process_started_at_s(self.pid) == self.process_started_at_s

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        process = f"process {self.pid}" if self.lives() else f"what is left of process {self.pid}"
        return f"{process} ({self.about})" if self.about else process


def take_lock(file: Path, about: str = "", *, leftovers_s: float = LEFTOVERS_S) -> int | Holder:
    """The descriptor that holds the lock until it is closed, or who holds it instead.

    Waits `leftovers_s` at most for what a holder that is gone left behind, or an earlier use in this very
    process; another process that lives is not waited for. Raises OSError where no lock can be had.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        holder = _lock(descriptor, time.monotonic() + leftovers_s)
        if holder is None:
            _sign(descriptor, about)
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return holder


def _lock(descriptor: int, deadline_s: float) -> Holder | None:
    """None once the lock is ours."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            holder = _signed(descriptor)
        is_other = holder.pid != os.getpid() and holder.lives()
        if is_other or time.monotonic() >= deadline_s:
            return holder
        time.sleep(_POLL_S)


def _sign(descriptor: int, about: str) -> None:
    pid = os.getpid()
    holder = Holder(pid, process_started_at_s(pid) or 0.0, about)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)


def _signed(descriptor: int) -> Holder:
    """Nobody in particular while the holder has not signed yet."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 10_000, 0)))
    except (ValueError, TypeError):
        return Holder()


def process_started_at_s(pid: int) -> float | None:
    """Unix time at which a living process began; None if there is none with this id."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, ValueError, TypeError):
        return None
