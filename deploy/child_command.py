"""Runs a command of ours in a process of its own, which gives its memory back when it ends."""

import subprocess
import sys

from deploy.errors import ModelPairError

_REASON_CHARACTERS = 300


def everdraft_command(*arguments: str) -> list[str]:
    """A command line for this very installation, whatever is on the path."""
    return [sys.executable, "-c", "from deploy.cli import main; main()", *arguments]


def run_everdraft(*arguments: str, failure: str) -> None:
    """`everdraft` with these arguments. Raises ModelPairError, which begins with `failure`."""
    child = subprocess.run(everdraft_command(*arguments), capture_output=True, text=True, check=False)
    if child.returncode:
        reason = child.stderr.strip()[-_REASON_CHARACTERS:]
        raise ModelPairError(f"{failure}: {reason}; nothing was started")
