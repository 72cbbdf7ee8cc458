"""A RecordStore and an AdapterFeed that repeat each call until the store can be reached.

Knows no threads and no clock: `wait` is called with each error, and sleeps or raises. Since a call that
raised StoreUnavailableError changed nothing, making it again is safe.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from buffer.audit import AuditLine
from buffer.controls import Controls
from buffer.errors import StoreUnavailableError
from buffer.records import AdapterEvent, AdapterManifest, GenerationRecord, ServingStatus
from buffer.route_table import RouteTable
from buffer.store import (
    AdapterFeed,
    Delivery,
    PurgeStep,
    RecordFilter,
    RecordStore,
    StreamKey,
    StreamSize,
)

Result = TypeVar("Result")
Wait = Callable[[StoreUnavailableError], None]
"""Called between two attempts; raises to give up."""


def _until_reached(wait: Wait, act: Callable[[], Result]) -> Result:
    while True:
        try:
            return act()
        except StoreUnavailableError as error:
            wait(error)


class RetryingStore:
    """A RecordStore that repeats each call until the store can be reached."""

    def __init__(self, store: RecordStore, wait: Wait) -> None:
        self._store, self._wait = store, wait

    @property
    def num_rerouted_records(self) -> int:
        return self._store.num_rerouted_records

    def append(self, key: StreamKey, records: Sequence[GenerationRecord]) -> int:
        return _until_reached(self._wait, lambda: self._store.append(key, records))

    def read_new(self, key: StreamKey, consumer: str, max_records: int) -> list[Delivery]:
        return _until_reached(self._wait, lambda: self._store.read_new(key, consumer, max_records))

    def claim(self, key: StreamKey, consumer: str, min_idle_s: float) -> list[Delivery]:
        return _until_reached(self._wait, lambda: self._store.claim(key, consumer, min_idle_s))

    def ack(self, key: StreamKey, entry_ids: Sequence[str]) -> None:
        _until_reached(self._wait, lambda: self._store.ack(key, entry_ids))

    def draw_replay(self, key: StreamKey, num_records: int, seed: int) -> list[GenerationRecord]:
        return _until_reached(self._wait, lambda: self._store.draw_replay(key, num_records, seed))

    def purge(self, key: StreamKey, meant: RecordFilter, cursor: int = 0) -> PurgeStep:
        return _until_reached(self._wait, lambda: self._store.purge(key, meant, cursor))

    def drop_expired(self, key: StreamKey) -> None:
        _until_reached(self._wait, lambda: self._store.drop_expired(key))

    def rewrite_files(self) -> str:
        return _until_reached(self._wait, self._store.rewrite_files)

    def size(self, key: StreamKey) -> StreamSize:
        return _until_reached(self._wait, lambda: self._store.size(key))

    def keys(self) -> list[StreamKey]:
        return _until_reached(self._wait, self._store.keys)

    def close(self) -> None:
        self._store.close()


class RetryingFeed:
    """An AdapterFeed that repeats each call until the store can be reached."""

    def __init__(self, feed: AdapterFeed, wait: Wait) -> None:
        self._feed, self._wait = feed, wait

    def publish(self, manifest: AdapterManifest, weights: bytes, on_trial: bool = False) -> None:
        _until_reached(self._wait, lambda: self._feed.publish(manifest, weights, on_trial))

    def confirm(self, route: str, reason: str) -> None:
        _until_reached(self._wait, lambda: self._feed.confirm(route, reason))

    def is_on_trial(self, route: str) -> bool:
        return _until_reached(self._wait, lambda: self._feed.is_on_trial(route))

    def latest(self, route: str, replica_id: str | None = None) -> AdapterManifest | None:
        return _until_reached(self._wait, lambda: self._feed.latest(route, replica_id))

    def last_version(self, route: str) -> int:
        return _until_reached(self._wait, lambda: self._feed.last_version(route))

    def manifest(self, route: str, draft_version: int) -> AdapterManifest:
        return _until_reached(self._wait, lambda: self._feed.manifest(route, draft_version))

    def weights(self, route: str, draft_version: int) -> bytes:
        return _until_reached(self._wait, lambda: self._feed.weights(route, draft_version))

    def versions(self, route: str) -> list[AdapterManifest]:
        return _until_reached(self._wait, lambda: self._feed.versions(route))

    def rollback(self, route: str, reason: str, to_version: int | None = None) -> int:
        return _until_reached(self._wait, lambda: self._feed.rollback(route, reason, to_version))

    def pin(self, route: str, draft_version: int, reason: str) -> None:
        _until_reached(self._wait, lambda: self._feed.pin(route, draft_version, reason))

    def unpin(self, route: str, reason: str) -> int:
        return _until_reached(self._wait, lambda: self._feed.unpin(route, reason))

    def pinned(self, route: str) -> int | None:
        return _until_reached(self._wait, lambda: self._feed.pinned(route))

    def add_event(self, event: AdapterEvent) -> None:
        _until_reached(self._wait, lambda: self._feed.add_event(event))

    def history(self, route: str, max_events: int = 200) -> list[AdapterEvent]:
        return _until_reached(self._wait, lambda: self._feed.history(route, max_events))

    def routes(self) -> list[str]:
        return _until_reached(self._wait, self._feed.routes)

    def put_route_table(self, table: RouteTable) -> None:
        _until_reached(self._wait, lambda: self._feed.put_route_table(table))

    def route_table(self) -> RouteTable | None:
        return _until_reached(self._wait, self._feed.route_table)

    def report(self, status: ServingStatus) -> None:
        _until_reached(self._wait, lambda: self._feed.report(status))

    def statuses(self) -> list[ServingStatus]:
        return _until_reached(self._wait, self._feed.statuses)

    def controls(self) -> Controls | None:
        return _until_reached(self._wait, self._feed.controls)

    def change_controls(self, rule: Callable[[Controls], Controls]) -> Controls:
        return _until_reached(self._wait, lambda: self._feed.change_controls(rule))

    def add_audit_line(self, line: AuditLine) -> None:
        _until_reached(self._wait, lambda: self._feed.add_audit_line(line))

    def audit_log(self, max_lines: int = 100) -> list[AuditLine]:
        return _until_reached(self._wait, lambda: self._feed.audit_log(max_lines))

    def close(self) -> None:
        self._feed.close()
