"""Writes what the other processes of a service log to standard error, line by line.

Ray keeps the output of its processes in files of its own, which end with it. Invariant: nobody waits for this
process: what it does not read in time is lost.
"""

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

_MAX_LINE_BYTES = 256 * 2**10
_LAST_LINES_S = 1.0


Write = Callable[[str], object]


def to_standard_error(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@contextmanager
def log_relay(write: Write = to_standard_error) -> Iterator[str]:
    """Inside the block, lines that processes send to the path given are written out."""
    with (
        TemporaryDirectory(prefix="everdraft-log-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        path = str(Path(folder) / "lines")
        listener.bind(path)
        listener.listen()
        readers = list[threading.Thread]()
        accepting = threading.Thread(
            target=_accept, args=(listener, write, readers), name="log-relay", daemon=True
        )
        accepting.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *readers):
                thread.join(_LAST_LINES_S)


def _accept(listener: socket.socket, write: Write, readers: list[threading.Thread]) -> None:
    with suppress(OSError):  # the listener was shut down
        while True:
            connection, _ = listener.accept()
            reader = threading.Thread(
                target=_write_all, args=(connection, write), name="log-relay", daemon=True
            )
            readers.append(reader)
            reader.start()


def _write_all(connection: socket.socket, write: Write) -> None:
    """Until the process has ended."""
    with connection, suppress(OSError):
        while line := connection.recv(_MAX_LINE_BYTES):
            write(line.decode(errors="replace"))
