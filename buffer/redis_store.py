"""The RecordStore on Redis Streams; the only file that imports the redis library.

`RedisLink` opens any server by URL and turns each of the library's exceptions into a StoreUnavailableError.
Atomic operations are in `redis_scripts`. It knows nothing of adapters: `redis_feed` uses the link for those.
Invariants: no call retries or waits longer than its timeouts, and nothing is connected before the first call.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from buffer import redis_scripts
from buffer.codec import decode, encode
from buffer.errors import (
    CorruptRecordError,
    PersistentStoreError,
    SchemaVersionError,
    StoreUnavailableError,
)
from buffer.records import GenerationRecord
from buffer.redaction import redacted, redacted_url, shows_credentials
from buffer.redis_files import how_persistent, rewrite_files
from buffer.redis_streams import StreamRegistry, stream_keys
from buffer.store import (
    Bounds,
    Delivery,
    PurgeStep,
    RecordFilter,
    StreamKey,
    StreamSize,
    as_default,
    default_stream,
    is_bound_to_its_route,
)

_SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel")
_FAILURES = (redis.RedisError, redis.exceptions.RedisClusterException)
_FETCH_AT_ONCE = 128
"""Entries fetched in one round trip: a few megabytes."""
_PURGED_AT_ONCE = 256
"""Records that one step of a purge looks at, while nobody else is served: some milliseconds."""

_LOOK_AGAIN_S = 60.0
"""Whether a server persists anything is asked so often: another may have taken its place."""

Entry = tuple[bytes, dict[bytes, bytes]]

log = logging.getLogger(__name__)


class RedisLink:
    """A thread-safe client for `redis://`, `rediss://`, `unix://`, `redis+cluster://host:port` or
    `redis+sentinel://:password@host:port,host:port/service`. Raises ValueError for another form."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._scripts: dict[str, Any] = {}
        _check_address(url)

    @property
    def shown_url(self) -> str:
        """The URL without its password, for messages."""
        return redacted_url(self._url)

    @cached_property
    def client(self) -> Any:
        """redis-py's client. To be used inside `translated`: a cluster is looked up as it is made."""
        return _open(self._url, self._timeout_s)

    def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a Lua script, loading it where the server does not have it."""
        if script not in self._scripts:
            self._scripts[script] = self.client.register_script(script)
        return self._scripts[script](keys=keys, args=args)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raises StoreUnavailableError for whatever the library raises inside."""
        try:
            yield
        except _FAILURES as error:
            message = redacted(str(error), self._url)
            text = f"Redis at {self.shown_url}: {message}; nothing was stored or changed, try again"
            # a server that does not know AUTH repeats the password, and a traceback would show it
            cause = None if shows_credentials(error, self._url) else error
            raise StoreUnavailableError(text) from cause

    def close(self) -> None:
        if "client" in self.__dict__:
            with self.translated():
                self.client.close()


def _check_address(url: str) -> None:
    """Raises ValueError. The library's message is not repeated, because it quotes the part that was no
    port."""
    scheme, _, rest = url.partition("://")
    if scheme not in _SCHEMES:
        raise ValueError(f"Redis URL {redacted_url(url)!r} has none of the schemes {_SCHEMES}; not used")
    try:
        if scheme == "redis+sentinel":
            _sentinel_address(url)
        else:
            untyped: Any = parse_url
            untyped(f"{scheme.partition('+')[0]}://{rest}")
    except ValueError:
        form = "host:port,host:port/service" if scheme == "redis+sentinel" else "host:port/number or a path"
        raise ValueError(f"Redis URL {redacted_url(url)!r} is not {form}; not used") from None


def _open(url: str, timeout_s: float) -> Any:
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    scheme, _, rest = url.partition("://")
    base, _, kind = scheme.partition("+")
    if kind == "cluster":
        return RedisCluster.from_url(f"{base}://{rest}", **options)
    if kind == "sentinel":
        sentinels, service, password = _sentinel_address(url)
        untyped: Any = Sentinel
        found = untyped(sentinels, sentinel_kwargs=options, password=password, **options)
        return found.master_for(service)
    return redis.Redis.from_url(url, **options)


def _sentinel_address(url: str) -> tuple[list[tuple[str, int]], str, str | None]:
    """Sentinels, the service's name, the password of the servers behind them (or of the query)."""
    parts = urlsplit(url)
    hosts, service = parts.netloc.rpartition("@")[2], parts.path.strip("/")
    pairs = [host.rpartition(":") for host in hosts.split(",")]
    if not service or not all(host and port.isdigit() for host, _, port in pairs):
        raise ValueError("no sentinel can be asked")
    password = None if parts.password is None else unquote(parts.password)
    [password] = parse_qs(parts.query).get("password", [password])[-1:]
    return [(host, int(port)) for host, _, port in pairs], service, password


class RedisRecordStore:
    """A RecordStore shared by any number of replicas and the learner; `group` is the consumer group."""

    def __init__(
        self,
        url: str,
        bounds: Bounds | None = None,
        *,
        clock: Callable[[], float] = time.time,
        prefix: str = "everdraft",
        group: str = "learner",
        timeout_s: float = 1.0,
        in_memory: bool = False,
    ) -> None:
        """`in_memory`: append only where the server persists nothing."""
        self._link = RedisLink(url, timeout_s)
        self._in_memory, self._unpersisted_until_s = in_memory, 0.0
        self._bounds = bounds or Bounds()
        self._clock = clock
        self._prefix = prefix
        self._group = group
        self._num_rerouted, self._lock = 0, threading.Lock()
        self._registry = StreamRegistry(self._link, prefix, self._bounds, clock)

    @property
    def num_rerouted_records(self) -> int:
        return self._num_rerouted

    def append(self, key: StreamKey, records: Sequence[GenerationRecord]) -> int:
        if self._in_memory and self._clock() >= self._unpersisted_until_s:
            self.require_unpersisted()
            self._unpersisted_until_s = self._clock() + _LOOK_AGAIN_S
        payloads = [encode(record) for record in records]
        with self._link.translated():
            if self._registry.opened(key, is_bounded=not any(map(is_bound_to_its_route, records))):
                return self._append(key, records, payloads)
            records = [as_default(record) for record in records]
            key = default_stream(key)
            self._registry.opened(key, is_bounded=False)
            num_new = self._append(key, records, [encode(record) for record in records])
        with self._lock:
            self._num_rerouted += num_new
        return num_new

    def read_new(self, key: StreamKey, consumer: str, max_records: int) -> list[Delivery]:
        while max_records > 0:
            with self._link.translated():
                entries = self._read(key, consumer, max_records)
            deliveries = self._readable(key, entries)
            if deliveries or not entries:
                return deliveries
        return []

    def claim(self, key: StreamKey, consumer: str, min_idle_s: float) -> list[Delivery]:
        with self._link.translated():
            entry_ids = self._run(redis_scripts.CLAIM, key, [consumer, int(1000 * min_idle_s)])
            entries = self._fetch(key, entry_ids)
        return self._readable(key, entries)

    def ack(self, key: StreamKey, entry_ids: Sequence[str]) -> None:
        with self._link.translated():
            self._run(redis_scripts.ACK, key, entry_ids)

    def draw_replay(self, key: StreamKey, num_records: int, seed: int) -> list[GenerationRecord]:
        with self._link.translated():
            expiry = self._keys(key)[2]
            num_unexpired = self._link.client.zcount(expiry, f"({self._clock()!r}", "+inf")
            ranks = random.Random(seed).sample(range(num_unexpired), min(num_records, num_unexpired))
            entries = self._fetch(key, self._run(redis_scripts.DRAW, key, ranks))
        return [delivery.record for delivery in self._readable(key, entries)]

    def purge(self, key: StreamKey, meant: RecordFilter, cursor: int = 0) -> PurgeStep:
        oldest_s = "" if meant.older_than_s is None else repr(self._clock() - meant.older_than_s)
        args = [cursor, _PURGED_AT_ONCE, meant.request_id or "", oldest_s]
        with self._link.translated():
            num_records, next_cursor = self._run(redis_scripts.PURGE, key, args)
        return PurgeStep(num_records, int(next_cursor))

    def drop_expired(self, key: StreamKey) -> None:
        with self._link.translated():
            self._run(redis_scripts.DROP_EXPIRED, key, [repr(self._clock())])

    def rewrite_files(self) -> str:
        return rewrite_files(self._link)

    def require_unpersisted(self) -> None:
        """Raises PersistentStoreError for a server that writes what it holds to a disk."""
        if how := how_persistent(self._link):
            raise PersistentStoreError(
                f"Redis at {self._link.shown_url} writes what it holds to a disk ({how}), and records of "
                "capture mode `memory` must reach none; nothing was stored there"
            )

    def size(self, key: StreamKey) -> StreamSize:
        with self._link.translated():
            stream, _, _, _, counters = self._keys(key)
            pipe = self._link.client.pipeline(transaction=False)
            pipe.xlen(stream).hmget(counters, "num_bytes", "num_dropped").xpending(stream, self._group)
            num_records, (num_bytes, num_dropped), pending = pipe.execute(raise_on_error=False)
        has_group = isinstance(pending, dict)
        return StreamSize(
            num_records=num_records,
            num_bytes=int(num_bytes or 0),
            num_dropped_records=int(num_dropped or 0),
            num_pending=pending["pending"] if has_group else 0,
        )

    def keys(self) -> list[StreamKey]:
        with self._link.translated():
            return self._registry.keys()

    def close(self) -> None:
        self._link.close()

    def _append(self, key: StreamKey, records: Sequence[GenerationRecord], payloads: Sequence[bytes]) -> int:
        args = self._append_args()
        for record, payload in zip(records, payloads, strict=True):
            args += [record.record_id, repr(record.expires_at_s), payload]
        return int(self._run(redis_scripts.APPEND, key, args))

    def _keys(self, key: StreamKey) -> list[str]:
        return stream_keys(self._prefix, key)

    def _run(self, script: str, key: StreamKey, args: Iterable[Any]) -> Any:
        return self._link.run(script, self._keys(key), [self._group, *args])

    def _append_args(self) -> list[Any]:
        bounds, now_s = self._bounds, self._clock()
        oldest_s = None if bounds.max_age_s is None else now_s - bounds.max_age_s
        ttl_ms = None if bounds.max_age_s is None else int(1000 * bounds.max_age_s)
        limits = (oldest_s, bounds.max_records, bounds.max_bytes, ttl_ms)
        return [repr(now_s), *("" if limit is None else repr(limit) for limit in limits)]

    def _read(self, key: StreamKey, consumer: str, max_records: int) -> list[Entry]:
        stream, client = self._keys(key)[0], self._link.client
        try:
            reply = client.xreadgroup(self._group, consumer, {stream: ">"}, max_records)
        except redis.ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            if not self._create_group(stream):  # a new stream, or a server that came back empty
                return []
            reply = client.xreadgroup(self._group, consumer, {stream: ">"}, max_records)
        return reply[0][1] if reply else []

    def _create_group(self, stream: str) -> bool:
        """Create the group at entry 0, so that records appended before the first read are delivered. False:
        there is no stream, and creating it here would make a key that never expires."""
        try:
            self._link.client.xgroup_create(stream, self._group, id="0")
        except redis.ResponseError as error:
            if "requires the key to exist" in str(error):
                return False
            if not str(error).startswith("BUSYGROUP"):
                raise
        return True

    def _fetch(self, key: StreamKey, entry_ids: Sequence[bytes]) -> list[Entry]:
        """The entries that still exist, in the given order."""
        stream, entries = self._keys(key)[0], []
        for begin in range(0, len(entry_ids), _FETCH_AT_ONCE):
            pipe = self._link.client.pipeline(transaction=False)
            for entry_id in entry_ids[begin : begin + _FETCH_AT_ONCE]:
                pipe.xrange(stream, entry_id, entry_id)
            entries += [entry for matches in pipe.execute() for entry in matches]
        return entries

    def _readable(self, key: StreamKey, entries: Iterable[Entry]) -> list[Delivery]:
        """Deliveries of entries that are neither expired nor of another schema; the others are removed."""
        deliveries, unreadable = [], []
        for entry_id, fields in entries:
            record = self._record(fields)
            if record is None:
                unreadable.append(fields[b"i"])
            else:
                deliveries.append(Delivery(entry_id.decode(), record))
        if unreadable:
            with self._link.translated():
                self._run(redis_scripts.REMOVE, key, unreadable)
        return deliveries

    def _record(self, fields: dict[bytes, bytes]) -> GenerationRecord | None:
        try:
            record = decode(GenerationRecord, fields[b"r"])
        except (CorruptRecordError, SchemaVersionError) as error:
            log.warning("a stored record cannot be read and is dropped: %s", error)
            return None
        return record if record.expires_at_s > self._clock() else None
