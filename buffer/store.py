"""The two interfaces between serving and learner, as Protocols: `RecordStore` and `AdapterFeed`.

`memory_store`, `redis_store` and `redis_feed` implement them. Every call may raise StoreUnavailableError;
then nothing was stored or changed. All calls are thread-safe. `now_s` comes from the clock given to the
implementation, never from the caller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from buffer.audit import AuditLine
from buffer.controls import Controls
from buffer.names import DEFAULT_ROUTE
from buffer.records import AdapterEvent, AdapterManifest, GenerationRecord, ServingStatus
from buffer.route_table import RouteTable


@dataclass(frozen=True)
class StreamKey:
    """One stream of records: those of one target revision and one route."""

    target_revision: str
    route: str
    in_memory: bool = False
    """Of capture mode `memory`: in a store that persists nothing, see `two_stores`."""

    @property
    def name(self) -> str:
        """Among the streams of its target; no route has a colon in its name."""
        return f"{self.route}:memory" if self.in_memory else self.route


@dataclass(frozen=True)
class Bounds:
    """Limits of a stream, which drops its oldest records first, and on the number of streams. None:
    unbounded."""

    max_records: int | None = 20_000
    max_bytes: int | None = 512 * 2**20
    max_age_s: float | None = 7 * 24 * 3600.0
    """A stream to which nothing was appended for so long is deleted, because all that it holds has
    expired."""
    max_routes: int | None = 64
    """Streams of one target, not counting that of `default`. Clients may send any route name, so records of
    routes beyond this limit go to `default`."""


@dataclass(frozen=True)
class Delivery:
    """A record handed to a consumer; `entry_id` is what it acknowledges."""

    entry_id: str
    record: GenerationRecord


@dataclass(frozen=True)
class StreamSize:
    """Size of a stream, and how many records it lost."""

    num_records: int
    num_bytes: int
    num_dropped_records: int
    """Records trimmed by a bound or expired before any consumer acknowledged them."""
    num_pending: int
    """Records delivered and not yet acknowledged."""


@dataclass(frozen=True)
class RecordFilter:
    """Which records of a stream are meant: those that fit everything given."""

    request_id: str | None = None
    """Of the request that a record is of: `record_id` is this id, or begins with it and a dash."""
    older_than_s: float | None = None
    """Seconds since the record was appended."""

    def fits(self, record_id: str, appended_at_s: float, now_s: float) -> bool:
        is_of_request = self.request_id is None or f"{record_id}-".startswith(f"{self.request_id}-")
        return is_of_request and (self.older_than_s is None or appended_at_s < now_s - self.older_than_s)


@dataclass(frozen=True)
class PurgeStep:
    """What one step deleted, and where the next one begins; 0: there is none."""

    num_records: int
    cursor: int


def is_bound_to_its_route(record: GenerationRecord) -> bool:
    """Whether it is a record of an isolated route, or the draft of its own route drafted in it. Such routes
    are few: an operator names them, or replicas have room for their drafts."""
    return record.isolated or any(trace.draft_route == record.route for trace in record.rounds)


def default_stream(key: StreamKey) -> StreamKey:
    """The `default` stream of the same target."""
    return replace(key, route=DEFAULT_ROUTE)


def as_default(record: GenerationRecord) -> GenerationRecord:
    """The record as it is stored if its route has no stream."""
    return replace(record, route=DEFAULT_ROUTE)


class RecordStore(Protocol):
    """Records by stream, read by one named consumer group, each at least once."""

    @property
    def num_rerouted_records(self) -> int:
        """New records that this process appended to `default` because their route exceeded `max_routes`."""
        ...

    def append(self, key: StreamKey, records: Sequence[GenerationRecord]) -> int:
        """Store records, oldest first; idempotent by record_id. Returns how many were new.

        Where `max_routes` are open over all processes, those of a further route are stored as `default`'s,
        unless they are bound to their route."""
        ...

    def read_new(self, key: StreamKey, consumer: str, max_records: int) -> list[Delivery]:
        """Records not yet delivered to the group, at most `max_records`. Expired ones are skipped and
        counted. They stay pending until `ack`."""
        ...

    def claim(self, key: StreamKey, consumer: str, min_idle_s: float) -> list[Delivery]:
        """Pending records (this consumer's own, and others' idle for `min_idle_s`), for a
        consumer that restarts: what was read but never acknowledged is read again."""
        ...

    def ack(self, key: StreamKey, entry_ids: Sequence[str]) -> None:
        """Called once the step that used these records is checkpointed; they are never delivered again."""
        ...

    def draw_replay(self, key: StreamKey, num_records: int, seed: int) -> list[GenerationRecord]:
        """A uniform draw, without replacement, over everything kept and unexpired, whether read or not."""
        ...

    def purge(self, key: StreamKey, meant: RecordFilter, cursor: int = 0) -> PurgeStep:
        """One step, bounded in time, over a stream: delete the records that are meant, delivered ones too,
        which then are neither pending nor counted as dropped. Begin with cursor 0 and go on with each step's
        own; a record that is there all the while is not missed."""
        ...

    def drop_expired(self, key: StreamKey) -> None:
        """Delete what has expired, which every append does, too."""
        ...

    def rewrite_files(self) -> str:
        """Let the store's own files forget what was deleted; waits for it, for a bounded time. Returns why
        they may still hold some of it; empty: they do not, or there are none."""
        ...

    def size(self, key: StreamKey) -> StreamSize: ...

    def keys(self) -> list[StreamKey]:
        """All streams, without those to which nothing was appended for `max_age_s`."""
        ...

    def close(self) -> None: ...


class AdapterFeed(Protocol):
    """The feed of one target revision: adapters by route, the pointer to the one that serves, their history,
    the table that routes prompts, replicas' status, and what operators ordered and did. Another target has a
    separate feed, on the same server too."""

    def publish(self, manifest: AdapterManifest, weights: bytes, on_trial: bool = False) -> None:
        """Keep the adapter, point the route at it (unless pinned), add a `promoted` event. `on_trial`: one
        replica serves it, the canary, until it is confirmed; the others what served before.

        Raises VersionConflictError unless draft_version exceeds every earlier one of the route.
        Only the last N adapters are kept; the one that serves and its parent always are."""
        ...

    def confirm(self, route: str, reason: str) -> None:
        """End of a trial: every replica serves the version. Adds a `confirmed` event; nothing where none is
        on trial."""
        ...

    def is_on_trial(self, route: str) -> bool: ...

    def latest(self, route: str, replica_id: str | None = None) -> AdapterManifest | None:
        """The adapter that replicas should serve now; None is the floor. While it is on trial: that of this
        replica, the canary being the first by name of those that report; without a name, the canary's."""
        ...

    def last_version(self, route: str) -> int:
        """The greatest draft_version ever published on the route; 0 if none was."""
        ...

    def manifest(self, route: str, draft_version: int) -> AdapterManifest:
        """Raises UnknownVersionError."""
        ...

    def weights(self, route: str, draft_version: int) -> bytes:
        """Safetensors bytes. Raises UnknownVersionError."""
        ...

    def versions(self, route: str) -> list[AdapterManifest]:
        """Every kept adapter, oldest first."""
        ...

    def rollback(self, route: str, reason: str, to_version: int | None = None) -> int:
        """Point the route at `to_version` (None: the parent of the serving version, or the floor if that is
        gone), add a `rolled_back` event. Returns the version that serves now."""
        ...

    def pin(self, route: str, draft_version: int, reason: str) -> None:
        """Serve this version (0: the floor) whatever is published, until `unpin`."""
        ...

    def unpin(self, route: str, reason: str) -> int:
        """Back to the version that would serve without the pin. Returns it."""
        ...

    def pinned(self, route: str) -> int | None: ...

    def add_event(self, event: AdapterEvent) -> None:
        """Add a line to the history (refusals, replica rejections)."""
        ...

    def history(self, route: str, max_events: int = 200) -> list[AdapterEvent]:
        """Oldest first, the last `max_events`."""
        ...

    def routes(self) -> list[str]: ...

    def put_route_table(self, table: RouteTable) -> None:
        """Replace the table by which prompts without a tag are routed."""
        ...

    def route_table(self) -> RouteTable | None:
        """None: none was ever put; every prompt without a tag is of the default route."""
        ...

    def report(self, status: ServingStatus) -> None:
        """Replace this replica's status; it expires by itself when no longer renewed."""
        ...

    def statuses(self) -> list[ServingStatus]: ...

    def controls(self) -> Controls | None:
        """What operators ordered. None: nothing ever was, or the feed lost its data; whoever follows an order
        goes on with it."""
        ...

    def change_controls(self, rule: Callable[[Controls], Controls]) -> Controls:
        """Keep and return what `rule` makes of the orders; no other change comes between, and `rule` may be
        called again."""
        ...

    def add_audit_line(self, line: AuditLine) -> None:
        """Add to the audit log, which is bounded; lines refused by key have a bound of their own."""
        ...

    def audit_log(self, max_lines: int = 100) -> list[AuditLine]:
        """Oldest first, the last `max_lines`."""
        ...

    def close(self) -> None: ...
