"""The stores under contract: in memory, waited for while away, on a real Redis, on a one-node cluster."""

import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from buffer.errors import StoreUnavailableError
from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_server import EmbeddedRedis, find_server_binary
from buffer.redis_store import RedisRecordStore
from buffer.retrying import RetryingFeed, RetryingStore
from buffer.store import AdapterFeed, Bounds, RecordStore
from buffer.two_stores import TwoStores
from tests.buffer.samples import STATUS_TTL_S, FakeClock, OpenStore


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """One server for all tests; each test takes its own key prefix."""
    with EmbeddedRedis() as server:
        yield server.url


@pytest.fixture(scope="session")
def cluster_url() -> Iterator[str]:
    """One node that holds all slots: enough for a server to refuse keys that do not live together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = 20_000 + probe.getsockname()[1] % 20_000  # its bus port is 10,000 higher
    folder = Path(tempfile.mkdtemp())
    options = ["--port", str(port), "--bind", "127.0.0.1", "--cluster-enabled", "yes", "--save", ""]
    command = [find_server_binary(), *options, "--dir", str(folder), "--logfile", str(folder / "log")]
    node = subprocess.Popen(command)
    try:
        _form_cluster(port)
        yield f"redis+cluster://127.0.0.1:{port}"
    finally:
        node.kill()
        node.wait()
        shutil.rmtree(folder)


def _form_cluster(port: int) -> None:
    with redis.Redis(port=port) as node:
        for _ in range(100):
            try:
                node.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        node.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        while b"cluster_state:ok" not in node.execute_command("CLUSTER", "INFO"):
            time.sleep(0.05)


@pytest.fixture(params=["memory", "retrying", "two", "redis", "cluster"])
def place(request: pytest.FixtureRequest) -> str:
    """A server's URL, `memory`, `retrying`: one in memory whose every second call finds it away, or `two`:
    the durable one of two in memory."""
    kind = request.param
    return kind if kind in ("memory", "retrying", "two") else str(request.getfixturevalue(f"{kind}_url"))


class OftenAway:
    """Every second call of what it stands before raises, and changes nothing."""

    def __init__(self, inner: RecordStore | AdapterFeed) -> None:
        self._inner, self._is_away = inner, False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return partial(self._call, found) if callable(found) and name != "close" else found

    def _call(self, act: Callable[..., Any], *args: Any, **named: Any) -> Any:
        self._is_away = not self._is_away
        if self._is_away:
            raise StoreUnavailableError("away")
        return act(*args, **named)


def dont_wait(_: StoreUnavailableError) -> None:
    """Between two attempts."""


@pytest.fixture
def open_store(place: str, clock: FakeClock) -> Iterator[OpenStore]:
    """Opens a store with given bounds; unbounded by default."""
    prefix, opened = uuid.uuid4().hex, []

    def open_one(bounds: Bounds | None = None) -> RecordStore:
        bounds = bounds or Bounds(None, None, None, None)
        store: RecordStore
        if place == "memory":
            store = MemoryRecordStore(bounds, clock=clock)
        elif place == "retrying":
            store = RetryingStore(OftenAway(MemoryRecordStore(bounds, clock=clock)), dont_wait)
        elif place == "two":
            store = TwoStores(MemoryRecordStore(bounds, clock=clock), MemoryRecordStore(bounds, clock=clock))
        else:
            store = RedisRecordStore(place, bounds, clock=clock, prefix=prefix)
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: OpenStore) -> RecordStore:
    return open_store()


@pytest.fixture
def feed(place: str, clock: FakeClock) -> Iterator[AdapterFeed]:
    """Keeps three versions of 3,000 bytes together; a status lives STATUS_TTL_S."""
    options = {
        "clock": clock,
        "max_versions": 3,
        "max_version_bytes": 3_000,
        "max_events": 50,
        "status_ttl_s": STATUS_TTL_S,
    }
    feed: AdapterFeed
    if place in ("memory", "two"):
        feed = MemoryAdapterFeed(**options)
    elif place == "retrying":
        feed = RetryingFeed(OftenAway(MemoryAdapterFeed(**options)), dont_wait)
    else:
        feed = RedisAdapterFeed(place, "revision", prefix=uuid.uuid4().hex, **options)
    yield feed
    feed.close()
