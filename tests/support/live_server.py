"""A replica's app behind uvicorn on a loopback port, in this process, without Ray."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn

from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_store import RedisRecordStore
from buffer.store import AdapterFeed, RecordStore
from serving.api.app import create_app
from serving.replica_parts import ReplicaParts, open_parts
from serving.settings import ServingSettings


@dataclass(frozen=True)
class LiveServer:
    """What a test needs to know about it."""

    url: str
    parts: ReplicaParts
    store: RecordStore
    feed: AdapterFeed

    def wait_until_idle(self, timeout_s: float = 5.0) -> float:
        """Seconds until no generation holds a slot or waits. Raises TimeoutError."""
        began_s = time.monotonic()
        while time.monotonic() - began_s < timeout_s:
            stats = self.parts.engine.stats()
            if stats.num_running == 0 and stats.num_waiting == 0:
                return time.monotonic() - began_s
            time.sleep(0.005)
        raise TimeoutError(f"generations still run after {timeout_s} s: {self.parts.engine.stats()}")


@contextlib.contextmanager
def live_server(
    settings: ServingSettings,
    replica_id: str = "replica-0",
    redis_url: str | None = None,
    memory_url: str | None = None,
    send_buffer_bytes: int | None = None,
) -> Iterator[LiveServer]:
    """Store and feed in memory, or on this Redis, which other replicas may share; `memory_url`: for records
    of capture mode `memory`. `send_buffer_bytes`: how much of an answer the kernel takes from the server
    before its client reads."""
    store: RecordStore
    feed: AdapterFeed
    if redis_url is None:
        store, feed = MemoryRecordStore(), MemoryAdapterFeed()
        parts = ReplicaParts(settings, store=store, open_feed=lambda _: feed, replica_id=replica_id)
    else:
        parts = open_parts(settings, redis_url, replica_id, memory_url)
        store = RedisRecordStore(redis_url)
        feed = RedisAdapterFeed(redis_url, parts.engine.target_revision)
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer_bytes is not None:  # connections inherit it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    server = uvicorn.Server(uvicorn.Config(create_app(parts.context), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        yield LiveServer(f"http://127.0.0.1:{listener.getsockname()[1]}", parts, store, feed)
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
        listener.close()
        parts.close()
        store.close()
        feed.close()
