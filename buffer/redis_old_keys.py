"""Moves adapters that an earlier build stored under Redis keys without a target to the target's own keys.

Works with the client that it is given and knows no redis library. Invariants: versions never restart, events
and pins move with their adapters, and what belongs to another target stays where it is. Builds that write the
old keys must be stopped first; what they write afterwards is ignored.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from buffer.codec import decode, encode
from buffer.errors import SeamError
from buffer.records import AdapterManifest
from buffer.route_state import RouteState
from buffer.route_table import RouteTable

log = logging.getLogger(__name__)

NewKey = Callable[[str, str], str]
"""Maps a route and a part to the key under which the feed of one target stores it."""


@dataclass(frozen=True)
class OldRoute:
    """What the old keys of one route hold, without the weights."""

    name: str
    state: RouteState
    manifests: Mapping[int, AdapterManifest]

    @property
    def targets(self) -> set[str]:
        return {manifest.target_revision for manifest in self.manifests.values()}


class OldKeys:
    """The keys of a prefix as builds before this one wrote them."""

    def __init__(self, client: Any, prefix: str) -> None:
        self._client, self._prefix = client, prefix

    def targets(self) -> set[str]:
        """Target revisions of all adapters under old keys."""
        return {target for route in self._routes() for target in route.targets}

    def move(self, target_revision: str, new_key: NewKey, new_table_key: str) -> list[str]:
        """Move all that belongs to this target to its own keys; returns the routes that it has there now. A
        route with adapters of several targets starts on the floor, at the next version, and is logged."""
        routes = self._routes()
        is_sole = {target for route in routes for target in route.targets} == {target_revision}
        moved = []
        for route in routes:
            if route.targets == {target_revision} or (is_sole and not route.targets):
                self._move(route, new_key)
            elif target_revision in route.targets:
                self._start_anew(route, new_key)
            else:
                continue
            moved.append(route.name)
        self._move_table(target_revision, new_table_key)
        self._client.delete(f"{self._prefix}:{{status}}")  # of statuses that expired long ago
        return moved

    def _routes(self) -> list[OldRoute]:
        names = sorted(name.decode() for name in self._client.smembers(f"{self._prefix}:routes"))
        return [route for name in names if (route := self._read(name)) is not None]

    def _read(self, name: str) -> OldRoute | None:
        """None: it cannot be read, or another process moved it just now."""
        try:
            found = self._client.get(self._key(name, "state"))
            state = RouteState(name) if found is None else decode(RouteState, found)
            kept = [self._client.get(self._key(name, f"manifest:{version}")) for version in state.parents]
            manifests = [decode(AdapterManifest, data) for data in kept if data is not None]
        except SeamError as error:
            log.warning("old keys of route %s cannot be read and are left: %s", name, error)
            return None
        if len(manifests) < len(state.parents):
            return None
        return OldRoute(name, state, {manifest.draft_version: manifest for manifest in manifests})

    def _move(self, route: OldRoute, new_key: NewKey) -> None:
        parts = [f"{kind}:{version}" for version in route.manifests for kind in ("manifest", "weights")]
        written = {part: self._client.get(self._key(route.name, part)) for part in parts}
        lines = self._client.lrange(self._key(route.name, "history"), 0, -1)
        if None in written.values():
            return
        if not self._write(route.name, new_key, {**written, "state": encode(route.state)}, lines):
            return
        for part in (*parts, "history", "state"):
            self._client.delete(self._key(route.name, part))
        self._client.srem(f"{self._prefix}:routes", route.name)

    def _start_anew(self, route: OldRoute, new_key: NewKey) -> None:
        state = RouteState(route.name, last_version=route.state.last_version)
        self._write(route.name, new_key, {"state": encode(state)}, [])
        log.warning(
            "route %s has adapters of several targets under keys of an earlier build: its draft starts on "
            "the floor, at version %d; once every service here is of this build, delete %s",
            *(route.name, state.last_version + 1, self._key(route.name, "*")),
        )

    def _write(self, route: str, new_key: NewKey, parts: Mapping[str, bytes], lines: list[bytes]) -> bool:
        """All or nothing; nothing if this target already has state of this route."""

        def attempt(pipe: Any) -> bool:
            if pipe.exists(new_key(route, "state")):
                return False
            pipe.multi()
            for part, data in parts.items():
                pipe.set(new_key(route, part), data)
            if lines:
                pipe.rpush(new_key(route, "history"), *lines)
            return True

        state_key = new_key(route, "state")
        written: bool = self._client.transaction(attempt, state_key, value_from_callable=True)
        return written

    def _move_table(self, target_revision: str, new_table_key: str) -> None:
        old_key = f"{self._prefix}:route_table"
        data = self._client.get(old_key)
        try:
            is_own = data is not None and decode(RouteTable, data).target_revision == target_revision
        except SeamError:
            return
        if is_own:
            self._client.set(new_table_key, data, nx=True)
            self._client.delete(old_key)

    def _key(self, route: str, part: str) -> str:
        return f"{self._prefix}:{{{sha256(route.encode()).hexdigest()[:24]}}}:{part}"
