"""`everdraft doctor`: each finding with what follows from it."""

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.doctor import Check, Subject, examine
from tests.support.ports import free_port
from tests.support.tiny_models import save_tiny_pair


def subject(tmp_path: Path, **changes: object) -> Subject:
    values: dict[str, object] = {"host": "127.0.0.1", "port": free_port(), "state_dir": tmp_path}
    return Subject(**{**values, **changes})  # type: ignore[arg-type]


def found(tmp_path: Path, name: str, **changes: object) -> Check:
    return next(check for check in examine(subject(tmp_path, **changes)) if check.name == name)


def test_this_machine_can_run_everdraft(tmp_path: Path) -> None:
    checks = list(examine(subject(tmp_path / "not" / "there")))
    assert [check.name for check in checks if check.verdict == "failure"] == []
    assert {check.name for check in checks} >= {"python", "torch", "ray", "redis", "mlflow", "port"}


def test_a_port_that_is_taken_is_a_failure(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        check = found(tmp_path, "port", port=taken.getsockname()[1])
    assert check.verdict == "failure"
    assert "--port" in check.consequence


def test_a_pair_that_fits_is_told_with_its_sizes(tmp_path: Path) -> None:
    target, draft = save_tiny_pair(tmp_path)
    check = found(tmp_path, "models", target=target, draft=draft)
    assert check.verdict == "ok", check
    assert "target of" in check.finding and "draft of" in check.finding


def test_the_memory_of_a_pair_is_planned_and_one_that_is_too_large_is_a_failure(tmp_path: Path) -> None:
    target, draft = save_tiny_pair(tmp_path)
    check = found(tmp_path, "plan", target=target, draft=draft)
    assert check.verdict == "ok", check
    assert "keys and values of the target" in check.finding and "in all" in check.finding
    check = found(tmp_path, "plan", target=target, draft=draft, num_slots=10**9)
    assert check.verdict == "failure"
    assert "num_slots=1000000000" in check.consequence and "fits" in check.consequence


def test_a_target_alone_is_a_warning(tmp_path: Path) -> None:
    target, _ = save_tiny_pair(tmp_path)
    check = found(tmp_path, "models", target=target)
    assert check.verdict == "warning"
    assert "nothing is sped up" in check.consequence


def test_a_draft_with_another_vocabulary_is_a_failure(tmp_path: Path) -> None:
    target, _ = save_tiny_pair(tmp_path / "a")
    _, draft = save_tiny_pair(tmp_path / "b", vocab_size=300)
    check = found(tmp_path, "models", target=target, draft=draft)
    assert check.verdict == "failure"
    assert "300" in check.finding


def test_a_redis_that_does_not_answer_is_a_failure(tmp_path: Path) -> None:
    check = found(tmp_path, "redis", redis_url=f"redis://127.0.0.1:{free_port()}/0")
    assert check.verdict == "failure"


@pytest.mark.parametrize(("target", "exit_code"), [(None, 0), ("no/such/model/here", 1)])
def test_the_exit_code_says_whether_it_can_start(tmp_path: Path, target: str | None, exit_code: int) -> None:
    arguments = ["doctor", "--port", str(free_port()), "--state-dir", str(tmp_path)]
    if target is not None:
        arguments += ["--target", target]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == exit_code, done.output
