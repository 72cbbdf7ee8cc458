"""The lock that says who holds it, between real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from buffer.file_lock import Holder, take_lock

ROOT = Path(__file__).parents[2]

HOLDER = """
import sys
from pathlib import Path
from buffer.file_lock import Holder, take_lock
lock = take_lock(Path(sys.argv[1]), "at work", leftovers_s=0.0)
print("refused" if isinstance(lock, Holder) else "taken", flush=True)
sys.stdin.read()
"""
LEAVING_A_CHILD = """
import subprocess, sys, time
from pathlib import Path
from buffer.file_lock import take_lock
lock = take_lock(Path(sys.argv[1]))
sleep = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
subprocess.Popen(sleep, stdin=0, pass_fds=(lock,) if sys.argv[2] == "inherits" else ())
print("taken", flush=True)
time.sleep(600)
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def taken(file: Path, leftovers_s: float = 60.0) -> bool:
    lock = take_lock(file, leftovers_s=leftovers_s)
    if isinstance(lock, Holder):
        return False
    os.close(lock)
    return True


def test_of_processes_that_start_together_one_gets_the_lock(tmp_path: Path) -> None:
    together = [start(HOLDER, str(tmp_path / "lock")) for _ in range(4)]
    answers = sorted(first_line(process) for process in together)
    for process in together:
        process.communicate("")
    assert answers == ["refused", "refused", "refused", "taken"]


def test_who_is_refused_is_told_at_once_who_holds_it_and_a_killed_holder_blocks_nobody(
    tmp_path: Path,
) -> None:
    with start(HOLDER, str(tmp_path / "lock")) as holder:
        assert first_line(holder) == "taken"
        refused = take_lock(tmp_path / "lock", leftovers_s=600.0)  # the test would end long before
        assert isinstance(refused, Holder)
        assert str(refused) == f"process {holder.pid} (at work)"
        holder.kill()
        holder.wait()
        assert taken(tmp_path / "lock")  # the file is still there


@pytest.mark.parametrize("child", ["inherits", "does not"])
def test_a_child_keeps_the_lock_of_a_killed_parent_only_if_it_was_passed_on(
    tmp_path: Path, child: str
) -> None:
    parent = start(LEAVING_A_CHILD, str(tmp_path / "lock"), child)
    with parent:
        assert first_line(parent) == "taken"
        parent.kill()
        parent.wait()
        left = take_lock(tmp_path / "lock", leftovers_s=0.3 if child == "inherits" else 60.0)
        if child == "inherits":
            assert str(left) == f"what is left of process {parent.pid}"
        else:
            assert isinstance(left, int)
            os.close(left)
        assert parent.stdin is not None
        parent.stdin.close()  # and with it the child's
        assert taken(tmp_path / "lock")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "x"}', '{"pid": -1}', "null"])
def test_what_a_file_says_while_nobody_holds_it_is_not_trusted(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    assert taken(tmp_path / "lock")


def test_a_place_where_no_lock_can_be_had_is_an_error_and_not_a_holder(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        take_lock(tmp_path)
    with pytest.raises(OSError):
        take_lock(tmp_path / "no folder" / "lock")
