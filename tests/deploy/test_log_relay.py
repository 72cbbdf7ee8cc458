"""What other processes log comes out here, line by line, and none of them waits."""

import json
import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.log_relay import log_relay
from serving.log_lines import RelayHandler

SPEAKER = (
    "import sys, logging\n"
    "from serving.log_lines import LogPlan\n"
    "LogPlan('json', sys.argv[1]).begin(process='replica')\n"
    "logging.getLogger('serving').info('draft %d serves', 3)\n"
)


def test_lines_of_another_process_come_out_here(capsys: pytest.CaptureFixture[str]) -> None:
    with log_relay() as path:
        done = subprocess.run([sys.executable, "-c", SPEAKER, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    [line] = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "draft 3 serves"


def test_without_a_relay_a_process_writes_them_itself() -> None:
    done = subprocess.run([sys.executable, "-c", SPEAKER, "/nowhere"], capture_output=True, text=True)
    assert json.loads(done.stderr)["process"] == "replica"


def test_nobody_waits_for_a_relay_that_reads_nothing(tmp_path: Path) -> None:
    """Fifty thousand lines into a socket that holds some thousands: those without room are lost."""
    path = str(tmp_path / "lines")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as deaf:
        deaf.bind(path)
        deaf.listen()
        handler = RelayHandler(path)
        record = logging.LogRecord("serving.x", logging.INFO, "x.py", 1, "x" * 100, (), None)
        for _ in range(50_000):
            handler.emit(record)
        connection, _ = deaf.accept()
        with connection:
            handler.close()
            received = 0
            while connection.recv(1000):
                received += 1
        assert 100 < received < 50_000
