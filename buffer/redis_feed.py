"""Adapters, the pointer to the one that serves, their history and replicas' status, on Redis, by target.

The rules are in `route_state`: a change reads a route's state, applies one of them and writes the outcome,
all under WATCH, so that two writers never interleave. It knows no redis library: it works with the client of
a `RedisLink`. Invariants: a reader of a state finds every adapter that it names; two targets share no key
except the set of targets.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from buffer.codec import decode, encode
from buffer.errors import StoreUnavailableError
from buffer.names import FLOOR_VERSION
from buffer.records import AdapterEvent, AdapterManifest, ServingStatus
from buffer.redis_old_keys import OldKeys
from buffer.redis_store import RedisLink
from buffer.route_state import RouteState, promotion, turn
from buffer.route_table import RouteTable

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


def _tag(*names: str) -> str:
    return sha256(json.dumps(names).encode()).hexdigest()[:24]


class RedisAdapterFeed:
    """An AdapterFeed of one target, shared by the learner, any number of replicas and operators.

    Keeps `max_versions` adapters and `max_events` lines of history a route; a status expires after
    `status_ttl_s` by the server's clock."""

    def __init__(
        self,
        url: str,
        target_revision: str,
        *,
        clock: Callable[[], float] = time.time,
        max_versions: int = 8,
        max_events: int = 1_000,
        status_ttl_s: float = 10.0,
        prefix: str = "everdraft",
        timeout_s: float = 5.0,
    ) -> None:
        self._link = RedisLink(url, timeout_s)
        self._clock = clock
        self._max_versions = max_versions
        self._max_events = max_events
        self._status_ttl_s = status_ttl_s
        self._prefix = prefix
        self._target_revision = target_revision
        self._has_moved_old_keys = False

    def publish(self, manifest: AdapterManifest, weights: bytes) -> None:
        version, parent = manifest.draft_version, manifest.parent_version
        adapter = {f"manifest:{version}": encode(manifest), f"weights:{version}": weights}
        self._change(
            manifest.route,
            lambda state: state.published(version, parent, self._max_versions),
            lambda state: promotion(manifest, self._clock()),
            adapter,
        )

    def latest(self, route: str) -> AdapterManifest | None:
        with self._reached():
            for _ in range(_NUM_READS):
                serving = self._state(route).serving
                if serving == FLOOR_VERSION:
                    return None
                if data := self._link.client.get(self._key(route, f"manifest:{serving}")):
                    return decode(AdapterManifest, data)
        raise self._lost(route, f"manifest:{serving}")

    def last_version(self, route: str) -> int:
        with self._reached():
            return self._state(route).last_version

    def manifest(self, route: str, draft_version: int) -> AdapterManifest:
        return decode(AdapterManifest, self._part(route, "manifest", draft_version))

    def weights(self, route: str, draft_version: int) -> bytes:
        return self._part(route, "weights", draft_version)

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
        written: dict[str, bytes] | None = None,
    ) -> RouteState:
        """Apply `rule` and write its outcome, `written` and the event, all or nothing."""

        def attempt(pipe: Any) -> RouteState:
            before = self._state(route, pipe)
            after = rule(before)
            self._register(route)
            pipe.multi()
            for part, data in {**(written or {}), "state": encode(after)}.items():
                pipe.set(self._key(route, part), data)
            for version in before.parents.keys() - after.parents.keys():
                pipe.delete(*(self._key(route, f"{part}:{version}") for part in ("manifest", "weights")))
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

    def _part(self, route: str, part: str, draft_version: int) -> bytes:
        with self._reached():
            data: bytes | None = self._link.client.get(self._key(route, f"{part}:{draft_version}"))
            if data is None:
                self._state(route).require_adapter(draft_version)
                raise self._lost(route, f"{part}:{draft_version}")
        return data

    def _lost(self, route: str, part: str) -> StoreUnavailableError:
        where = f"Redis at {self._link.shown_url}"
        return StoreUnavailableError(f"{where} lost {part} of route {route!r}; nothing was changed")
