"""What a Redis server's files hold after a deletion, and servers that may not be given everything."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from buffer.errors import PersistentStoreError
from buffer.redis_server import EmbeddedRedis
from buffer.redis_store import RedisRecordStore
from buffer.store import RecordFilter, StreamKey
from tests.buffer.samples import FakeClock, make_record

KEY = StreamKey("revision", "default")
SECRET = np.array([901, 17, 733, 5150, 42, 808], dtype=np.int32)
OTHER = np.arange(6, dtype=np.int32)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """Without compression, so that a search of its files finds what is in them."""
    with EmbeddedRedis(folder=tmp_path) as running:
        with redis.Redis.from_url(running.url) as client:
            client.config_set("rdbcompression", "no")
        yield running


def filled(url: str, **options: bool) -> RedisRecordStore:
    """A store with a record that must go, between two small ones that stay."""
    store = RedisRecordStore(url, clock=FakeClock(), **options)
    for name, tokens in (("before", OTHER), ("meant", SECRET), ("behind", OTHER)):
        store.append(KEY, [make_record(name, num_kept=1, prompt_token_ids=tokens)])
    return store


def holds(folder: Path) -> bool:
    return any(SECRET.tobytes() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def wait_until_written(folder: Path) -> None:
    """The append-only file is flushed once a second."""
    deadline_s = time.monotonic() + 10
    while not holds(folder):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_what_was_deleted_leaves_the_append_only_file(server: EmbeddedRedis, tmp_path: Path) -> None:
    store = filled(server.url)
    wait_until_written(tmp_path)
    assert store.purge(KEY, RecordFilter("meant")).num_records == 1
    assert holds(tmp_path), "deletion alone does not reach the file"
    assert store.rewrite_files() == ""
    assert not holds(tmp_path)
    assert {record.record_id for record in store.draw_replay(KEY, 9, seed=0)} == {"before", "behind"}
    store.close()


def test_a_server_with_several_entries_a_node_keeps_what_was_deleted_and_it_is_said(
    server: EmbeddedRedis, tmp_path: Path
) -> None:
    """The control: without a node for each entry the first test would fail."""
    with redis.Redis.from_url(server.url) as client:
        client.config_set("stream-node-max-entries", 100)
    store = filled(server.url)
    store.purge(KEY, RecordFilter("meant"))
    assert "stream-node-max-entries 100" in store.rewrite_files()
    assert holds(tmp_path)
    store.close()


def test_snapshots_are_written_anew_too(server: EmbeddedRedis, tmp_path: Path) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("save", "3600 1000000")
        client.config_set("appendonly", "no")
        store = filled(server.url)
        client.save()
    assert holds(tmp_path)
    store.purge(KEY, RecordFilter("meant"))
    assert store.rewrite_files() == ""
    assert not holds(tmp_path)
    store.close()


def test_a_server_that_refuses_to_be_asked_is_named(server: EmbeddedRedis) -> None:
    """As managed ones do."""
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL SETUSER managed on >pass ~* +@all -config -bgrewriteaof")
    url = f"redis://managed:pass@{server.url.rpartition('@')[2]}"
    store = filled(url)
    store.purge(KEY, RecordFilter("meant"))
    caveat = store.rewrite_files()
    assert "not rewritten and may still hold them" in caveat and "pass" not in caveat
    store.close()


@pytest.mark.parametrize("setting", [("appendonly", "yes"), ("save", "60 1")])
def test_a_server_that_persists_is_given_no_record_that_must_reach_no_disk(setting: tuple[str, str]) -> None:
    with EmbeddedRedis() as running, redis.Redis.from_url(running.url) as client:
        client.config_set(*setting)
        with pytest.raises(PersistentStoreError, match=setting[0]):
            filled(running.url, in_memory=True)
        assert client.dbsize() == 0
        client.config_set(setting[0], "no" if setting[0] == "appendonly" else "")
        filled(running.url, in_memory=True).close()


def test_a_sealed_server_cannot_be_made_to_write_and_takes_records(tmp_path: Path) -> None:
    with EmbeddedRedis(is_sealed=True) as running, redis.Redis.from_url(running.url) as client:
        store = filled(running.url, in_memory=True)
        for command in (
            "SAVE",
            "BGSAVE",
            "BGREWRITEAOF",
            "CONFIG SET dir /tmp",
            "SHUTDOWN SAVE",
            "DEBUG RELOAD",
            "REPLICAOF 127.0.0.1 1",
        ):
            with pytest.raises(redis.ResponseError, match="unknown command"):
                client.execute_command(*command.split())
        assert client.slowlog_get() == []
        store.close()
