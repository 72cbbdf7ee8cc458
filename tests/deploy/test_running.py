"""One service and one learner a state folder: who comes second is refused before anything starts."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from buffer.file_lock import process_started_at_s
from deploy.cli import app
from deploy.demo.train_pair.fit import Budget, TrainingInUseError, fit
from deploy.errors import SettingsError, StateFolderInUseError
from deploy.running import (
    LEARNER_SNAPSHOT,
    NOTE,
    claimed_folder,
    own_note,
    read_note,
    sole_learner,
    write_learner_snapshot,
    write_note,
)
from tests.deploy.everdraft_process import ROOT

URL = "http://127.0.0.1:8123"
STARTING = f"""
import sys
from pathlib import Path
from deploy.running import claimed_folder, sole_learner
folder = Path(sys.argv[1])
claims = {{
    "serve": lambda: claimed_folder(folder, url="{URL}", learns=True),
    "serve --no-learner": lambda: claimed_folder(folder, url="{URL}", learns=False),
    "learn": lambda: sole_learner(folder),
}}
with claims[sys.argv[2]]():
    print("starting", flush=True)
    sys.stdin.read()
"""
"""What each command does first, by the name of the command; then it takes its time."""


@contextmanager
def starting(command: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has begun to run the command on the folder, and has noted nothing yet."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    script = [sys.executable, "-c", STARTING, str(folder), command]
    with subprocess.Popen(script, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        try:
            yield process
        finally:
            process.kill()


def run(folder: Path, *command: str) -> Result:
    """Its models do not exist, so a run that were not refused for its folder would be for them."""
    models = ["--target", "/no/such/target", "--draft", "/no/such/draft"]
    return CliRunner().invoke(app, [*command, *models, "--state-dir", str(folder)])


def note(url: str = URL):  # type: ignore[no-untyped-def]
    return own_note(
        target_revision="t",
        url=url,
        redis_url="redis://:sesame@h",
        tracking_uri="",
        target="t",
        draft="d",
        learns=False,
    )


@pytest.mark.parametrize("first", ["serve", "serve --no-learner"])
def test_a_second_service_is_refused_from_the_firsts_first_moment(tmp_path: Path, first: str) -> None:
    with starting(first, tmp_path) as other:
        second = run(tmp_path, "serve", "--port", "8124")
        assert second.exit_code == 2
        assert f"in use by another everdraft, process {other.pid} ({URL})" in second.stderr
        assert "nothing was started" in second.stderr and "--state-dir" in second.stderr
        demo = CliRunner().invoke(app, ["demo", "--exit", "--state-dir", str(tmp_path)])
        assert demo.exit_code == 2
        assert f"process {other.pid}" in demo.stderr


@pytest.mark.parametrize(
    ("first", "second"),
    [("serve", ("learn",)), ("learn", ("learn",)), ("learn", ("serve",))],
)
def test_a_second_learner_is_refused_whoever_runs_it(
    tmp_path: Path, first: str, second: tuple[str, ...]
) -> None:
    with starting(first, tmp_path) as other:
        refused = run(tmp_path, *second, "--redis-url", "redis://127.0.0.1:1")
        assert refused.exit_code == 2
        assert f"another learner uses it, process {other.pid}" in refused.stderr


@pytest.mark.parametrize(
    ("first", "second"),
    [("serve --no-learner", ("learn",)), ("learn", ("serve", "--no-learner"))],
)
def test_a_learner_beside_a_service_without_one_is_welcome(
    tmp_path: Path, first: str, second: tuple[str, ...]
) -> None:
    with starting(first, tmp_path):
        let_in = run(tmp_path, *second, "--redis-url", "redis://127.0.0.1:1")
        assert "/no/such/target" in let_in.stderr and "uses it" not in let_in.stderr


def test_a_service_that_was_killed_blocks_nobody(tmp_path: Path) -> None:
    with starting("serve", tmp_path) as other:
        other.kill()
        other.wait()
        with claimed_folder(tmp_path, url=URL, learns=True) as locks:
            assert len(locks) == 2, "the service's and the learner's"


def test_a_note_leaves_with_who_wrote_it_and_nobody_elses_does(tmp_path: Path) -> None:
    with claimed_folder(tmp_path, url=URL, learns=False):
        write_note(tmp_path, note())
        write_learner_snapshot(tmp_path, {"state": "learning"})  # of an `everdraft learn` beside it
    assert read_note(tmp_path) is None and (tmp_path / LEARNER_SNAPSHOT).exists()

    with starting("learn", tmp_path) as other, claimed_folder(tmp_path, url=URL, learns=False):
        started_at_s = process_started_at_s(other.pid) or 0.0
        others = replace(
            note(), pid=other.pid, process_started_at_s=started_at_s
        )  # as of a service that lost the folder under its feet
        write_note(tmp_path, others)
    assert (tmp_path / NOTE).exists()

    with claimed_folder(tmp_path, url=URL, learns=True):
        write_learner_snapshot(tmp_path, {"state": "learning"})
    assert not (tmp_path / LEARNER_SNAPSHOT).exists()


def test_who_is_refused_removes_nothing(tmp_path: Path) -> None:
    with starting("serve", tmp_path):
        write_note(tmp_path, note())
        with pytest.raises(StateFolderInUseError), claimed_folder(tmp_path, url=URL, learns=True):
            pass
        assert read_note(tmp_path) == note()


def test_two_trainings_do_not_write_one_checkpoint(tmp_path: Path) -> None:
    def never(_: int) -> list[Callable[[], torch.Tensor]]:
        raise AssertionError("a step was trained")

    with starting("serve", tmp_path):
        (tmp_path / "draft.lock").symlink_to(tmp_path / "everdraft.lock")  # as if that process trained
        with pytest.raises(TrainingInUseError, match="nothing was trained"):
            fit(torch.nn.Linear(1, 1), never, [], Budget(1, 1.0), tmp_path / "draft.pt")


@pytest.mark.parametrize("place", ["a file", "below a file", "lock is a folder", "no place to write"])
def test_a_folder_that_cannot_be_locked_is_refused_with_its_name(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "everdraft.lock").mkdir()
    (tmp_path / "learner.lock").mkdir()
    folders = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "state",
        "lock is a folder": tmp_path,
        "no place to write": Path("/proc/everdraft"),
    }
    for claim in (claimed_folder(folders[place], url=URL, learns=True), sole_learner(folders[place])):
        with pytest.raises(SettingsError, match=r"cannot be locked .*nothing was started"), claim:
            pass
    done = run(folders[place], "serve")
    assert done.exit_code == 2
    assert f"cluster.state_dir={folders[place]}" in done.stderr


def test_the_note_is_for_its_owner_alone_and_shows_no_password(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        write_note(tmp_path, note())
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / NOTE).stat().st_mode) == 0o600
    assert "sesame" not in repr(read_note(tmp_path))
