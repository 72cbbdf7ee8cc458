"""`everdraft learn`: a learner of its own process, on records that others left in Redis."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from buffer.redis_server import EmbeddedRedis
from deploy.running import read_learner_snapshot
from tests.deploy.everdraft_process import ROOT, wait_for
from tests.support.tiny_models import save_tiny_pair

SCRIPT = "import sys\nfrom deploy.cli import main\nmain()"


@pytest.mark.timeout(300)
def test_it_learns_without_ray_tells_its_state_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    target, draft = save_tiny_pair(tmp_path)
    state_dir = tmp_path / "state"
    with EmbeddedRedis() as server:
        arguments = ["--target", target, "--draft", draft, "--redis-url", server.url]
        learner = start(*arguments, "--state-dir", str(state_dir))
        with learner:
            wait_for(lambda: read_learner_snapshot(state_dir) is not None, 90, lambda: said(learner))
            # tracked on a thread of its own, which an early end would not wait for
            wait_for((state_dir / "mlflow" / "mlflow.db").exists, 90, lambda: said(learner))
            second = start(*arguments, "--state-dir", str(state_dir))
            assert "another learner uses it" in second.communicate(timeout=60)[0]
            learner.send_signal(signal.SIGINT)
            output, _ = learner.communicate(timeout=60)
    assert learner.returncode == 0, output
    snapshot = read_learner_snapshot(state_dir)
    assert snapshot is not None and snapshot["state"] == "waiting"


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "learn", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    """Everything it said; ends it, so for a test that has failed already."""
    process.kill()
    return process.communicate()[0]
