"""Ends what is left of a local Ray when the process that started it is done, or was killed.

Ray's own fate sharing ends its servers and workers at once, but its agents, children of the raylet,
first try for a minute to report the raylet's death to a server that is dead too. Run as a script, in a
session of its own; knows Ray's processes by their parents only. Invariant: it touches no process but
descendants of those that name the session's folder, and that folder.

Arguments: the starter's process id, the session's folder. Standard input: a pipe that the starter
holds open for as long as Ray shall live. Standard output: one line, once it watches.
"""

import os
import select
import shutil
import sys
from contextlib import suppress

import psutil

POLL_S = 0.5
GRACE_S = 2.0
"""How long processes may take to end by themselves before they are killed."""


def main(starter_pid: int, folder: str) -> None:
    known: set[psutil.Process] = set()
    print("watching", flush=True)
    while not _is_closed(POLL_S):
        known |= ray_processes(starter_pid, folder)
    known |= {child for process in known for child in _descendants(process)}
    _, left = psutil.wait_procs(known, timeout=GRACE_S)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=GRACE_S)
    shutil.rmtree(folder, ignore_errors=True)


def ray_processes(starter_pid: int, folder: str) -> set[psutil.Process]:
    """The starter's children whose command line names the folder, and all that descends from them."""
    found: set[psutil.Process] = set()
    with suppress(psutil.Error):
        for child in psutil.Process(starter_pid).children():
            with suppress(psutil.Error):
                if child.pid != os.getpid() and any(folder in argument for argument in child.cmdline()):
                    found |= {child, *_descendants(child)}
    return found


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def _is_closed(timeout_s: float) -> bool:
    """Whether the starter let go of the pipe, waiting so long for it."""
    readable, _, _ = select.select([sys.stdin], [], [], timeout_s)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
