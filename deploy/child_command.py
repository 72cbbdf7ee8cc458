"""Runs a command of ours in a process of its own, which gives its memory back when it ends."""

import subprocess
import sys

from deploy.errors import ModelPairError

_REASON_CHARACTERS = 300


def run_everdraft(*arguments: str, failure: str) -> None:
    """`everdraft` with these arguments. Raises ModelPairError, which begins with `failure`."""
    command = [sys.executable, "-c", "from deploy.cli import main; main()", *arguments]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        reason = child.stderr.strip()[-_REASON_CHARACTERS:]
        raise ModelPairError(f"{failure}: {reason}; nothing was started")
