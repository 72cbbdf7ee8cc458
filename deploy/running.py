"""Whose the state folder is, and the note in it that tells other commands what runs and where.

One service and one learner may use a folder at a time: each holds a lock on it from its first moment.
Knows no Ray and no Redis. Invariants: a note whose process is gone is never believed, so a run that was
killed leaves nothing to clean up; and nobody removes another's note.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from buffer.file_lock import Holder, process_started_at_s, take_lock
from deploy.errors import SettingsError, StateFolderInUseError

NOTE = "running.json"
LEARNER_SNAPSHOT = "learner.json"
SERVICE_LOCK = "everdraft.lock"
LEARNER_LOCK = "learner.lock"


@dataclass(frozen=True)
class RunningNote:
    """Where the parts of a running everdraft answer."""

    pid: int
    process_started_at_s: float
    """Unix time; together with the pid it names one process for good."""
    url: str
    redis_url: str = field(repr=False)
    """With its password; not for printing."""
    memory_url: str = field(repr=False)
    """Of records of capture mode `memory`, with its password; empty: there is none."""
    tracking_uri: str = field(repr=False)
    """Empty: MLflow is off. It may hold a password too."""
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
def claimed_folder(state_dir: Path, *, url: str, learns: bool) -> Iterator[tuple[int, ...]]:
    """The folder is this process's inside the block; what it noted there leaves with it.

    Gives the descriptors of the folder's locks: a child that inherits them keeps the folder until it has
    ended, so that the next start does not meet it. `url` is where the service is going to answer. Raises
    StateFolderInUseError when another process has the folder, SettingsError when nobody can.
    """
    with ExitStack() as locks:
        held = [locks.enter_context(_sole_service(state_dir, url))]
        if learns:
            held.append(locks.enter_context(sole_learner(state_dir, url)))
        try:
            yield tuple(held)
        finally:
            note = read_note(state_dir)
            if note is not None and note.pid == os.getpid():
                (state_dir / NOTE).unlink(missing_ok=True)
            if learns:
                (state_dir / LEARNER_SNAPSHOT).unlink(missing_ok=True)


@contextmanager
def _sole_service(state_dir: Path, url: str) -> Iterator[int]:
    with _locked(state_dir, SERVICE_LOCK, url) as lock:
        if isinstance(lock, Holder):
            raise StateFolderInUseError(
                f"cluster.state_dir={state_dir} is in use by another everdraft, {lock}; nothing was started: "
                "stop it, or give another folder with --state-dir"
            )
        yield lock


@contextmanager
def sole_learner(state_dir: Path, url: str = "") -> Iterator[int]:
    """No other learner uses this folder inside the block, be it `everdraft learn` or one beside replicas.

    Raises StateFolderInUseError, or SettingsError when the folder cannot be locked.
    """
    with _locked(state_dir, LEARNER_LOCK, url) as lock:
        if isinstance(lock, Holder):
            raise StateFolderInUseError(
                f"cluster.state_dir={state_dir}: another learner uses it, {lock}; nothing was started: stop "
                "it, serve with --no-learner, or give another folder with --state-dir"
            )
        yield lock


@contextmanager
def _locked(state_dir: Path, name: str, about: str) -> Iterator[int | Holder]:
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = take_lock(state_dir / name, about)
    except OSError as error:
        raise SettingsError(
            f"cluster.state_dir={state_dir} cannot be locked for this run alone ({error}); nothing was "
            "started: give a folder on a local disk that this user may write, with --state-dir"
        ) from None
    try:
        yield lock
    finally:
        if not isinstance(lock, Holder):
            os.close(lock)


def own_note(
    *,
    url: str,
    redis_url: str,
    memory_url: str = "",
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
        pid=os.getpid(),
        process_started_at_s=started_at_s,
        url=url,
        redis_url=redis_url,
        memory_url=memory_url,
        tracking_uri=tracking_uri,
        target=target,
        draft=draft,
        target_revision=target_revision,
        learns=learns,
    )


def write_note(state_dir: Path, note: RunningNote) -> None:
    """It may hold a password of Redis or MLflow, so only its owner may read it."""
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
