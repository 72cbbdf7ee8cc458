"""Record store and adapter feed in process memory: for tests, benchmarks and single-process use.

Records are held encoded, so that a bound counts the same bytes as on Redis and callers cannot change what was
appended. Nothing outlives the process, and other processes cannot see it. Invariant: one lock guards each
store; no call sleeps while it holds the lock.
"""

import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from buffer.audit import AuditLine
from buffer.codec import decode, encode
from buffer.controls import Controls
from buffer.memory_stream import Entry, Stream
from buffer.records import AdapterEvent, AdapterManifest, GenerationRecord, ServingStatus
from buffer.route_state import MAX_VERSION_BYTES, RouteState, num_versions_kept, promotion, turn
from buffer.route_table import RouteTable
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


class MemoryRecordStore:
    """A RecordStore in the memory of this process."""

    def __init__(self, bounds: Bounds | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._bounds = bounds or Bounds()
        self._clock = clock
        self._streams: defaultdict[StreamKey, Stream] = defaultdict(Stream)
        self._num_rerouted = 0
        self._changed = threading.Lock()

    @property
    def num_rerouted_records(self) -> int:
        return self._num_rerouted

    def append(self, key: StreamKey, records: Sequence[GenerationRecord]) -> int:
        payloads = [encode(record) for record in records]
        with self._changed:
            self._forget_idle()
            if self._has_room(key) or any(map(is_bound_to_its_route, records)):
                return self._append(key, records, payloads)
            records = [as_default(record) for record in records]
            num_new = self._append(default_stream(key), records, [encode(record) for record in records])
            self._num_rerouted += num_new
            return num_new

    def read_new(self, key: StreamKey, consumer: str, max_records: int) -> list[Delivery]:
        with self._changed:
            return self._stream(key).deliver(consumer, max_records, self._clock())

    def claim(self, key: StreamKey, consumer: str, min_idle_s: float) -> list[Delivery]:
        with self._changed:
            stream, now_s = self._stream(key), self._clock()
            deliveries: list[Delivery] = []
            for entry_id, entry in stream.pending().items():
                if entry.consumer == consumer or now_s - entry.delivered_at_s >= min_idle_s:
                    deliveries += stream.hand_over(entry_id, consumer, now_s)
            return deliveries

    def ack(self, key: StreamKey, entry_ids: Sequence[str]) -> None:
        with self._changed:
            pending = self._stream(key).pending()
            for entry_id in entry_ids:
                if entry := pending.get(int(entry_id)):
                    entry.consumer, entry.acknowledged = None, True

    def draw_replay(self, key: StreamKey, num_records: int, seed: int) -> list[GenerationRecord]:
        with self._changed:
            now_s, entries = self._clock(), self._stream(key).entries.values()
            payloads = [entry.payload for entry in entries if entry.expires_at_s > now_s]
        drawn = random.Random(seed).sample(payloads, min(num_records, len(payloads)))
        return [decode(GenerationRecord, payload) for payload in drawn]

    def purge(self, key: StreamKey, meant: RecordFilter, cursor: int = 0) -> PurgeStep:
        """All in one step."""
        with self._changed:
            return PurgeStep(self._stream(key).purge(meant, self._clock()), cursor=0)

    def drop_expired(self, key: StreamKey) -> None:
        with self._changed:
            self._stream(key).drop_expired(self._clock())

    def rewrite_files(self) -> str:
        """There are no files."""
        return ""

    def size(self, key: StreamKey) -> StreamSize:
        with self._changed:
            stream = self._stream(key)
            return StreamSize(
                num_records=len(stream.entries),
                num_bytes=stream.num_bytes,
                num_dropped_records=stream.num_dropped,
                num_pending=len(stream.pending()),
            )

    def keys(self) -> list[StreamKey]:
        with self._changed:
            self._forget_idle()
            return list(self._streams)

    def close(self) -> None:
        """Nothing to release; the records stay readable."""

    def _stream(self, key: StreamKey) -> Stream:
        """The stream, or an empty one that is not kept."""
        return self._streams[key] if key in self._streams else Stream()

    def _append(self, key: StreamKey, records: Sequence[GenerationRecord], payloads: Sequence[bytes]) -> int:
        stream, now_s = self._streams[key], self._clock()
        num_new = sum(
            stream.append(Entry(record.record_id, payload, record.expires_at_s, now_s))
            for record, payload in zip(records, payloads, strict=True)
        )
        stream.last_append_s = now_s
        stream.trim(self._bounds, now_s)
        return num_new

    def _has_room(self, key: StreamKey) -> bool:
        if self._bounds.max_routes is None or key in self._streams or key == default_stream(key):
            return True
        others = [other for other in self._streams if default_stream(other) == default_stream(key) != other]
        return len(others) < self._bounds.max_routes

    def _forget_idle(self) -> None:
        if self._bounds.max_age_s is None:
            return
        oldest_s = self._clock() - self._bounds.max_age_s
        for key in [key for key, stream in self._streams.items() if stream.last_append_s < oldest_s]:
            del self._streams[key]


class MemoryAdapterFeed:
    """An AdapterFeed in the memory of this process. Make one for each target."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        max_versions: int = 8,
        max_version_bytes: int = MAX_VERSION_BYTES,
        max_events: int = 1_000,
        max_audit_lines: int = 10_000,
        status_ttl_s: float = 10.0,
    ) -> None:
        self._clock = clock
        self._max_versions, self._max_version_bytes = max_versions, max_version_bytes
        self._status_ttl_s = status_ttl_s
        self._states: dict[str, RouteState] = {}
        self._adapters: dict[tuple[str, int], tuple[AdapterManifest, bytes]] = {}
        self._events: defaultdict[str, deque[AdapterEvent]] = defaultdict(lambda: deque(maxlen=max_events))
        self._statuses: dict[str, tuple[float, ServingStatus]] = {}
        self._route_table: RouteTable | None = None
        self._controls: Controls | None = None
        self._audit: dict[bool, deque[AuditLine]] = {
            by_key: deque(maxlen=max_audit_lines) for by_key in (False, True)
        }
        self._lock = threading.RLock()

    def publish(self, manifest: AdapterManifest, weights: bytes, on_trial: bool = False) -> None:
        version, parent = manifest.draft_version, manifest.parent_version
        with self._lock:
            kept = num_versions_kept(self._max_versions, self._max_version_bytes, len(weights))
            state = self._state(manifest.route).published(version, parent, kept, on_trial)
            self._adapters[manifest.route, version] = (manifest, bytes(weights))
            self._store(state, promotion(manifest, self._clock(), on_trial))

    def confirm(self, route: str, reason: str) -> None:
        with self._lock:
            if self.is_on_trial(route):
                self._turn("confirmed", self._state(route).confirmed(), reason)

    def is_on_trial(self, route: str) -> bool:
        with self._lock:
            return self._state(route).settled is not None

    def latest(self, route: str, replica_id: str | None = None) -> AdapterManifest | None:
        with self._lock:
            version = self._state(route).served_by(replica_id, self.statuses)
            entry = self._adapters.get((route, version))
            return entry[0] if entry else None

    def last_version(self, route: str) -> int:
        with self._lock:
            return self._state(route).last_version

    def manifest(self, route: str, draft_version: int) -> AdapterManifest:
        return self._adapter(route, draft_version)[0]

    def weights(self, route: str, draft_version: int) -> bytes:
        return self._adapter(route, draft_version)[1]

    def versions(self, route: str) -> list[AdapterManifest]:
        with self._lock:
            return [self._adapters[route, v][0] for v in sorted(self._state(route).parents)]

    def rollback(self, route: str, reason: str, to_version: int | None = None) -> int:
        with self._lock:
            return self._turn("rolled_back", self._state(route).rolled_back(to_version), reason)

    def pin(self, route: str, draft_version: int, reason: str) -> None:
        with self._lock:
            self._turn("pinned", self._state(route).with_pin(draft_version), reason)

    def unpin(self, route: str, reason: str) -> int:
        with self._lock:
            return self._turn("unpinned", self._state(route).without_pin(), reason)

    def pinned(self, route: str) -> int | None:
        with self._lock:
            return self._state(route).pinned

    def add_event(self, event: AdapterEvent) -> None:
        with self._lock:
            self._events[event.route].append(event)

    def history(self, route: str, max_events: int = 200) -> list[AdapterEvent]:
        with self._lock:
            events = list(self._events[route]) if route in self._events else []
            return events[-max_events:] if max_events > 0 else []

    def routes(self) -> list[str]:
        with self._lock:
            return sorted(self._events)

    def put_route_table(self, table: RouteTable) -> None:
        with self._lock:
            self._route_table = table

    def route_table(self) -> RouteTable | None:
        with self._lock:
            return self._route_table

    def report(self, status: ServingStatus) -> None:
        with self._lock:
            self._statuses[status.replica_id] = (self._clock() + self._status_ttl_s, status)

    def statuses(self) -> list[ServingStatus]:
        with self._lock:
            now_s = self._clock()
            live = {name: kept for name, kept in self._statuses.items() if kept[0] > now_s}
            self._statuses = live
            return [live[name][1] for name in sorted(live)]

    def controls(self) -> Controls | None:
        with self._lock:
            return self._controls

    def change_controls(self, rule: Callable[[Controls], Controls]) -> Controls:
        with self._lock:
            self._controls = rule(self._controls or Controls())
            return self._controls

    def add_audit_line(self, line: AuditLine) -> None:
        with self._lock:
            self._audit[line.is_refused_by_key].append(line)

    def audit_log(self, max_lines: int = 100) -> list[AuditLine]:
        with self._lock:
            lines = sorted(
                (line for kept in self._audit.values() for line in kept), key=lambda line: line.time
            )
            return lines[-max_lines:] if max_lines > 0 else []

    def close(self) -> None:
        """Nothing to release; the adapters stay readable."""

    def _state(self, route: str) -> RouteState:
        return self._states.get(route, RouteState(route))

    def _adapter(self, route: str, draft_version: int) -> tuple[AdapterManifest, bytes]:
        with self._lock:
            self._state(route).require_adapter(draft_version)
            return self._adapters[route, draft_version]

    def _turn(self, kind: str, state: RouteState, reason: str) -> int:
        self._store(state, turn(kind, state, reason, self._clock()))
        return state.serving

    def _store(self, state: RouteState, event: AdapterEvent) -> None:
        for version in self._state(state.route).parents.keys() - state.parents.keys():
            del self._adapters[state.route, version]
        self._states[state.route] = state
        self._events[state.route].append(event)
