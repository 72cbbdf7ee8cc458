"""Which target a command means, where several share a Redis.

The one asked for; else that of the everdraft that runs with the state folder; else all that are known.
"""

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.console import fail, running_note

TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target-revision", help="Which target, where several share a Redis; its first digits will do."
    ),
]

SHOWN = 16
"""Digits of a revision that people see, and may give back."""


def targets_meant(redis_url: str, state_dir: Path, asked: str | None) -> list[str]:
    """Revisions, perhaps none; ends the command where none begins with what was asked for."""
    from deploy.wiring import targets_at

    note = running_note(state_dir)
    if asked is None and note is not None and note.redis_url == redis_url:
        return [note.target_revision]
    known = targets_at(redis_url)
    found = [revision for revision in known if revision.startswith(asked or "")]
    if asked and not found:
        fail(f"--target-revision {asked!r} begins none of {_listed(known)}; nothing was done")
    return found


def target_meant(redis_url: str, state_dir: Path, asked: str | None) -> str:
    """The one revision; ends the command where that is not clear."""
    found = targets_meant(redis_url, state_dir, asked)
    if not found:
        fail("no draft was ever judged there, and no replica has reported; nothing was done")
    if len(found) > 1:
        fail(f"several targets are meant, name one by --target-revision: {_listed(found)}; nothing was done")
    return found[0]


def _listed(revisions: list[str]) -> str:
    return ", ".join(revision[:SHOWN] for revision in revisions) or "no target at all"
