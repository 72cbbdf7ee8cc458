"""Two targets on one Redis share nothing, and what a build that knew no targets left goes to its owner."""

import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
import redis

from buffer.codec import encode
from buffer.errors import VersionConflictError
from buffer.records import AdapterEvent, AdapterManifest, ServingStatus
from buffer.redis_feed import RedisAdapterFeed, known_targets
from buffer.route_state import RouteState
from tests.buffer.samples import START_S, make_manifest, make_table

OpenFeed = Callable[[str], RedisAdapterFeed]


@pytest.fixture(params=["redis", "cluster"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def prefix() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def open_feed(url: str, prefix: str) -> Iterator[OpenFeed]:
    """The feed of a target, on the same keys."""
    opened: list[RedisAdapterFeed] = []

    def open_one(target_revision: str) -> RedisAdapterFeed:
        opened.append(RedisAdapterFeed(url, target_revision, prefix=prefix))
        return opened[-1]

    yield open_one
    for feed in opened:
        feed.close()


def manifest(target: str, version: int, route: str = "default") -> AdapterManifest:
    return replace(make_manifest(version, version - 1, route=route), target_revision=target)


def serving(feed: RedisAdapterFeed, route: str = "default") -> int:
    latest = feed.latest(route)
    return latest.draft_version if latest else 0


def test_a_promotion_and_a_rollback_of_one_target_leave_the_other_alone(open_feed: OpenFeed) -> None:
    a, b = open_feed("target-a"), open_feed("target-b")
    for version in (1, 2):
        a.publish(manifest("target-a", version), b"a%d" % version)
    b.publish(manifest("target-b", 1), b"b1")
    assert (serving(a), serving(b)) == (2, 1)
    assert (a.weights("default", 1), b.weights("default", 1)) == (b"a1", b"b1")
    b.rollback("default", "worse")
    a.pin("default", 1, "compare")
    assert (serving(a), serving(b), b.pinned("default")) == (1, 0, None)
    assert [event.kind for event in b.history("default")] == ["promoted", "rolled_back"]


def test_routes_table_and_statuses_are_each_targets_own(open_feed: OpenFeed, url: str, prefix: str) -> None:
    a, b = open_feed("target-a"), open_feed("target-b")
    a.publish(manifest("target-a", 1, "sql"), b"")
    b.add_event(AdapterEvent("refused", "chat", 1, "too few records", START_S))
    a.put_route_table(make_table("sql", target_revision="target-a"))
    for feed, name in ((a, "one"), (b, "two")):
        feed.report(ServingStatus(name, START_S, {}, ()))
    assert (a.routes(), b.routes()) == (["sql"], ["chat"])
    assert b.route_table() is None and a.route_table() is not None
    assert [[status.replica_id for status in feed.statuses()] for feed in (a, b)] == [["one"], ["two"]]
    assert known_targets(url, prefix=prefix) == ["target-a", "target-b"]


class OldBuild:
    """Writes as builds did that knew no targets; `parents` maps versions to their adapters' targets."""

    def __init__(self, url: str, prefix: str) -> None:
        is_cluster = url.startswith("redis+cluster")
        made: Any = redis.RedisCluster if is_cluster else redis.Redis
        self.client: Any = made.from_url(url.replace("redis+cluster", "redis"))
        self._prefix = prefix

    def keep(self, route: str, targets: dict[int, str], **state: Any) -> None:
        self.client.sadd(f"{self._prefix}:routes", route)
        for version, target in targets.items():
            self.client.set(self._key(route, f"manifest:{version}"), encode(manifest(target, version, route)))
            self.client.set(self._key(route, f"weights:{version}"), b"%s %d" % (target.encode(), version))
        self.client.set(
            self._key(route, "state"), encode(RouteState(route, parents=dict.fromkeys(targets, 0), **state))
        )
        event = AdapterEvent("pinned", route, 1, "until Monday", START_S)
        self.client.rpush(self._key(route, "history"), encode(event))

    def left(self) -> list[bytes]:
        tags = [
            f"{self._prefix}:{{{sha256(route.encode()).hexdigest()[:24]}}}:*" for route in ("default", "sql")
        ]
        return [name for tag in tags for name in self.client.keys(tag)]

    def _key(self, route: str, part: str) -> str:
        return f"{self._prefix}:{{{sha256(route.encode()).hexdigest()[:24]}}}:{part}"


@pytest.fixture
def old(url: str, prefix: str) -> Iterator[OldBuild]:
    build = OldBuild(url, prefix)
    yield build
    build.client.close()


def test_an_earlier_builds_adapters_move_with_their_numbers_events_and_pins(
    open_feed: OpenFeed, old: OldBuild, url: str, prefix: str
) -> None:
    old.keep("default", {3: "target-a", 7: "target-a"}, last_version=9, pointer=7, pinned=3)
    old.keep("sql", {}, last_version=0)
    old.client.set(f"{prefix}:route_table", encode(make_table("sql", target_revision="target-a")))
    assert known_targets(url, prefix=prefix) == ["target-a"]
    other, own, again = open_feed("target-b"), open_feed("target-a"), open_feed("target-a")
    assert other.routes() == [] and other.last_version("default") == 0
    assert own.routes() == again.routes() == ["default", "sql"]
    assert (serving(own), own.pinned("default"), own.last_version("default")) == (3, 3, 9)
    assert own.weights("default", 7) == b"target-a 7"
    assert [event.reason for event in own.history("default")] == ["until Monday"]
    assert own.route_table() is not None
    with pytest.raises(VersionConflictError):
        own.publish(manifest("target-a", 9), b"")
    assert own.unpin("default", "done") == 7
    assert old.left() == []


def test_a_route_that_two_targets_shared_starts_on_the_floor_and_is_told_of(
    open_feed: OpenFeed, old: OldBuild, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can say whose pointer it was; the numbers go on, since replicas may have served them."""
    old.keep("default", {3: "target-a", 4: "target-b"}, last_version=4, pointer=4)
    old.keep("sql", {1: "target-b"}, last_version=1, pointer=1)
    with caplog.at_level(logging.WARNING):
        a, b = open_feed("target-a"), open_feed("target-b")
        assert (serving(a), serving(b)) == (0, 0)
    assert (a.last_version("default"), b.last_version("default")) == (4, 4)
    assert (serving(b, "sql"), a.routes()) == (1, ["default"])
    assert "several targets" in caplog.text and "delete" in caplog.text
    a.publish(manifest("target-a", 5), b"")
    assert (serving(open_feed("target-a")), serving(b)) == (5, 0)
