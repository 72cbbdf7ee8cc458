"""What an operator may ask and change, on one target's feed and records, for the Admin API and commands.

Knows neither HTTP nor a console. Invariants: what is changed lives in feed and store, so that every replica
and the learner follow it, whichever process was asked; a change is written to the audit log first, and
refused if it cannot be.
"""

import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from buffer.audit import ALLOWED, Argument, AuditLine, Caller, audit_line
from buffer.controls import Controls
from buffer.errors import OrderRefusedError, SeamError, StoreUnavailableError, UnknownNameError
from buffer.names import DEFAULT_ROUTE, FLOOR_VERSION
from buffer.records import SERVING_CHANGES, AdapterEvent, AdapterManifest
from buffer.store import AdapterFeed, RecordFilter, RecordStore

Shown = TypeVar("Shown", AdapterManifest, AdapterEvent)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RouteDrafts:
    """One route: which draft serves, the kept ones, oldest first, and the last events."""

    route: str
    serving_version: int
    """0 is the floor."""
    pinned_version: int | None
    is_on_trial: bool
    """Whether only one replica serves `serving_version`, until it is confirmed."""
    is_learning_paused: bool
    versions: tuple[AdapterManifest, ...]
    events: tuple[AdapterEvent, ...]


@dataclass(frozen=True)
class DraftDetails:
    """One kept draft, and what became of it."""

    manifest: AdapterManifest
    is_serving: bool
    events: tuple[AdapterEvent, ...]


@dataclass(frozen=True)
class PurgeReport:
    """What came of a deletion of records."""

    num_records: int
    caveat: str
    """What may still hold them, in sentences; empty: nothing that is reached."""


class Administration(Protocol):
    """Every call may raise SeamError. Names that do not exist raise UnknownNameError or
    UnknownVersionError."""

    def drafts(self, route: str | None = None, max_events: int = 8) -> list[RouteDrafts]:
        """Of one route, or (None) of all."""
        ...

    def draft(self, route: str, version: int) -> DraftDetails: ...

    def rollback(self, route: str, reason: str, version: int | None = None) -> int:
        """None: to the parent. Returns the version that serves."""
        ...

    def pin(self, route: str, version: int, reason: str) -> int:
        """Returns the version that serves."""
        ...

    def unpin(self, route: str, reason: str) -> int:
        """Returns the version that serves."""
        ...

    def controls(self) -> Controls: ...

    def replicas(self) -> list[str]:
        """Ids of the replicas that report."""
        ...

    def pause_learning(self, route: str | None = None) -> Controls: ...

    def resume_learning(self, route: str | None = None) -> Controls: ...

    def set_capture_rate(self, rate: float | None) -> Controls:
        """None: that of each replica's settings."""
        ...

    def drain(self, replica_id: str | None = None) -> Controls: ...

    def undrain(self, replica_id: str | None = None) -> Controls: ...

    def purge(
        self,
        *,
        request_id: str | None = None,
        route: str | None = None,
        older_than_s: float | None = None,
    ) -> PurgeReport:
        """Delete the records that fit everything given, of which there must be something; the store's files
        are rewritten, and the learner lets go of what it holds. What it has learnt stays learnt."""
        ...

    def audit_log(self, max_lines: int = 100) -> list[AuditLine]:
        """Oldest first."""
        ...


class DirectAdministration:
    """The Administration that works on feed and store themselves; `caller` is named in the audit log."""

    def __init__(
        self,
        feed: AdapterFeed,
        store: RecordStore,
        target_revision: str,
        caller: Caller,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._feed, self._store, self._target_revision = feed, store, target_revision
        self._caller, self._clock = caller, clock

    def drafts(self, route: str | None = None, max_events: int = 8) -> list[RouteDrafts]:
        routes = self._routes()
        if route is not None:
            self._require(route, routes)
        controls = self.controls()
        return [self._drafts(name, max_events, controls) for name in (routes if route is None else [route])]

    def draft(self, route: str, version: int) -> DraftDetails:
        self._require(route, self._routes())
        manifest = _measured(self._feed.manifest(route, version))
        events = tuple(_concerning(version, self._feed.history(route)))
        return DraftDetails(manifest, self._serving(route) == version, events)

    def rollback(self, route: str, reason: str, version: int | None = None) -> int:
        with self._audited("drafts.rollback", route=route, version=version, reason=reason):
            self._require(route, self._routes())
            return self._feed.rollback(route, reason, version)

    def pin(self, route: str, version: int, reason: str) -> int:
        with self._audited("drafts.pin", route=route, version=version, reason=reason):
            self._require(route, self._routes())
            self._feed.pin(route, version, reason)
            return version

    def unpin(self, route: str, reason: str) -> int:
        with self._audited("drafts.unpin", route=route, reason=reason):
            self._require(route, self._routes())
            return self._feed.unpin(route, reason)

    def controls(self) -> Controls:
        return self._feed.controls() or Controls()

    def replicas(self) -> list[str]:
        return [status.replica_id for status in self._feed.statuses()]

    def pause_learning(self, route: str | None = None) -> Controls:
        with self._audited("learning.pause", route=route):
            if route is not None:
                self._require(route, self._routes())
            return self._feed.change_controls(lambda orders: orders.with_learning_paused(route))

    def resume_learning(self, route: str | None = None) -> Controls:
        with self._audited("learning.resume", route=route):
            if route is not None:
                self._require(route, self._routes())
            return self._feed.change_controls(lambda orders: orders.with_learning_resumed(route))

    def set_capture_rate(self, rate: float | None) -> Controls:
        with self._audited("capture.set" if rate is not None else "capture.reset", rate=rate):
            return self._feed.change_controls(lambda orders: orders.with_capture_rate(rate))

    def drain(self, replica_id: str | None = None) -> Controls:
        with self._audited("drain", replica_id=replica_id):
            if replica_id is not None:
                _require_name("replica_id", replica_id, self.replicas())
            return self._feed.change_controls(lambda orders: orders.with_drain(replica_id))

    def undrain(self, replica_id: str | None = None) -> Controls:
        with self._audited("undrain", replica_id=replica_id):
            orders = self.controls()
            if replica_id is not None and not orders.are_all_draining:
                _require_name("replica_id", replica_id, orders.draining_replicas)
            return self._feed.change_controls(lambda orders: orders.without_drain(replica_id))

    def purge(
        self,
        *,
        request_id: str | None = None,
        route: str | None = None,
        older_than_s: float | None = None,
    ) -> PurgeReport:
        arguments = {"request_id": request_id, "route": route, "older_than_s": older_than_s}
        with self._audited("records.purge", **arguments):
            if all(argument is None for argument in arguments.values()):
                raise OrderRefusedError(
                    "request_id, route or older_than_s must be given; nothing was deleted"
                )
            num_records = self._purge(route, RecordFilter(request_id, older_than_s))
            self._tell_learners(num_records)
            return PurgeReport(num_records, self._store.rewrite_files())

    def audit_log(self, max_lines: int = 100) -> list[AuditLine]:
        return self._feed.audit_log(max_lines)

    def _drafts(self, route: str, max_events: int, controls: Controls) -> RouteDrafts:
        pinned = self._feed.pinned(route)
        return RouteDrafts(
            route=route,
            serving_version=self._serving(route),
            pinned_version=pinned,
            is_on_trial=pinned is None and self._feed.is_on_trial(route),
            is_learning_paused=controls.pauses(route),
            versions=tuple(map(_measured, self._feed.versions(route))),
            events=tuple(map(_measured, self._feed.history(route, max_events))),
        )

    def _serving(self, route: str) -> int:
        latest = self._feed.latest(route)
        return FLOOR_VERSION if latest is None else latest.draft_version

    def _routes(self) -> list[str]:
        """Those with a history, and `default`, which there always is."""
        return sorted({DEFAULT_ROUTE, *self._feed.routes()})

    def _require(self, route: str, routes: list[str]) -> None:
        _require_name("route", route, routes)

    def _purge(self, route: str | None, meant: RecordFilter) -> int:
        known = self._store.keys()
        keys = [key for key in known if key.target_revision == self._target_revision]
        if route is not None:
            _require_name("route", route, sorted({key.route for key in keys}))
        num_records = 0
        for key in keys:
            cursor, is_over = 0, route not in (None, key.route)
            while not is_over:
                try:
                    step = self._store.purge(key, meant, cursor)
                except StoreUnavailableError as error:
                    text = f"{num_records} records were deleted, then the store was away; call again: {error}"
                    raise StoreUnavailableError(text) from error
                num_records, cursor = num_records + step.num_records, step.cursor
                is_over = cursor == 0
        return num_records

    def _tell_learners(self, num_records: int) -> None:
        """Behind the deletion: one told before could read again what it was told to let go of."""
        try:
            self._feed.change_controls(lambda orders: orders.with_purge(secrets.token_hex(8)))
        except StoreUnavailableError as error:
            text = f"{num_records} records were deleted, and the learner could not be told; call again"
            raise StoreUnavailableError(f"{text}: {error}") from error

    @contextmanager
    def _audited(self, operation: str, **arguments: Argument) -> Iterator[None]:
        """Writes the line before the block, so that no change is made without one; a block that fails gets a
        second line, if the log can still be written."""
        try:
            self._write(operation, ALLOWED, arguments)
        except SeamError as error:
            text = f"{operation} was refused, for the audit log could not be written: {error}"
            raise StoreUnavailableError(text) from error
        try:
            yield
        except SeamError as failure:
            try:
                self._write(operation, f"failed: {failure}", arguments)
            except SeamError as error:
                _log.warning("the audit log lacks the last line: %s", error)
            raise

    def _write(self, operation: str, outcome: str, arguments: dict[str, Argument]) -> None:
        given = {name: value for name, value in arguments.items() if value is not None}
        line = audit_line(self._caller, operation, outcome, at_s=self._clock(), arguments=given)
        _log.warning("audit: %s", line.to_json())
        self._feed.add_audit_line(line)


def _require_name(field: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise UnknownNameError(f"{field}={name!r} does not exist; nothing was changed. There are: {known}")


def _measured(shown: Shown) -> Shown:
    """Without figures that were not measured (NaN), which JSON cannot hold."""
    evidence = {name: figure for name, figure in shown.evidence.items() if math.isfinite(figure)}
    return replace(shown, evidence=evidence)


def _concerning(version: int, events: list[AdapterEvent]) -> Iterator[AdapterEvent]:
    """What happened to a draft, what made another one serve in its place included."""
    served = FLOOR_VERSION
    for event in events:
        if version in (event.draft_version, served if event.kind in SERVING_CHANGES else None):
            yield _measured(event)
        served = event.draft_version if event.kind in SERVING_CHANGES else served
