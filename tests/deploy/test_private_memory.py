"""Capture mode `memory`: what is refused, and what is said where the machine cannot keep the promise."""

import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis
from pydantic import ValidationError

from buffer.redis_server import EmbeddedRedis
from deploy import wiring
from deploy.errors import SettingsError
from deploy.private_memory import folder_in_memory, may_swap
from deploy.settings import ClusterSettings, RedisSettings
from tests.support.ports import free_port


def machine(folder: Path, swaps: int, limit: str | None) -> tuple[Path, Path]:
    """Its /proc and its cgroups."""
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "swaps").write_text("Filename Type Size Used Priority\n" + "/dev/sda2 partition 1 0 -2\n" * swaps)
    (proc / "self" / "cgroup").write_text("0::/a/service\n")
    (cgroups / "a" / "service").mkdir(parents=True)
    if limit is not None:
        (cgroups / "a" / "service" / "memory.swap.max").write_text(f"{limit}\n")
    return proc, cgroups


@pytest.mark.parametrize(
    ("swaps", "limit", "expected"),
    [(0, None, False), (1, "0", False), (1, "max", True), (2, "4096", True), (1, None, True)],
)
def test_whoever_cannot_tell_may_swap(tmp_path: Path, swaps: int, limit: str | None, expected: bool) -> None:
    assert may_swap(*machine(tmp_path, swaps, limit)) == expected
    assert may_swap(tmp_path / "nowhere", tmp_path / "nowhere")


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(wiring, "forbid_core_dumps", lambda: None)
    monkeypatch.setattr(wiring, "may_swap", lambda: True)
    monkeypatch.setattr(wiring, "folder_in_memory", lambda num_bytes: None)
    wiring.keep_off_disk(ClusterSettings(), said.append)
    wiring.keep_off_disk(ClusterSettings(ray_address="there:1"), said.append)
    assert [line.split(":")[0] for line in said] == [
        "this machine may swap memory to a disk, and no process can lock that of another",
        "/dev/shm is no memory here, or less than Ray needs (cluster.object_store_bytes and 256 MiB)",
        "this machine may swap memory to a disk, and no process can lock that of another",
        "Ray at there",
    ]
    said.clear()
    monkeypatch.setattr(wiring, "may_swap", lambda: False)
    monkeypatch.setattr(wiring, "folder_in_memory", lambda num_bytes: Path("/dev/shm"))
    wiring.keep_off_disk(ClusterSettings(), said.append)
    assert said == []


def test_a_folder_in_memory_has_the_room_that_is_asked_for() -> None:
    assert folder_in_memory(2**60) is None


def test_a_process_that_forbade_core_dumps_starts_others_that_leave_none() -> None:
    script = (
        "import resource, subprocess, sys\n"
        "from deploy.private_memory import forbid_core_dumps\n"
        "forbid_core_dumps()\n"
        "child = 'import resource; print(resource.getrlimit(resource.RLIMIT_CORE)[0])'\n"
        "subprocess.run([sys.executable, '-c', child], check=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) in (0, 1)


def test_a_redis_of_our_own_leaves_no_core_dump() -> None:
    with EmbeddedRedis(is_sealed=True) as server:
        assert server.pid is not None
        assert psutil.Process(server.pid).rlimit(resource.RLIMIT_CORE)[0] in (0, 1)


def test_a_server_that_persists_is_refused_before_anything_starts() -> None:
    said: list[str] = []
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
        wiring.check_memory_redis(server.url, said.append)
        assert said == []
        client.config_set("appendonly", "yes")
        with pytest.raises(SettingsError, match=r"redis\.memory_url: .*appendonly yes.*nothing was started"):
            wiring.check_memory_redis(server.url, said.append)
    with pytest.raises(SettingsError, match=r"redis\.memory_url: .*schemes"):
        wiring.check_memory_redis("http://there", said.append)


def test_one_that_is_away_stops_no_start_and_is_named() -> None:
    """Whoever writes to it asks it again, before the first record."""
    said: list[str] = []
    wiring.check_memory_redis(f"redis://:secret@127.0.0.1:{free_port()}", said.append)
    assert len(said) == 1 and said[0].startswith("redis.memory_url: ") and "secret" not in said[0]


def test_both_stores_on_one_server_are_refused() -> None:
    with pytest.raises(ValidationError, match="memory_url is that of url"):
        RedisSettings(url="redis://a/0", memory_url="redis://a/0")
