"""`everdraft serve` as a user runs it: own models, a real endpoint, and nothing left behind.

Each test starts Ray, Redis, MLflow and the learner, so there are few and each asks for much.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from buffer.file_lock import take_lock
from deploy.running import SERVICE_LOCK
from tests.deploy.everdraft_process import ROOT, EverdraftProcess, post, wait_for
from tests.support.tiny_models import save_tiny_pair

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

GONE_S = 180.0
"""Drain, the learner's last checkpoint, Ray's own end."""


def complete(everdraft: EverdraftProcess, prompt: str) -> str:
    """The text of a greedy completion of 8 tokens, checked to be whole."""
    request = {"model": "target", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    status, body = post(f"{everdraft.url}/v1/completions", json.dumps(request).encode())
    assert status == 200, body
    answer = json.loads(body)
    assert answer["usage"]["completion_tokens"] == 8
    return str(answer["choices"][0]["text"])


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from deploy.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def names(everdraft: EverdraftProcess) -> str:
    return " ".join(" ".join(process.cmdline()) for process in everdraft.census())


def is_of_ray(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any(name in " ".join(process.cmdline()) for name in ("ray::", "raylet", "gcs_server"))
    return False


def test_a_llama_pair_is_served_and_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    target, draft = save_tiny_pair(tmp_path, arch="llama")
    with EverdraftProcess(tmp_path, "serve", "--target", target, "--draft", draft) as everdraft:
        everdraft.wait_until_up()
        assert complete(everdraft, "the quick brown fox") == complete(everdraft, "the quick brown fox")

        said = everdraft.said()
        assert f"curl {everdraft.url}/v1/completions" in said
        assert "mlflow ui --backend-store-uri sqlite:///" in said and f"{everdraft.url}/metrics" in said
        state = ("--state-dir", str(everdraft.state_dir))
        wait_for(lambda: "learner: waiting" in run_cli("status", *state).stdout, timeout_s=300)
        status = run_cli("status", *state)
        assert status.returncode == 0, status.stderr
        assert everdraft.url in status.stdout and "serves the floor" in status.stdout

        second = run_cli("serve", "--target", target, *state)
        assert second.returncode == 2 and "is in use" in second.stderr

        assert "ray::ServeReplica" in names(everdraft) and "redis-server" in names(everdraft)
        everdraft.interrupt()
        everdraft.wait_until_gone(GONE_S)
        assert everdraft.process.returncode == 0, everdraft.said()
        assert not (everdraft.state_dir / "running.json").exists()


@pytest.mark.slow
def test_a_qwen3_pair_is_served_and_sigkill_of_the_parent_ends_every_process(tmp_path: Path) -> None:
    target, draft = save_tiny_pair(tmp_path, arch="qwen3")
    with EverdraftProcess(tmp_path, "serve", "--target", target, "--draft", draft) as everdraft:
        everdraft.wait_until_up()
        assert complete(everdraft, "SELECT name") == complete(everdraft, "SELECT name")
        wait_for(lambda: "ray::LearnerActor" in names(everdraft), timeout_s=300)
        everdraft.kill()
        lock = take_lock(everdraft.state_dir / SERVICE_LOCK, leftovers_s=GONE_S)
        assert isinstance(lock, int), str(lock)
        assert not [process for process in everdraft.census() if is_of_ray(process)]
        os.close(lock)
        everdraft.wait_until_gone(GONE_S)
    left = run_cli("status", "--state-dir", str(everdraft.state_dir))
    assert left.returncode == 2 and "no everdraft runs" in left.stderr


@pytest.mark.slow
def test_without_a_draft_model_a_part_of_the_target_is_chosen_and_learns(tmp_path: Path) -> None:
    target, _ = save_tiny_pair(tmp_path)
    with EverdraftProcess(tmp_path, "serve", "--target", target, "--draft", "self:auto") as everdraft:
        everdraft.wait_until_up()
        assert "drafting with self:" in everdraft.said()
        assert complete(everdraft, "SELECT name") == complete(everdraft, "SELECT name")
        wait_for(lambda: "ray::LearnerActor" in names(everdraft), timeout_s=300)
        state = ("--state-dir", str(everdraft.state_dir))
        wait_for(lambda: "learner: waiting" in run_cli("status", *state).stdout, timeout_s=300)


def test_models_that_cannot_be_served_are_refused_before_anything_starts(tmp_path: Path) -> None:
    done = run_cli("serve", "--target", str(tmp_path / "none"), "--state-dir", str(tmp_path / "state"))
    assert done.returncode == 2
    assert "is no folder; nothing was started" in done.stderr
