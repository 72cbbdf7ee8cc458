"""Puts admin calls that were refused before they reached an operation into the audit log.

Anybody can make such calls, at any rate. Invariants: no answer waits for the store, one thread at most writes
to it, and what comes while many lines wait is in the process's log alone.
"""

import asyncio
import logging
import threading
import time
from collections import deque

from buffer.audit import AuditLine, Caller, audit_line
from buffer.errors import SeamError
from buffer.store import AdapterFeed

_log = logging.getLogger(__name__)

_MAX_PATH_LEN = 100
_MAX_WAITING = 100


class RefusedCalls:
    """`feed` None: the process's log alone."""

    def __init__(self, feed: AdapterFeed | None) -> None:
        self._feed = feed
        self._waiting: deque[AuditLine] = deque()
        self._is_writing = False
        self._lock = threading.Lock()

    def note(self, caller: Caller, method: str, path: str, outcome: str) -> None:
        """Called on the event loop."""
        line = audit_line(caller, f"{method} {_plain(path)}", outcome, at_s=time.time())
        _log.warning("audit: %s", line.to_json())
        if self._feed is None:
            return
        with self._lock:
            if len(self._waiting) < _MAX_WAITING:
                self._waiting.append(line)
            if self._is_writing:
                return
            self._is_writing = True
        asyncio.get_running_loop().run_in_executor(None, self._write, self._feed)

    def _write(self, feed: AdapterFeed) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_writing = False
                    return
                line = self._waiting.popleft()
            try:
                feed.add_audit_line(line)
            except SeamError as error:
                _log.warning("the audit log lacks a line of a refused call: %s", error)


def _plain(path: str) -> str:
    """A path may hold anything."""
    kept = (char if char.isascii() and (char.isalnum() or char in "/_.-") else "?" for char in path)
    return "".join(kept)[:_MAX_PATH_LEN]
