"""What the processes of a service log: as Python prints it, or a JSON object a line, with the request's id.

Invariants: no line holds what users wrote, so that an exception is told by its type and by where it was
raised, and not by its message, which may quote a request; and a line that nobody reads is dropped, so that
nothing waits for a log.
"""

import json
import logging
import socket
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the API request that is being answered, as in X-Request-Id; empty elsewhere."""
FIELDS = "fields"
"""Of a log record: further members of its JSON line, given as `extra`."""

_OURS = ("buffer", "serving", "learner", "deploy")
_MAX_FRAMES = 12
_WAITING_BYTES = 2**20
"""Lines on their way to another process; the kernel may allow less."""


def where_raised(error: BaseException) -> str:
    """The type, and the innermost calls; without the message."""
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    calls = (f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in reversed(frames))
    return " < ".join((type(error).__name__, *calls))


class JsonFormatter(logging.Formatter):
    """`process`: members of every line, which say whose it is."""

    def __init__(self, process: Mapping[str, str]) -> None:
        super().__init__()
        self._process = dict(process)

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
        }
        if request_id := REQUEST_ID.get():
            line["request_id"] = request_id
        line |= getattr(record, FIELDS, {})
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = where_raised(record.exc_info[1])
        return json.dumps(line, default=str)


class RelayHandler(logging.Handler):
    """Sends each line to the process that listens at `path`. One that does not take it at once gets none."""

    def __init__(self, path: str) -> None:
        """Raises OSError where nobody listens."""
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _WAITING_BYTES)
        self._socket.setblocking(False)
        self._socket.connect(path)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            self._socket.send(self.format(record).encode())

    def close(self) -> None:
        self._socket.close()
        super().close()


@dataclass(frozen=True)
class LogPlan:
    """How a process is to log; goes to every process of a service."""

    format: LogFormat = "text"
    """`text` leaves Python's logging as it is."""
    relay: str | None = None
    """Where another process on this machine writes the lines out; None, or nobody there: standard error."""

    def begin(self, **process: str) -> None:
        """From here on this process logs so."""
        if self.format == "text":
            return
        handler = self._handler()
        handler.setFormatter(JsonFormatter(process))
        logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
        logging.raiseExceptions = False  # of a line that cannot be written Python would print everything
        for name in _OURS:
            logging.getLogger(name).setLevel(logging.INFO)

    def _handler(self) -> logging.Handler:
        if self.relay is not None:
            with suppress(OSError):
                return RelayHandler(self.relay)
        return logging.StreamHandler(sys.stderr)
