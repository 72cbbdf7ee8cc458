"""Adapters, which one serves, their history, replicas' status, and operators' orders, on Redis, by target.

The rules are in `route_state`: a change reads a route's state, applies one of them and writes the outcome,
all under WATCH, so that two writers never interleave. It knows no redis library: it works with the client of
a `RedisLink`. Invariants: a reader of a state finds every adapter that it names; two targets share no key
except the set of targets.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from buffer.audit import AuditLine
from buffer.codec import decode, encode
from buffer.controls import Controls
from buffer.errors import StoreUnavailableError
from buffer.names import FLOOR_VERSION
from buffer.records import AdapterEvent, AdapterManifest, ServingStatus
from buffer.redis_old_keys import OldKeys
from buffer.redis_store import RedisLink
from buffer.route_state import MAX_VERSION_BYTES, RouteState, num_versions_kept, promotion, turn
from buffer.route_table import RouteTable

PIECE_BYTES = 256 * 2**20
"""Weights are kept in pieces: Redis takes no value over 512 MB, and a block of a large target is larger."""
_NUM_READS = 5
"""Tries to read a state and what it names, while others publish and trim."""


def known_targets(url: str, *, prefix: str = "everdraft", timeout_s: float = 5.0) -> list[str]:
    """The target revisions that have a feed on this Redis. Raises StoreUnavailableError, or ValueError for an
    invalid URL."""
    link = RedisLink(url, timeout_s)
    try:
        with link.translated():
            targets = {name.decode() for name in link.client.smembers(f"{prefix}:targets")}
            return sorted(targets | OldKeys(link.client, prefix).targets())
    finally:
        link.close()


def _piece(version: int, number: int) -> str:
    return f"weights:{version}" + (f".{number}" if number else "")


def _tag(*names: str) -> str:
    return sha256(json.dumps(names).encode()).hexdigest()[:24]


class RedisAdapterFeed:
    """An AdapterFeed of one target, shared by the learner, any number of replicas and operators.

    Keeps `max_versions` adapters of `max_version_bytes` together, `max_events` lines of history a route, and
    `max_audit_lines` of the audit log, as many again of those refused by key; a status expires after
    `status_ttl_s` by the server's clock."""

    def __init__(
        self,
        url: str,
        target_revision: str,
        *,
        clock: Callable[[], float] = time.time,
        max_versions: int = 8,
        max_version_bytes: int = MAX_VERSION_BYTES,
        max_events: int = 1_000,
        max_audit_lines: int = 10_000,
        status_ttl_s: float = 10.0,
        prefix: str = "everdraft",
        timeout_s: float = 5.0,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._link = RedisLink(url, timeout_s)
        self._clock = clock
        self._max_versions, self._max_version_bytes = max_versions, max_version_bytes
        self._max_events, self._max_audit_lines = max_events, max_audit_lines
        self._status_ttl_s = status_ttl_s
        self._prefix = prefix
        self._target_revision = target_revision
        self._piece_bytes = piece_bytes
        self._has_moved_old_keys = False

    def publish(self, manifest: AdapterManifest, weights: bytes, on_trial: bool = False) -> None:
        version, parent = manifest.draft_version, manifest.parent_version
        whole, size = memoryview(weights), self._piece_bytes
        kept = num_versions_kept(self._max_versions, self._max_version_bytes, len(weights))
        adapter: dict[str, bytes | memoryview] = {f"manifest:{version}": encode(manifest)}
        for number in range(max(1, -(-len(whole) // size))):
            adapter[_piece(version, number)] = whole[number * size : (number + 1) * size]
        self._change(
            manifest.route,
            lambda state: state.published(version, parent, kept, on_trial),
            lambda state: promotion(manifest, self._clock(), on_trial),
            adapter,
        )

    def confirm(self, route: str, reason: str) -> None:
        if self.is_on_trial(route):
            self._turn("confirmed", route, RouteState.confirmed, reason)

    def is_on_trial(self, route: str) -> bool:
        with self._reached():
            return self._state(route).settled is not None

    def latest(self, route: str, replica_id: str | None = None) -> AdapterManifest | None:
        with self._reached():
            for _ in range(_NUM_READS):
                serving = self._state(route).served_by(replica_id, self.statuses)
                if serving == FLOOR_VERSION:
                    return None
                if data := self._link.client.get(self._key(route, f"manifest:{serving}")):
                    return decode(AdapterManifest, data)
        raise self._lost(route, f"manifest:{serving}")

    def last_version(self, route: str) -> int:
        with self._reached():
            return self._state(route).last_version

    def manifest(self, route: str, draft_version: int) -> AdapterManifest:
        return decode(AdapterManifest, self._read(route, f"manifest:{draft_version}", draft_version))

    def weights(self, route: str, draft_version: int) -> bytes:
        found = [self._read(route, _piece(draft_version, 0), draft_version)]
        while len(found[-1]) == self._piece_bytes:
            with self._reached():
                found.append(
                    self._link.client.get(self._key(route, _piece(draft_version, len(found)))) or b""
                )
        return found[0] if len(found) == 1 else b"".join(found)

    def versions(self, route: str) -> list[AdapterManifest]:
        with self._reached():
            kept = sorted(self._state(route).parents)
            found = self._link.client.mget([self._key(route, f"manifest:{v}") for v in kept]) if kept else []
        return [decode(AdapterManifest, data) for data in found if data is not None]

    def rollback(self, route: str, reason: str, to_version: int | None = None) -> int:
        return self._turn("rolled_back", route, lambda state: state.rolled_back(to_version), reason)

    def pin(self, route: str, draft_version: int, reason: str) -> None:
        self._turn("pinned", route, lambda state: state.with_pin(draft_version), reason)

    def unpin(self, route: str, reason: str) -> int:
        return self._turn("unpinned", route, lambda state: state.without_pin(), reason)

    def pinned(self, route: str) -> int | None:
        with self._reached():
            return self._state(route).pinned

    def add_event(self, event: AdapterEvent) -> None:
        with self._reached():
            self._register(event.route)
            pipe = self._link.client.pipeline(transaction=True)
            self._push(pipe, event)
            pipe.execute()

    def history(self, route: str, max_events: int = 200) -> list[AdapterEvent]:
        if max_events <= 0:
            return []
        with self._reached():
            lines = self._link.client.lrange(self._key(route, "history"), -max_events, -1)
        return [decode(AdapterEvent, line) for line in lines]

    def routes(self) -> list[str]:
        with self._reached():
            return sorted(name.decode() for name in self._link.client.smembers(self._shared_key("routes")))

    def put_route_table(self, table: RouteTable) -> None:
        with self._reached():
            self._link.client.set(self._shared_key("route_table"), encode(table))

    def route_table(self) -> RouteTable | None:
        with self._reached():
            data = self._link.client.get(self._shared_key("route_table"))
        return None if data is None else decode(RouteTable, data)

    def report(self, status: ServingStatus) -> None:
        with self._reached():
            self._register_target()
            pipe = self._link.client.pipeline(transaction=True)
            pipe.sadd(self._shared_key("status"), status.replica_id)
            ttl_ms = int(1000 * self._status_ttl_s)
            pipe.set(self._shared_key("status", status.replica_id), encode(status), px=ttl_ms)
            pipe.execute()

    def statuses(self) -> list[ServingStatus]:
        with self._reached():
            client = self._link.client
            names = sorted(name.decode() for name in client.smembers(self._shared_key("status")))
            found = client.mget([self._shared_key("status", name) for name in names]) if names else []
            gone = [name for name, data in zip(names, found, strict=True) if data is None]
            if gone:
                client.srem(self._shared_key("status"), *gone)
        return [decode(ServingStatus, data) for data in found if data is not None]

    def controls(self) -> Controls | None:
        with self._reached():
            data = self._link.client.get(self._shared_key("controls"))
        return None if data is None else Controls.from_json(data)

    def change_controls(self, rule: Callable[[Controls], Controls]) -> Controls:
        key = self._shared_key("controls")

        def attempt(pipe: Any) -> Controls:
            data = pipe.get(key)
            changed = rule(Controls() if data is None else Controls.from_json(data))
            pipe.multi()
            pipe.set(key, changed.to_json())
            return changed

        with self._reached():
            self._register_target()
            controls: Controls = self._link.client.transaction(attempt, key, value_from_callable=True)
        return controls

    def add_audit_line(self, line: AuditLine) -> None:
        key = self._audit_keys[line.is_refused_by_key]
        with self._reached():
            self._link.client.xadd(
                key, {"line": line.to_json()}, maxlen=self._max_audit_lines, approximate=False
            )

    def audit_log(self, max_lines: int = 100) -> list[AuditLine]:
        if max_lines <= 0:
            return []
        with self._reached():
            found = [self._link.client.xrevrange(key, count=max_lines)[::-1] for key in self._audit_keys]
        lines = [AuditLine.from_json(fields[b"line"]) for entries in found for _, fields in entries]
        return sorted(lines, key=lambda line: line.time)[-max_lines:]

    def close(self) -> None:
        self._link.close()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Like RedisLink.translated; on first use it moves what an earlier build stored for this target."""
        with self._link.translated():
            if not self._has_moved_old_keys:
                old = OldKeys(self._link.client, self._prefix)
                for route in old.move(self._target_revision, self._key, self._shared_key("route_table")):
                    self._register(route)
                self._has_moved_old_keys = True
            yield

    def _key(self, route: str, part: str) -> str:
        """Key of one part of a route. All parts share one hash tag, a digest, because a route may hold
        braces."""
        return f"{self._prefix}:{{{_tag(self._target_revision, route)}}}:{part}"

    def _shared_key(self, *parts: str) -> str:
        """Key of a part that is common to all routes."""
        return ":".join((f"{self._prefix}:{{{_tag(self._target_revision)}}}", *parts))

    @property
    def _audit_keys(self) -> tuple[str, str]:
        """Of lines in general, and of those refused by key."""
        return self._shared_key("audit"), self._shared_key("audit", "refused")

    def _register(self, route: str) -> None:
        self._register_target()
        self._link.client.sadd(self._shared_key("routes"), route)

    def _register_target(self) -> None:
        self._link.client.sadd(f"{self._prefix}:targets", self._target_revision)

    def _state(self, route: str, client: Any = None) -> RouteState:
        data = (client or self._link.client).get(self._key(route, "state"))
        return RouteState(route) if data is None else decode(RouteState, data)

    def _turn(self, kind: str, route: str, rule: Callable[[RouteState], RouteState], reason: str) -> int:
        return self._change(route, rule, lambda state: turn(kind, state, reason, self._clock())).serving

    def _change(
        self,
        route: str,
        rule: Callable[[RouteState], RouteState],
        event: Callable[[RouteState], AdapterEvent],
        written: Mapping[str, bytes | memoryview] | None = None,
    ) -> RouteState:
        """Apply `rule` and write its outcome, `written` and the event, all or nothing."""

        def attempt(pipe: Any) -> RouteState:
            before = self._state(route, pipe)
            after = rule(before)
            self._register(route)
            gone = [
                key
                for version in before.parents.keys() - after.parents.keys()
                for key in self._keys_of(pipe, route, version)
            ]
            pipe.multi()
            for part, data in {**(written or {}), "state": encode(after)}.items():
                pipe.set(self._key(route, part), data)
            if gone:
                pipe.delete(*gone)
            self._push(pipe, event(after))
            return after

        with self._reached():
            state_key = self._key(route, "state")
            state: RouteState = self._link.client.transaction(attempt, state_key, value_from_callable=True)
        return state

    def _push(self, pipe: Any, event: AdapterEvent) -> None:
        history = self._key(event.route, "history")
        pipe.rpush(history, encode(event))
        pipe.ltrim(history, -self._max_events, -1)

    def _keys_of(self, client: Any, route: str, version: int) -> list[str]:
        """All that is kept of one adapter."""
        pieces = [self._key(route, _piece(version, 0))]
        while client.strlen(pieces[-1]) == self._piece_bytes:
            pieces.append(self._key(route, _piece(version, len(pieces))))
        return [self._key(route, f"manifest:{version}"), *pieces]

    def _read(self, route: str, part: str, draft_version: int) -> bytes:
        with self._reached():
            data: bytes | None = self._link.client.get(self._key(route, part))
            if data is None:
                self._state(route).require_adapter(draft_version)
                raise self._lost(route, part)
        return data

    def _lost(self, route: str, part: str) -> StoreUnavailableError:
        where = f"Redis at {self._link.shown_url}"
        return StoreUnavailableError(f"{where} lost {part} of route {route!r}; nothing was changed")
