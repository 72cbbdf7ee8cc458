"""Puts admin calls that were refused before they reached an operation into the audit log.

Anybody can make such calls, at any rate. Invariants: no answer waits for the store, at most one line is being
written there at a time, and what comes meanwhile is in the process's log alone.
"""

import asyncio
import logging
import time

from buffer.audit import Caller, audit_line
from buffer.errors import SeamError
from buffer.store import AdapterFeed

_log = logging.getLogger(__name__)

_MAX_PATH_LEN = 100


class RefusedCalls:
    """`feed` None: the process's log alone."""

    def __init__(self, feed: AdapterFeed | None) -> None:
        self._feed = feed
        self._is_writing = False

    def note(self, caller: Caller, method: str, path: str, outcome: str) -> None:
        """Called on the event loop."""
        operation = f"{method} {_plain(path)}"
        line = audit_line(caller, operation, outcome, at_s=time.time())
        _log.warning("audit: %s", line.to_json())
        feed = self._feed
        if feed is None or self._is_writing:
            return

        def write() -> None:
            try:
                feed.add_audit_line(line)
            except SeamError as error:
                _log.warning("the audit log lacks the last line: %s", error)
            finally:
                self._is_writing = False

        self._is_writing = True
        asyncio.get_running_loop().run_in_executor(None, write)


def _plain(path: str) -> str:
    """A path may hold anything."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "/_.-") else "?" for char in path)[
        :_MAX_PATH_LEN
    ]
