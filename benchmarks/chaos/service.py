"""The service that is attacked: `everdraft serve` as its operator starts it, with a Redis and an MLflow
server of their own processes. Knows no fault.

Its Redis stands behind a link that can be made slow; its checkpoints and MLflow's files lie on small tmpfs
where this user may mount them. Invariant: leaving the block ends every process and unmounts every folder.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.chaos.slow_link import SlowLink
from benchmarks.process_census import role_of
from buffer.records import ServingStatus
from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_server import EmbeddedRedis
from buffer.redis_store import RedisLink
from deploy.child_command import everdraft_command
from deploy.running import RunningNote, read_note

CHECKPOINTS, MLFLOW = "learner-checkpoints", "mlflow"
"""Folders, in the state folder and beside it."""
_TMPFS_BYTES = 96 * 2**20
_END_S = 60.0
_FAKETIME = "faketime/libfaketime.so.1"

Say = Callable[[str], None]


def wait_until(holds: Callable[[], bool], timeout_s: float, pause_s: float = 0.1) -> bool:
    """Whether it held in time."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(pause_s)
    return True


class MlflowServer:
    """`mlflow server` on SQLite, in a process group of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        with (self._folder.parent / "mlflow.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                    *("--host", "127.0.0.1", "--port", str(self._port)),
                    *("--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"),
                    *("--artifacts-destination", str(self._folder / "artifacts")),
                ],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@dataclass
class Service:
    """Up and answering inside `running_service`."""

    url: str
    model: str
    folder: Path
    state_dir: Path
    process: subprocess.Popen[bytes]
    redis: EmbeddedRedis
    link: SlowLink
    mlflow: MlflowServer
    num_replicas: int
    mounted: frozenset[Path]
    """Folders that are small tmpfs."""
    clock_file: Path | None
    """Where libfaketime reads how far Redis' clock is off; None: it cannot be moved here."""
    second_learner: "subprocess.Popen[bytes] | None" = None
    """On the same Redis, while there is one."""
    _feed: RedisAdapterFeed | None = field(default=None)

    @property
    def note(self) -> RunningNote:
        note = read_note(self.state_dir)
        assert note is not None, "the service is up"
        return note

    @property
    def feed(self) -> RedisAdapterFeed:
        """On Redis itself, not behind the link."""
        if self._feed is None:
            self._feed = RedisAdapterFeed(self.redis.url, self.note.target_revision, timeout_s=1.0)
        return self._feed

    @property
    def checkpoints(self) -> Path:
        return self.state_dir / CHECKPOINTS

    @property
    def mlflow_folder(self) -> Path:
        return self.folder / MLFLOW

    def processes(self) -> list[psutil.Process]:
        """All that `everdraft serve` started and that is alive, itself included."""
        parent = psutil.Process(self.process.pid)
        return [one for one in [parent, *parent.children(recursive=True)] if _is_alive(one)]

    def of_role(self, role: str) -> list[psutil.Process]:
        return [one for one in self.processes() if role_of(_command(one)) == role]

    def census(self) -> Counter[str]:
        """How many processes there are of each role."""
        return Counter(role_of(_command(one)) for one in self.processes())

    def kill_one(self, role: str) -> None:
        """SIGKILL; returns when the kernel is done with it."""
        process = self.of_role(role)[0]
        process.kill()
        wait_until(lambda: not _is_alive(process), 10.0)

    def kill_redis(self) -> None:
        """The server itself; its supervisor starts another."""
        for process in self._redis_servers():
            process.kill()

    def on_redis(self, ask: Callable[[Any], Any]) -> Any:
        """What `ask` makes of a client of Redis itself. Raises StoreUnavailableError."""
        link = RedisLink(self.redis.url, 2.0)
        try:
            with link.translated():
                return ask(link.client)
        finally:
            link.close()

    def statuses(self) -> list[ServingStatus]:
        return self.feed.statuses()

    def _redis_servers(self) -> list[psutil.Process]:
        mine = psutil.Process().children(recursive=True)
        return [one for one in mine if role_of(_command(one)) == "redis"]


def _command(process: psutil.Process) -> str:
    """Empty once it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextmanager
def running_service(
    settings: dict[str, dict[str, Any]],
    folder: Path,
    ports: tuple[int, int],
    say: Say,
    start_s: float = 300.0,
) -> Iterator[Service]:
    """`settings`: sections of a settings file, without Redis, MLflow and ports. `ports`: of the endpoint and
    of MLflow. Raises RuntimeError with what it said where it does not come up."""
    port, mlflow_port = ports
    state_dir = folder / "state"
    with ExitStack() as parts:
        places = (state_dir / CHECKPOINTS, folder / MLFLOW)
        mounted = frozenset(place for place in places if parts.enter_context(_small_disk(place)))
        say("starting Redis and MLflow")
        clock_file = folder / "clock" if _libfaketime() else None
        with _faked_clock(clock_file):
            redis = parts.enter_context(EmbeddedRedis(folder=folder / "redis", restarts=True))
        address = urlsplit(redis.url)
        link = parts.enter_context(SlowLink(address.port or 0))
        mlflow = MlflowServer(folder / MLFLOW, mlflow_port)
        mlflow.start()
        parts.callback(mlflow.kill)
        config = folder / "everdraft.yaml"  # JSON is YAML
        sections = settings | {
            "redis": {"url": f"redis://:{address.password}@127.0.0.1:{link.port}/0"},
            "mlflow": {"tracking_uri": mlflow.uri},
            "cluster": {"port": port, "state_dir": str(state_dir)},
        }
        config.write_text(json.dumps(sections))
        say("starting everdraft serve")
        log = folder / "everdraft.log"
        process = parts.enter_context(_everdraft(("serve", "--config", str(config)), log))
        came_up = wait_until(
            lambda: "Ctrl-C stops" in log.read_text(errors="replace") or process.poll() is not None, start_s
        )
        if not came_up or process.poll() is not None:
            raise RuntimeError(f"everdraft serve did not come up: {log.read_text(errors='replace')[-2000:]}")
        service = Service(
            url=f"http://127.0.0.1:{port}",
            model=settings["serving"].get("model_name", "demo"),
            folder=folder,
            state_dir=state_dir,
            process=process,
            redis=redis,
            link=link,
            mlflow=mlflow,
            num_replicas=settings["serving"].get("num_replicas", 1),
            mounted=mounted,
            clock_file=clock_file,
        )
        try:
            yield service
        finally:
            if service.second_learner is not None:
                service.second_learner.kill()


@contextmanager
def _everdraft(arguments: tuple[str, ...], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """In a process group of its own; its end is asked for and waited for, then forced."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            everdraft_command(*arguments),
            env={**os.environ, "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    started = psutil.Process(process.pid)
    try:
        yield process
    finally:
        left = started.children(recursive=True) if started.is_running() else []
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        for one in [*left, started]:
            with suppress(psutil.Error):
                one.kill()
        process.wait()


def _libfaketime() -> Path | None:
    return next(iter(Path("/usr/lib").glob(f"*/{_FAKETIME}")), None)


@contextmanager
def _faked_clock(clock_file: Path | None) -> Iterator[None]:
    """Processes started inside, and theirs, have the clock that the file says. Redis alone: under this
    library Python's waits end in errors or never, and Ray does not start."""
    if clock_file is None:
        yield
        return
    clock_file.write_text("+0\n")
    environment = {
        "LD_PRELOAD": str(_libfaketime()),
        "FAKETIME_TIMESTAMP_FILE": str(clock_file),
        "FAKETIME_CACHE_DURATION": "1",
    }
    os.environ.update(environment)
    try:
        yield
    finally:
        for name in environment:
            del os.environ[name]


@contextmanager
def _small_disk(place: Path) -> Iterator[bool]:
    """A tmpfs there, if this user may mount one; the folder is made anyway."""
    place.mkdir(parents=True, exist_ok=True)
    is_mounted = _succeeds("mount", "-t", "tmpfs", "-o", f"size={_TMPFS_BYTES}", "tmpfs", str(place))
    try:
        yield is_mounted
    finally:
        if is_mounted:
            _succeeds("umount", "-l", str(place))


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
