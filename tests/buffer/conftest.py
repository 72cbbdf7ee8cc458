"""The stores under contract: in memory, on a real Redis, on a real one-node Redis cluster."""

import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_server import EmbeddedRedis, find_server_binary
from buffer.redis_store import RedisRecordStore
from buffer.store import AdapterFeed, Bounds, RecordStore
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


@pytest.fixture(params=["memory", "redis", "cluster"])
def place(request: pytest.FixtureRequest) -> str:
    """A server's URL, or `memory`."""
    kind = request.param
    return "memory" if kind == "memory" else str(request.getfixturevalue(f"{kind}_url"))


@pytest.fixture
def open_store(place: str, clock: FakeClock) -> Iterator[OpenStore]:
    """Opens a store with given bounds; unbounded by default."""
    prefix, opened = uuid.uuid4().hex, []

    def open_one(bounds: Bounds | None = None) -> RecordStore:
        bounds = bounds or Bounds(None, None, None, None)
        store: RecordStore = (
            MemoryRecordStore(bounds, clock=clock)
            if place == "memory"
            else RedisRecordStore(place, bounds, clock=clock, prefix=prefix)
        )
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
    """Keeps three versions; a status lives STATUS_TTL_S."""
    options = {"clock": clock, "max_versions": 3, "max_events": 50, "status_ttl_s": STATUS_TTL_S}
    feed: AdapterFeed = (
        MemoryAdapterFeed(**options)
        if place == "memory"
        else RedisAdapterFeed(place, "revision", prefix=uuid.uuid4().hex, **options)
    )
    yield feed
    feed.close()
