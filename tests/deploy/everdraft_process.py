"""A real `everdraft` in a process of its own, and the census of everything that it started."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.ports import free_port

ROOT = Path(__file__).parent.parent.parent
MARK = "EVERDRAFT_TEST_SESSION"
START_S = 150.0


class EverdraftProcess:
    """`everdraft ARGUMENTS`, its children marked through the environment that they inherit.

    Started in a process group of its own, as a shell would, so that `interrupt` is a Ctrl-C.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.state_dir = folder / "state"
        self._session = uuid.uuid4().hex
        self._seen: set[psutil.Process] = set()
        self._log = folder / "everdraft.log"
        self._output = self._log.open("wb")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", "from deploy.cli import main; main()", *arguments),
                *("--port", str(self.port), "--state-dir", str(self.state_dir)),
            ],
            cwd=ROOT,
            env={**os.environ, MARK: self._session, "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )

    def __enter__(self) -> "EverdraftProcess":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.census():
            process.kill()
        self.process.wait()
        self._output.close()

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_up(self) -> None:
        """Until it has said where it is; an early end fails with what it said."""
        wait_for(lambda: "Ctrl-C stops" in self.said() or self.process.poll() is not None, START_S)
        assert self.process.poll() is None, self.said()

    def census(self) -> list[psutil.Process]:
        """Every process of this run that is alive, whoever its parent is by now.

        Descendants are remembered: a server that renames itself overwrites its environment.
        """
        for process in psutil.process_iter():
            if self._is_marked(process):
                self._seen.add(process)
                with suppress(psutil.Error):
                    self._seen.update(process.children(recursive=True))
        return [process for process in self._seen if _is_alive(process)]

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL, until the kernel is done with it: before, the process still counts as running."""
        self.process.kill()
        self.process.wait()

    def wait_until_gone(self, timeout_s: float) -> None:
        """Until no process of this run is left; the survivors are named otherwise."""
        self.process.wait(timeout_s)
        wait_for(lambda: not self.census(), timeout_s, lambda: f"{self.census()} {self.said()}")

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self._session
        except (psutil.Error, OSError):
            return False


def _is_alive(process: psutil.Process) -> bool:
    """The very process, not another with its id, and not only its corpse."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def wait_for(holds: Callable[[], bool], timeout_s: float, explain: Callable[[], str] = lambda: "") -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s {explain()}"
        time.sleep(0.1)


def post(url: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of a JSON request."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
