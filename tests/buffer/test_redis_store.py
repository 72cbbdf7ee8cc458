"""What only a real server can do: be away, come back empty, be touched by others, refuse, persist."""

import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from buffer.audit import AuditLine
from buffer.errors import StoreUnavailableError
from buffer.records import AdapterEvent, ServingStatus
from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_server import EmbeddedRedis, find_server_binary
from buffer.redis_store import RedisRecordStore
from buffer.store import Bounds, RecordFilter, StreamKey
from tests.buffer.samples import START_S, FakeClock, borrowed, make_manifest, make_record
from tests.support.ports import free_port

KEY = StreamKey("revision", "default")
PREFIX = "test"
TIMEOUT_S = 0.4


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    """A server of its own: the test kills it."""
    with EmbeddedRedis() as server:
        yield server


def open_store(url: str, prefix: str = PREFIX, bounds: Bounds | None = None) -> RedisRecordStore:
    return RedisRecordStore(url, bounds, clock=FakeClock(), prefix=prefix, timeout_s=TIMEOUT_S)


def open_feed(url: str, **options: Any) -> RedisAdapterFeed:
    return RedisAdapterFeed(url, "revision", clock=FakeClock(), prefix=PREFIX, timeout_s=TIMEOUT_S, **options)


def kill(server: EmbeddedRedis, signal_number: int = signal.SIGKILL) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal_number)


def read_ids(store: RedisRecordStore) -> list[str]:
    return [delivery.record.record_id for delivery in store.read_new(KEY, "learner", 9)]


def every_call(url: str) -> dict[str, Callable[[], Any]]:
    store, feed = open_store(url), open_feed(url)
    event = AdapterEvent("refused", "default", 1, "", START_S)
    return {
        "append": lambda: store.append(KEY, [make_record()]),
        "read_new": lambda: store.read_new(KEY, "learner", 9),
        "claim": lambda: store.claim(KEY, "learner", 0.0),
        "ack": lambda: store.ack(KEY, ["1-0"]),
        "draw_replay": lambda: store.draw_replay(KEY, 9, seed=0),
        "purge": lambda: store.purge(KEY, RecordFilter("request")),
        "drop_expired": lambda: store.drop_expired(KEY),
        "size": lambda: store.size(KEY),
        "keys": store.keys,
        "publish": lambda: feed.publish(make_manifest(1), b""),
        "latest": lambda: feed.latest("default"),
        "last_version": lambda: feed.last_version("default"),
        "manifest": lambda: feed.manifest("default", 1),
        "weights": lambda: feed.weights("default", 1),
        "versions": lambda: feed.versions("default"),
        "rollback": lambda: feed.rollback("default", "worse"),
        "pin": lambda: feed.pin("default", 0, "compare"),
        "unpin": lambda: feed.unpin("default", "done"),
        "pinned": lambda: feed.pinned("default"),
        "add_event": lambda: feed.add_event(event),
        "history": lambda: feed.history("default"),
        "routes": feed.routes,
        "report": lambda: feed.report(ServingStatus("one", START_S, {}, ())),
        "statuses": feed.statuses,
        "controls": feed.controls,
        "change_controls": lambda: feed.change_controls(lambda orders: orders.with_drain(None)),
        "add_audit_line": lambda: feed.add_audit_line(AuditLine("", "", "", "drain", "allowed")),
        "audit_log": feed.audit_log,
    }


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster", "redis+sentinel"])
@pytest.mark.parametrize("call", every_call("redis://localhost"))
def test_no_call_raises_anything_else_when_no_server_is_there(call: str, scheme: str) -> None:
    url = f"{scheme}://127.0.0.1:1" + ("/service" if scheme == "redis+sentinel" else "")
    began_s = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="nothing was stored or changed"):
        every_call(url)[call]()
    assert time.monotonic() - began_s < 2.0


def test_no_call_waits_long_for_a_server_that_hangs(server: EmbeddedRedis) -> None:
    calls = every_call(server.url)
    kill(server, signal.SIGSTOP)
    for name in ("append", "read_new", "size", "publish", "latest", "report"):
        began_s = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            calls[name]()
        assert time.monotonic() - began_s < 3 * TIMEOUT_S, name
    kill(server, signal.SIGCONT)
    assert calls["keys"]() == []


def test_errors_do_not_show_the_password(server: EmbeddedRedis) -> None:
    url = server.url
    password = url.split(":")[2].split("@")[0]
    server.stop()
    with pytest.raises(StoreUnavailableError) as caught:
        open_store(url).keys()
    assert "127.0.0.1" in str(caught.value)
    assert password not in str(caught.value)


def test_a_wrong_password_is_an_unavailable_store(server: EmbeddedRedis) -> None:
    with pytest.raises(StoreUnavailableError):
        open_store(f"redis://:wrong@{server.url.rpartition('@')[2]}").keys()


def test_a_url_of_another_kind_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"http://\*\*\*@localhost"):
        RedisRecordStore("http://user:secret@localhost")


@pytest.mark.parametrize("rest", ["localhost/service", "localhost:1", ":secret@one:1,two/service"])
def test_a_sentinel_url_without_its_parts_is_refused_at_once(rest: str) -> None:
    with pytest.raises(ValueError, match="not host:port") as caught:
        RedisRecordStore(f"redis+sentinel://{rest}")
    assert "secret" not in str(caught.value)


@pytest.fixture
def sentinel_url(server: EmbeddedRedis, tmp_path: Path) -> Iterator[str]:
    """A real sentinel that watches the server."""
    password, _, address = server.url.removeprefix("redis://:").partition("@")
    server_port = address.removesuffix("/0").split(":")[1]
    port = free_port()
    lines = (
        f"port {port}",
        "bind 127.0.0.1",
        f"sentinel monitor main 127.0.0.1 {server_port} 1",
        f"sentinel auth-pass main {password}",
    )
    configuration = tmp_path / "sentinel.conf"
    configuration.write_text("\n".join(lines))
    with (tmp_path / "log").open("wb") as log:
        command = [find_server_binary(), str(configuration), "--sentinel"]
        sentinel = subprocess.Popen(command, stdout=log, cwd=tmp_path)
    yield f"redis+sentinel://:{password}@127.0.0.1:{port}/main"
    sentinel.kill()
    sentinel.wait()


def test_a_server_is_found_through_its_sentinel(server: EmbeddedRedis, sentinel_url: str) -> None:
    store, deadline_s = open_store(sentinel_url), time.monotonic() + 10.0
    while True:
        try:
            store.append(KEY, [make_record("a")])
            break
        except StoreUnavailableError:
            assert time.monotonic() < deadline_s
    assert read_ids(open_store(server.url)) == ["a"]


def test_a_server_that_comes_back_empty_is_used_on(server: EmbeddedRedis) -> None:
    """The stream, its group and the scripts are gone; clients and their connections are not."""
    store = open_store(server.url)
    store.append(KEY, [make_record("a"), make_record("b")])
    held = store.read_new(KEY, "learner", 1)
    kill(server)
    server.start()
    assert store.claim(KEY, "learner", 0.0) == []
    assert store.size(KEY).num_pending == 0
    store.ack(KEY, [delivery.entry_id for delivery in held])
    assert read_ids(store) == []
    assert store.append(KEY, [make_record("b"), make_record("c")]) == 2
    assert store.keys() == [KEY]
    assert read_ids(store) == ["b", "c"]


def test_what_was_appended_before_the_group_existed_is_read(server: EmbeddedRedis) -> None:
    open_store(server.url).append(KEY, [make_record("a")])
    assert read_ids(open_store(server.url)) == ["a"]


def test_a_persistent_server_keeps_records_deliveries_and_pointers(tmp_path: Path) -> None:
    with EmbeddedRedis(folder=tmp_path / "state with space") as server:
        store, feed = open_store(server.url), open_feed(server.url)
        store.append(KEY, [make_record(record_id) for record_id in "abc"])
        store.ack(KEY, [store.read_new(KEY, "learner", 1)[0].entry_id])
        store.read_new(KEY, "learner", 1)
        feed.publish(make_manifest(1), b"one")
        feed.publish(make_manifest(2, 1), b"two")
        kill(server)
        server.start()
        assert [delivery.record.record_id for delivery in store.claim(KEY, "learner", 0.0)] == ["b"]
        assert read_ids(store) == ["c"]
        assert store.append(KEY, [make_record("a")]) == 0
        assert feed.rollback("default", "worse") == 1
        assert feed.last_version("default") == 2
    with EmbeddedRedis(folder=tmp_path / "state with space") as server:
        assert open_feed(server.url).weights("default", 1) == b"one"
        assert open_store(server.url).size(KEY).num_records == 3


def stream_name(client: Any, prefix: str) -> bytes:
    [name] = client.keys(f"{prefix}:*:records")
    return bytes(name)


def test_pending_entries_that_somebody_else_trimmed_are_let_go(redis_url: str) -> None:
    """On 6.2 they stay pending for ever, and read as nothing."""
    prefix = uuid.uuid4().hex
    store = open_store(redis_url, prefix)
    store.append(KEY, [make_record(record_id) for record_id in "abc"])
    store.read_new(KEY, "learner", 2)
    with redis.Redis.from_url(redis_url) as client:
        client.xtrim(stream_name(client, prefix), maxlen=2, approximate=False)
    assert [delivery.record.record_id for delivery in store.claim(KEY, "learner", 0.0)] == ["b"]
    assert store.size(KEY).num_pending == 1
    drawn = [record.record_id for record in store.draw_replay(KEY, 9, seed=0)]
    assert sorted(drawn) == ["b", "c"]
    assert read_ids(store) == ["c"]


@pytest.mark.parametrize("payload", [b"garbage", b"ed\x63\x00 of another schema", b""])
def test_an_entry_that_cannot_be_read_leaves_and_is_counted(redis_url: str, payload: bytes) -> None:
    prefix = uuid.uuid4().hex
    store = open_store(redis_url, prefix)
    store.append(KEY, [make_record("a"), make_record("b")])
    with redis.Redis.from_url(redis_url) as client:
        stream = stream_name(client, prefix)
        [(entry_id, fields)] = client.xrange(stream, count=1)
        client.xdel(stream, entry_id)
        foreign = client.xadd(stream, {**fields, b"i": "foreign", b"r": payload})
        client.hset(stream.replace(b"records", b"index"), "foreign", foreign + b" 7")
        client.sadd(stream.replace(b"records", b"open"), foreign)
    assert read_ids(store) == ["b"]
    assert store.size(KEY).num_dropped_records == 1
    assert store.size(KEY).num_pending == 1


def test_a_group_that_somebody_removed_is_made_again(redis_url: str) -> None:
    prefix = uuid.uuid4().hex
    store = open_store(redis_url, prefix)
    store.append(KEY, [make_record("a")])
    assert read_ids(store) == ["a"]
    with redis.Redis.from_url(redis_url) as client:
        client.xgroup_destroy(stream_name(client, prefix), "learner")
    assert read_ids(store) == ["a"]


def test_a_serving_adapter_that_the_server_lost_is_not_the_floor(redis_url: str) -> None:
    """None would swap every replica to the floor; an unavailable store changes nothing."""
    feed = RedisAdapterFeed(redis_url, "revision", prefix=(prefix := uuid.uuid4().hex))
    feed.publish(make_manifest(1), b"one")
    with redis.Redis.from_url(redis_url) as client:
        client.delete(*client.keys(f"{prefix}:*:manifest:1"), *client.keys(f"{prefix}:*:weights:1"))
    with pytest.raises(StoreUnavailableError, match="lost manifest:1"):
        feed.latest("default")
    with pytest.raises(StoreUnavailableError, match="lost weights:1"):
        feed.weights("default", 1)


def test_trimmed_versions_leave_nothing_behind(redis_url: str) -> None:
    feed = RedisAdapterFeed(redis_url, "revision", prefix=(prefix := uuid.uuid4().hex), max_versions=2)
    for version in range(1, 6):
        feed.publish(make_manifest(version, version - 1), b"")
    with redis.Redis.from_url(redis_url) as client:
        assert len(client.keys(f"{prefix}:*:weights:*")) == 2
        assert len(client.keys(f"{prefix}:*:manifest:*")) == 2


@pytest.mark.parametrize("num_bytes", [0, 1, 9, 10, 11, 20, 35])
def test_weights_larger_than_a_value_may_be_travel_in_pieces(redis_url: str, num_bytes: int) -> None:
    prefix, weights = uuid.uuid4().hex, bytes(range(num_bytes))
    feed = RedisAdapterFeed(redis_url, "revision", prefix=prefix, max_versions=2, piece_bytes=10)
    for version in range(1, 4):
        feed.publish(make_manifest(version, version - 1), weights)
    assert feed.weights("default", 3) == feed.weights("default", 2) == weights
    with redis.Redis.from_url(redis_url) as client:
        assert len(client.keys(f"{prefix}:*:weights:1*")) == 0
        assert len(client.keys(f"{prefix}:*:weights:3*")) == max(1, -(-num_bytes // 10))


def test_removed_records_leave_nothing_behind(redis_url: str) -> None:
    prefix = uuid.uuid4().hex
    store = open_store(redis_url, prefix, Bounds(max_records=0, max_bytes=None, max_age_s=None))
    store.append(KEY, [make_record(record_id) for record_id in "abc"])
    with redis.Redis.from_url(redis_url) as client:
        parts = {name.rpartition(b":")[2] for name in client.keys(f"{prefix}:{{*")}
    assert parts == {b"records", b"counters"}


def test_300_tags_leave_a_bounded_number_of_keys_and_none_for_good(redis_url: str) -> None:
    """Two replicas together: the server decides, not each for itself."""
    prefix = uuid.uuid4().hex
    replicas = [open_store(redis_url, prefix, Bounds(max_age_s=3600.0, max_routes=8)) for _ in range(2)]
    for number in range(300):
        route = f"tag-{number}"
        replicas[number % 2].append(StreamKey("revision", route), [borrowed(route, route=route)])
    assert len(replicas[0].keys()) == 8 + 1
    assert replicas[0].size(KEY).num_records == sum(store.num_rerouted_records for store in replicas) == 292
    replicas[0].read_new(StreamKey("revision", "tag-299"), "learner", 9)  # makes no key either
    with redis.Redis.from_url(redis_url) as client:
        names = client.keys(f"{prefix}:*")
        assert len(names) <= 5 * 9 + 1
        lives_ms = [client.pttl(name) for name in names if not name.endswith(b":open_streams")]
    assert all(3_000_000 < life_ms <= 3_600_000 for life_ms in lives_ms)


def test_streams_of_an_earlier_build_are_found_and_forgotten_like_the_others(redis_url: str) -> None:
    prefix = uuid.uuid4().hex
    store = open_store(redis_url, prefix, Bounds(max_age_s=3600.0))
    store.append(KEY, [make_record("a")])
    with redis.Redis.from_url(redis_url) as client:
        client.delete(f"{prefix}:open_streams")
        for name in client.keys(f"{prefix}:*"):
            client.persist(name)
        client.sadd(f"{prefix}:streams", json.dumps(["revision", "default"]))
        assert open_store(redis_url, prefix, Bounds(max_age_s=3600.0)).keys() == [KEY]
        assert client.keys(f"{prefix}:streams") == []
        assert all(client.pttl(name) > 0 for name in client.keys(f"{prefix}:*:records"))
    assert read_ids(store) == ["a"]
