"""What is wrong with a model or a device ends a command before Ray, Redis or a learner is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.doctor import examine
from tests.deploy.everdraft_process import ROOT
from tests.deploy.test_doctor import subject
from tests.support.ports import free_port
from tests.support.tiny_models import save_tiny_pair


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """With a standard input on which a question would wait for good."""
    command = [sys.executable, "-c", "from deploy.cli import main; main()", *arguments]
    silence, pen = os.pipe()
    try:
        return subprocess.run(
            command, cwd=ROOT, stdin=silence, capture_output=True, text=True, check=False, timeout=100
        )
    finally:
        os.close(silence)
        os.close(pen)


def assert_plainly_refused(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "starting" not in done.stderr
    assert [part for part in fragments if part not in done.stderr] == [], done.stderr


@pytest.mark.timeout(120)
def test_serve_refuses_a_checkpoint_that_lacks_a_tensor_before_anything_starts(tmp_path: Path) -> None:
    target, draft = save_tiny_pair(tmp_path)
    tensors = load_file(f"{draft}/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, f"{draft}/model.safetensors", metadata={"format": "pt"})
    state_dir = tmp_path / "state"
    arguments = ["serve", "--target", target, "--draft", draft, "--port", str(free_port())]
    done = run_cli(*arguments, "--state-dir", str(state_dir))
    assert_plainly_refused(done, draft, "lacks 1 of its tensors: 'model.norm.weight'", "nothing was started")
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (state_dir / "redis").exists()


@pytest.mark.timeout(120)
def test_learn_refuses_a_draft_that_is_not_finite(tmp_path: Path) -> None:
    target, draft = save_tiny_pair(tmp_path)
    tensors = load_file(f"{draft}/model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, f"{draft}/model.safetensors", metadata={"format": "pt"})
    arguments = ["learn", "--target", target, "--draft", draft, "--redis-url", "redis://127.0.0.1:1/0"]
    done = run_cli(*arguments, "--state-dir", str(tmp_path / "state"))
    assert_plainly_refused(done, draft, "not finite", "'model.norm.weight'")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_doctor_says_that_a_device_is_none(device: str, tmp_path: Path) -> None:
    check = next(check for check in examine(subject(tmp_path, device=device)) if check.name == "torch")
    assert check.verdict == "failure"
    assert f"device={device!r}" in check.consequence
