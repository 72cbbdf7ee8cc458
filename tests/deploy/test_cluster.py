"""Parts of the cluster that need no Ray: ports, and the guard that ends what a killed starter leaves."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deploy import ray_guard
from deploy.cluster import own_ray, temp_root
from deploy.errors import ClusterError
from deploy.ports import port_is_free, require_free_port
from tests.deploy.everdraft_process import wait_for
from tests.support.ports import free_port

STARTER = """
import json, os, subprocess, sys, time
folder, guard = sys.argv[1], sys.argv[2]
family = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); sys.stdin.read()"
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
guard = subprocess.Popen([sys.executable, "-P", guard, str(os.getpid()), folder], **pipes)
guard.stdout.readline()
ours = subprocess.Popen([sys.executable, "-c", family, folder + "/logs"], **pipes)
other = subprocess.Popen(["sleep", "601"])
grandchild = int(ours.stdout.readline())
time.sleep(3)
print(json.dumps({"ours": [ours.pid, grandchild], "other": other.pid, "guard": guard.pid}), flush=True)
time.sleep(600)
"""


def test_the_guard_ends_what_names_the_folder_and_its_descendants_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    command = [sys.executable, "-c", STARTER, str(folder), ray_guard.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pids = json.loads(starter.stdout.readline())
        ours = [psutil.Process(pid) for pid in pids["ours"]]
        other, guard = psutil.Process(pids["other"]), psutil.Process(pids["guard"])
        assert all(process.is_running() for process in (*ours, other, guard))
        starter.kill()
    try:
        wait_for(
            lambda: not any(is_alive(process) for process in (*ours, guard)),
            timeout_s=20,
            explain=lambda: f"{ours} {guard}",
        )
        assert is_alive(other)
        assert not folder.exists()
    finally:
        other.kill()


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_a_port_is_free_until_somebody_listens() -> None:
    port = free_port()
    assert port_is_free("127.0.0.1", port)
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(ClusterError, match=f"cluster.port={port} is taken"),
    ):
        require_free_port("127.0.0.1", port)


def test_the_temporary_folder_leaves_room_for_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 20)))
    assert len(str(temp_root())) <= 24


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: object) -> None:
        raise RuntimeError("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr("ray.init", init)
    with (
        pytest.raises(ClusterError, match=r"Ray did not start.*busy: The current node timed") as caught,
        own_ray(namespace="n", num_cpus=1, object_store_bytes=10**8),
    ):
        pass
    assert "\n" not in str(caught.value)
