"""The note in the state folder that tells other commands what runs and where.

Knows no Ray and no Redis. Invariant: a note whose process is gone is never believed, so a run that
was killed leaves nothing to clean up.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from deploy.errors import StateFolderInUseError

NOTE = "running.json"
LEARNER_SNAPSHOT = "learner.json"
LEARNER_LOCK = "learner.lock"


@dataclass(frozen=True)
class RunningNote:
    """Where the parts of a running everdraft answer."""

    pid: int
    process_started_at_s: float
    """Unix time; together with the pid it names one process for good."""
    url: str
    redis_url: str
    tracking_uri: str
    """Empty: MLflow is off."""
    target: str
    draft: str
    target_revision: str
    learns: bool
    """Whether a learner runs beside the replicas."""


def read_note(state_dir: Path) -> RunningNote | None:
    """The note of the everdraft that runs with this folder; None if none does."""
    try:
        content = json.loads((state_dir / NOTE).read_text(encoding="utf-8"))
        note = RunningNote(**{field.name: content[field.name] for field in fields(RunningNote)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return note if process_started_at_s(note.pid) == note.process_started_at_s else None


@contextmanager
def claimed_folder(state_dir: Path) -> Iterator[None]:
    """The folder is ours inside the block; the note leaves with it.

    Raises StateFolderInUseError when another process holds it.
    """
    other = read_note(state_dir)
    if other is not None:
        raise StateFolderInUseError(
            f"cluster.state_dir={state_dir} is in use by the everdraft at {other.url} (process "
            f"{other.pid}); nothing was started: stop it, or give another folder with --state-dir"
        )
    state_dir.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for name in (NOTE, LEARNER_SNAPSHOT):
            (state_dir / name).unlink(missing_ok=True)


@contextmanager
def sole_learner(state_dir: Path) -> Iterator[None]:
    """No other `everdraft learn` uses this folder inside the block. Raises StateFolderInUseError."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / LEARNER_LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StateFolderInUseError(
                f"cluster.state_dir={state_dir}: another learner uses it; nothing was started"
            ) from None
        yield


def own_note(
    *,
    url: str,
    redis_url: str,
    tracking_uri: str,
    target: str,
    draft: str,
    target_revision: str,
    learns: bool,
) -> RunningNote:
    """The note of this very process."""
    started_at_s = process_started_at_s(os.getpid())
    assert started_at_s is not None, "this process is alive"
    return RunningNote(
        os.getpid(), started_at_s, url, redis_url, tracking_uri, target, draft, target_revision, learns
    )


def write_note(state_dir: Path, note: RunningNote) -> None:
    """It may hold a password of Redis, so only its owner may read it."""
    _write(state_dir / NOTE, asdict(note))


def write_learner_snapshot(state_dir: Path, snapshot: Mapping[str, Any]) -> None:
    """What the learner said of itself just now (plain data)."""
    _write(state_dir / LEARNER_SNAPSHOT, {"at_s": time.time(), **snapshot})


def read_learner_snapshot(state_dir: Path) -> dict[str, Any] | None:
    """The last one written, with its time `at_s`; None if there is none."""
    try:
        snapshot: dict[str, Any] = json.loads((state_dir / LEARNER_SNAPSHOT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return snapshot


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all, for its owner only."""
    aside = file.with_suffix(f".{os.getpid()}")
    aside.touch(mode=0o600)
    aside.write_text(json.dumps(content, indent=2), encoding="utf-8")
    aside.replace(file)


def process_started_at_s(pid: int) -> float | None:
    """Unix time at which a living process began; None if there is none with this id."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
