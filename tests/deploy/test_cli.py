"""The command line as a whole: quick where nothing is to be done, plain where something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.environment import QUIET_LIBRARIES, quieten_libraries
from tests.deploy.everdraft_process import ROOT

HEAVY = ("torch", "ray", "mlflow", "transformers", "redis")


def test_the_version_is_that_of_the_distribution() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.output.startswith("everdraft 0.")


@pytest.mark.parametrize("command", ["demo", "serve", "learn", "status", "drafts", "bench", "doctor"])
def test_every_command_explains_itself(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert "Usage" in shown.output


def test_the_console_script_loads_nothing_heavy_for_help() -> None:
    script = (
        "import sys; from deploy.cli import main\n"
        "sys.argv = ['everdraft', '--help']\n"
        "try: main()\n"
        f"except SystemExit: print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_a_wrong_setting_ends_serve_with_one_plain_line(tmp_path: Path) -> None:
    file = tmp_path / "everdraft.toml"
    file.write_text("[serving]\ntarget = 'models/a'\nnum_slot = 4\n")
    done = CliRunner().invoke(app, ["serve", "--config", str(file)])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean serving.num_slots?" in done.stderr


def test_serve_without_a_target_says_how_to_give_one() -> None:
    done = CliRunner().invoke(app, ["serve"])
    assert done.exit_code == 2
    assert "serving.target is missing" in done.stderr


def test_learn_without_redis_says_how_to_give_it(tmp_path: Path) -> None:
    arguments = ["learn", "--target", "a", "--draft", "b", "--state-dir", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "--redis-url" in done.stderr


def test_learn_without_a_draft_has_nothing_to_teach(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["learn", "--target", "a", "--state-dir", str(tmp_path)])
    assert done.exit_code == 2
    assert "--draft" in done.stderr


def test_telemetry_is_off_unless_the_operator_says_otherwise() -> None:
    environment = {"MLFLOW_DISABLE_TELEMETRY": "false"}
    quieten_libraries(environment)
    assert environment == QUIET_LIBRARIES | {"MLFLOW_DISABLE_TELEMETRY": "false"}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
