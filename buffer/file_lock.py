"""A lock file that names its holder: one holder at a time, and released however that process ends.

It uses flock, which lasts as long as any process has the descriptor open. A child program inherits the
descriptor only if it is passed on; then the lock lasts until that program has ended too, and a later start
waits for the child programs of a killed process. Invariants: a file that was left behind blocks nobody, and
its content is trusted only while the lock is held. The file is never removed, because a new file of the same
name would be another lock.
"""

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

LEFTOVERS_S = 10.0
"""Child programs of a killed process have ended by then: its Redis flushes for 3 s at most, its Ray takes
5."""
_POLL_S = 0.05


@dataclass(frozen=True)
class Holder:
    """The process that took a lock. It may have ended while a child program of it still holds the lock."""

    pid: int = 0
    process_started_at_s: float = 0.0
    """Unix time; together with the pid it identifies one process."""
    about: str = ""
    """What the holder wrote about itself, such as its URL."""

    def lives(self) -> bool:
        return process_started_at_s(self.pid) == self.process_started_at_s

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        process = f"process {self.pid}" if self.lives() else f"what is left of process {self.pid}"
        return f"{process} ({self.about})" if self.about else process


def take_lock(file: Path, about: str = "", *, leftovers_s: float = LEFTOVERS_S) -> int | Holder:
    """Returns the descriptor that holds the lock until it is closed, or the current holder.

    Waits at most `leftovers_s` for child programs of a holder that has ended, or for an earlier use in this
    process; it does not wait for another process that still runs. Raises OSError if the file cannot be
    locked.
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
    """Returns None once this process holds the lock, else the holder."""
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
    """An unnamed Holder while the holder has not written its name yet."""
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
