"""The command line as a whole: quick where nothing is to be done, plain where something is wrong."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import COMMANDS, app
from deploy.environment import QUIET_LIBRARIES, quieten_libraries
from tests.deploy.everdraft_process import ROOT

HEAVY = ("torch", "ray", "mlflow", "transformers", "redis")


def test_the_version_is_that_of_the_distribution() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.output.startswith("everdraft 0.")


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "serve",
        "learn",
        "status",
        "drafts",
        "learning",
        "capture",
        "drain",
        "key",
        "records",
        "admin",
        "doctor",
    ],
)
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


def everdraft(folder: Path, entry_points: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line where everdraft-bench is installed with these entry points: of two distributions of
    one name, the first on the path counts."""
    info = folder / "everdraft_bench-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: everdraft-bench\nVersion: 0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return subprocess.run(
        [sys.executable, "-c", "from deploy.cli import main; main()", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))},
        capture_output=True,
        text=True,
    )


def test_the_benchmarks_bring_their_commands_by_an_entry_point(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "benchmarks" / "pyproject.toml").read_text())["project"]
    points = project["entry-points"][COMMANDS]
    lines = [f"[{COMMANDS}]", *(f"{name} = {value}" for name, value in points.items())]
    shown = everdraft(tmp_path, "\n".join(lines), "bench", "--help")
    assert shown.returncode == 0, shown.stderr
    commands = {"engine", "throughput", "overheads", "prefix", "pair", "osd", "attacks"}
    assert commands <= set(shown.stdout.split())


@pytest.mark.parametrize("further", [[], ["--help"], ["osd", "--experiment", "shift"]])
def test_without_the_benchmarks_bench_says_what_to_install(tmp_path: Path, further: list[str]) -> None:
    done = everdraft(tmp_path, "", "bench", *further)
    assert done.returncode == 2
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert "pip install everdraft-bench" in done.stderr


def test_help_lists_bench_where_it_is_absent(tmp_path: Path) -> None:
    shown = everdraft(tmp_path, "", "--help")
    assert shown.returncode == 0
    assert "`everdraft bench` says why, and what to install" in shown.stdout


def test_commands_that_cannot_be_loaded_cost_no_others(tmp_path: Path) -> None:
    points = f"[{COMMANDS}]\nbench = benchmarks.no_such_module:app\nspoilt = json:no_such_name\n"
    done = everdraft(tmp_path, points, "spoilt", "--help")
    assert done.returncode == 2
    assert "`everdraft spoilt` cannot be loaded from json:no_such_name" in done.stderr


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
