"""What a Redis server writes to its disk, and how that forgets what was deleted.

Works with the link that it is given and knows no redis library. Nothing here waits longer than
REWRITE_TIMEOUT_S. A server that refuses to be asked, as managed ones do, is reported and never guessed about.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from buffer.errors import StoreUnavailableError

REWRITE_TIMEOUT_S = 60.0
_POLL_S = 0.05
_APPEND_ONLY_FILE = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "aof_last_bgrewrite_status")
_SNAPSHOT = ("rdb_bgsave_in_progress", "rdb_bgsave_in_progress", "rdb_last_bgsave_status")
"""What INFO calls: it is being written, it will be, how the last time ended."""


class TranslatingLink(Protocol):
    """The part of RedisLink that is used here."""

    @property
    def client(self) -> Any: ...

    @property
    def shown_url(self) -> str: ...

    def translated(self) -> AbstractContextManager[None]: ...


def how_persistent(link: TranslatingLink) -> str:
    """The setting by which the server writes what it holds to a disk; empty: it does not, or does not say.
    Raises StoreUnavailableError where it cannot be reached."""
    with link.translated():
        if any(server.info("persistence")["aof_enabled"] for server in _servers(link.client)):
            return "appendonly yes"
    points = _setting(link, "save")
    return f'save "{points}"' if points else ""


def rewrite_files(link: TranslatingLink) -> str:
    """See RecordStore."""
    points, entries = _setting(link, "save"), _setting(link, "stream-node-max-entries")
    try:
        with link.translated():
            written = [_rewrite(server, is_saved=bool(points)) for server in _servers(link.client)]
    except StoreUnavailableError as error:
        return f"The server's files were not rewritten and may still hold them: {error}."
    if any(not is_whole for is_whole in written if is_whole is not None):
        return f"The files of Redis at {link.shown_url} were not rewritten in time and may still hold them."
    if points is None:
        return (
            f"Redis at {link.shown_url} does not say whether it writes snapshots (save), which may hold them."
        )
    if any(written) and entries != "1":
        return (
            f"Redis at {link.shown_url} keeps several records a node (stream-node-max-entries {entries}): "
            "a small one leaves its files with the last one of its node."
        )
    return ""


def _rewrite(server: Any, is_saved: bool) -> bool | None:
    """Whether all that the server writes was written anew; None: it writes nothing."""
    deadline_s, done = time.monotonic() + REWRITE_TIMEOUT_S, []
    if server.info("persistence")["aof_enabled"]:
        done.append(_written_anew(server, server.bgrewriteaof, _APPEND_ONLY_FILE, deadline_s))
    if is_saved:
        done.append(_written_anew(server, server.bgsave, _SNAPSHOT, deadline_s))
    return all(done) if done else None


def _written_anew(server: Any, begin: Any, facts: tuple[str, str, str], deadline_s: float) -> bool:
    """What is being written already began before the deletion: it is waited for, and the file written once
    more."""
    is_running, is_scheduled, how_it_ended = facts

    def is_idle() -> bool:
        while time.monotonic() < deadline_s:
            found = server.info("persistence")
            if not (found[is_running] or found[is_scheduled]):
                return True
            time.sleep(_POLL_S)
        return False

    if not is_idle():
        return False
    begin()
    return is_idle() and server.info("persistence")[how_it_ended] == "ok"


def _setting(link: TranslatingLink, name: str) -> str | None:
    """None: the server does not say."""
    try:
        with link.translated():
            found = [server.config_get(name).get(name, "") for server in _servers(link.client)]
    except StoreUnavailableError:
        return None
    return next((str(value) for value in found if value), "")


def _servers(client: Any) -> Iterator[Any]:
    """The server itself, or those of a cluster that own records."""
    if not hasattr(client, "get_primaries"):
        yield client
        return
    for node in client.get_primaries():
        yield client.get_redis_connection(node)
