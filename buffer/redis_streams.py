"""The registry of record streams on a Redis, for all targets, and the names of their keys.

Works with the client that it is given and knows no redis library. Invariant: over all processes no target has
more than `max_routes` streams beside `default`'s; a stream leaves the registry when its keys have expired.
"""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, Protocol

from buffer import redis_scripts
from buffer.store import Bounds, StreamKey, default_stream


class Link(Protocol):
    """The part of RedisLink that is used here, inside its `translated`."""

    @property
    def client(self) -> Any: ...

    def run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any: ...


def stream_keys(prefix: str, key: StreamKey) -> list[str]:
    """The five keys of a stream. One hash tag keeps them together on a cluster; it is a digest, since a route
    may hold braces."""
    tag = sha256(_member(key).encode()).hexdigest()[:24]
    return [f"{prefix}:{{{tag}}}:{part}" for part in ("records", "index", "expiry", "open", "counters")]


def _member(key: StreamKey) -> str:
    return json.dumps([key.target_revision, key.route])


class StreamRegistry:
    """A sorted set of streams by the time at which they expire."""

    def __init__(self, link: Link, prefix: str, bounds: Bounds, clock: Callable[[], float]) -> None:
        self._link, self._prefix, self._bounds, self._clock = link, prefix, bounds, clock
        self._has_adopted = False

    def opened(self, key: StreamKey, *, is_bounded: bool) -> bool:
        """Whether the stream is open from now on; renews it. The server decides, for all processes."""
        self._adopt_old_streams()
        siblings = _member(key).removesuffix(f"{json.dumps(key.route)}]")
        max_routes = self._bounds.max_routes if is_bounded else None
        args = [_member(key), siblings, _member(default_stream(key)), repr(self._clock())]
        args += [self._forgotten_at_s(), "" if max_routes is None else str(max_routes)]
        return bool(self._link.run(redis_scripts.OPEN_STREAM, [self._name], args))

    def keys(self) -> list[StreamKey]:
        self._adopt_old_streams()
        names = self._link.client.zrangebyscore(self._name, repr(self._clock()), "+inf")
        return [StreamKey(*json.loads(name)) for name in sorted(names)]

    @property
    def _name(self) -> str:
        return f"{self._prefix}:open_streams"

    def _forgotten_at_s(self) -> str:
        max_age_s = self._bounds.max_age_s
        return "+inf" if max_age_s is None else repr(self._clock() + max_age_s)

    def _adopt_old_streams(self) -> None:
        """Once: give streams of earlier builds, which never expired, the usual time to live."""
        if self._has_adopted:
            return
        old, client, max_age_s = f"{self._prefix}:streams", self._link.client, self._bounds.max_age_s
        for name in client.smembers(old):
            client.zadd(self._name, {name: self._forgotten_at_s()}, nx=True)
            for part in stream_keys(self._prefix, StreamKey(*json.loads(name))):
                if max_age_s is not None:
                    client.pexpire(part, int(1000 * max_age_s))
            client.srem(old, name)
        self._has_adopted = True
