"""Runs a Redis server for one parent process and ends it with that parent, however the parent dies.

A script of the standard library alone, started by `redis_server` as a process of its own. It has one thread,
so the kernel can kill the server with it (Linux ties that signal to the *thread* that forked, which in the
parent may be a short-lived one); and it sees by its own parent's id that the parent is gone. It knows nothing
of what the server holds. Invariant: the server never outlives it.

Arguments: the parent's process id, the server binary, the server's folder, "keep" or "remove" (the folder, at
the end), and descriptors of locks that the server keeps open as long as it runs, even if this process is
killed. Standard input: the server's configuration. Standard output: the first server's process id; then, if
the server ends unexpectedly, the end of its log. After SIGUSR1, which says that the server is up and has to
stay up, one that ends is started again instead.
"""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_LOG_NAME = "redis.log"
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_GRACE_S = 3.0
"""How long a server may take to flush and end before it is killed."""
_RESTART_PAUSE_S = 0.5


def main(parent_pid: int, binary: str, folder: Path, keep: bool, locks: tuple[int, ...] = ()) -> None:
    has_to_stay_up = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: has_to_stay_up.set())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    configuration = sys.stdin.buffer.read()
    server = None
    try:
        server = _start(binary, configuration, folder / _LOG_NAME, locks)
        print(server.pid, flush=True)
        while os.getppid() == parent_pid:
            if server.poll() is not None and has_to_stay_up.is_set():
                time.sleep(_RESTART_PAUSE_S)
                server = _start(binary, configuration, folder / _LOG_NAME, locks)
            elif server.poll() is not None:
                print((folder / _LOG_NAME).read_text(errors="replace")[-2000:], flush=True)
                return
            time.sleep(_POLL_S)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if server is not None:
            _end(server)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _start(
    binary: str, configuration: bytes, log_path: Path, locks: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            [binary, "-"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            preexec_fn=_guarded,
            pass_fds=locks,
        )
    assert server.stdin is not None
    server.stdin.write(configuration)
    server.stdin.close()
    return server


def _guarded() -> None:
    """The server dies with this process, and leaves no core dump, which would hold all that it held: a limit
    of one byte also forbids the kernel to hand one to a program, as a limit of none would not."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0 if hard == 0 else 1, hard))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    parent, binary, folder, keep, *locks = sys.argv[1:]
    main(int(parent), binary, Path(folder), keep == "keep", tuple(map(int, locks)))
