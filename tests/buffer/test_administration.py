"""What an operator changes, on every feed and store; and the line that each change leaves."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from buffer.administration import DirectAdministration, PurgeReport
from buffer.audit import REFUSED_BY_KEY, AuditLine, Caller, audit_line
from buffer.controls import Controls
from buffer.errors import (
    OrderRefusedError,
    SeamError,
    StoreUnavailableError,
    UnknownNameError,
    UnknownVersionError,
)
from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.records import AdapterEvent, ServingStatus
from buffer.redis_feed import RedisAdapterFeed
from buffer.redis_server import EmbeddedRedis
from buffer.store import AdapterFeed, PurgeStep, RecordFilter, RecordStore, StreamKey
from tests.buffer.samples import START_S, FakeClock, make_manifest, make_record

CALLER = Caller("0a1b2c3d", "10.0.0.9")


@pytest.fixture
def admin(feed: AdapterFeed, store: RecordStore, clock: FakeClock) -> DirectAdministration:
    for version in (1, 2):
        feed.publish(make_manifest(version, version - 1), b"weights")
    return administration(feed, store, clock)


def administration(feed: AdapterFeed, store: RecordStore, clock: FakeClock) -> DirectAdministration:
    return DirectAdministration(feed, store, "revision", CALLER, clock=clock)


def lines(admin: DirectAdministration) -> list[tuple[str, str, dict[str, object]]]:
    return [(line.operation, line.outcome, dict(line.arguments)) for line in admin.audit_log()]


def test_drafts_are_shown_by_route(admin: DirectAdministration, feed: AdapterFeed) -> None:
    feed.publish(make_manifest(1, route="sql"), b"weights")
    feed.add_event(AdapterEvent("refused", "sql", 2, "too few", START_S, {"gain": float("nan"), "n": 3.0}))
    admin.pin("default", 1, "compare")
    admin.pause_learning("sql")
    default, sql = admin.drafts()
    assert (default.route, default.serving_version, default.pinned_version) == ("default", 1, 1)
    assert [manifest.draft_version for manifest in default.versions] == [1, 2]
    assert (sql.route, sql.serving_version, sql.is_learning_paused) == ("sql", 1, True)
    assert [event.kind for event in sql.events] == ["promoted", "refused"]
    assert sql.events[-1].evidence == {"n": 3.0}, "JSON holds no NaN"
    assert [drafts.route for drafts in admin.drafts("sql", max_events=0)] == ["sql"]


def test_a_draft_is_shown_with_what_became_of_it(admin: DirectAdministration, feed: AdapterFeed) -> None:
    assert admin.draft("default", 2).is_serving
    admin.rollback("default", "worse")
    shown = admin.draft("default", 2)
    assert not shown.is_serving and shown.manifest == make_manifest(2, 1)
    assert [event.kind for event in shown.events] == ["promoted", "rolled_back"]


def test_what_serves_is_changed_and_returned(admin: DirectAdministration, feed: AdapterFeed) -> None:
    assert admin.rollback("default", "worse") == 1
    assert admin.pin("default", 2, "compare") == 2
    assert admin.rollback("default", "worse", version=0) == 2, "a pin outlasts it"
    assert admin.unpin("default", "done") == 0
    assert [event.reason for event in feed.history("default", 4)] == ["worse", "compare", "worse", "done"]


def test_names_that_do_not_exist_are_refused_with_those_that_do(
    admin: DirectAdministration, feed: AdapterFeed
) -> None:
    feed.publish(make_manifest(1, route="sql"), b"weights")
    feed.report(ServingStatus("r0", START_S, {}, ()))
    for refused in (
        lambda: admin.drafts("nowhere"),
        lambda: admin.draft("nowhere", 1),
        lambda: admin.rollback("nowhere", "worse"),
        lambda: admin.pin("nowhere", 0, "x"),
        lambda: admin.unpin("nowhere", "x"),
        lambda: admin.pause_learning("nowhere"),
        lambda: admin.resume_learning("nowhere"),
    ):
        with pytest.raises(UnknownNameError, match=r"route='nowhere'.* 'default', 'sql'"):
            refused()
    with pytest.raises(UnknownNameError, match=r"replica_id='r7'.* 'r0'"):
        admin.drain("r7")
    with pytest.raises(UnknownNameError, match=r"replica_id='r0'.* none"):
        admin.undrain("r0")
    with pytest.raises(UnknownVersionError, match=r"\[1, 2\], not 7"):
        admin.pin("default", 7, "x")
    assert feed.routes() == ["default", "sql"] and feed.controls() is None
    assert all(outcome == "allowed" or outcome.startswith("failed: ") for _, outcome, _ in lines(admin))


def test_orders_are_kept_for_all_who_follow(admin: DirectAdministration, feed: AdapterFeed) -> None:
    assert feed.controls() is None
    feed.report(ServingStatus("r0", START_S, {}, ()))
    admin.set_capture_rate(0.25)
    admin.pause_learning()
    admin.drain("r0")
    expected = Controls(is_learning_paused=True, capture_rate=0.25, draining_replicas=("r0",))
    assert feed.controls() == admin.controls() == expected
    admin.resume_learning()
    admin.undrain("r0")
    assert admin.set_capture_rate(None) == Controls() == feed.controls()
    admin.drain()
    with pytest.raises(OrderRefusedError):
        admin.undrain("r0")
    assert admin.undrain() == Controls()


def test_a_purge_reaches_all_streams_of_the_target_or_the_route(
    admin: DirectAdministration, store: RecordStore
) -> None:
    for route in ("default", "sql", "chat"):
        ids = ["cmpl-1-0-0-0", "cmpl-2-0-0-0"]
        store.append(StreamKey("revision", route), [make_record(name, route=route) for name in ids])
    store.append(StreamKey("another", "default"), [make_record("cmpl-1-0-0-0", target_revision="another")])
    assert admin.purge(request_id="cmpl-1") == PurgeReport(3, "")
    assert admin.purge(route="sql").num_records == 1
    assert admin.purge(older_than_s=1e6).num_records == 0
    assert admin.purge(older_than_s=-1.0, route="chat").num_records == 1
    known = store.keys()
    sizes = {key: store.size(key).num_records for key in known}
    assert {key.route: size for key, size in sizes.items() if key.target_revision == "revision"} == {
        "default": 1,
        "sql": 0,
        "chat": 0,
    }
    assert sizes[StreamKey("another", "default")] == 1
    with pytest.raises(UnknownNameError, match="chat"):
        admin.purge(route="nowhere")
    with pytest.raises(OrderRefusedError, match="must be given"):
        admin.purge()


def test_each_change_leaves_a_line_with_who_what_and_when(
    admin: DirectAdministration, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        admin.drafts()
        admin.rollback("default", "worse", version=1)
        clock.advance(1.5)
        admin.set_capture_rate(None)
    first, second = admin.audit_log()
    assert first == AuditLine(
        time="1970-01-12T13:46:40.000+00:00",
        who="0a1b2c3d",
        address="10.0.0.9",
        operation="drafts.rollback",
        outcome="allowed",
        arguments={"route": "default", "version": 1, "reason": "worse"},
    )
    assert (second.operation, second.arguments) == ("capture.reset", {})
    assert second.time == "1970-01-12T13:46:41.500+00:00"
    logged = [json.loads(record.message.partition("audit: ")[2]) for record in caplog.records]
    assert [line["operation"] for line in logged] == ["drafts.rollback", "capture.reset"]
    assert logged[0]["who"] == "0a1b2c3d"


def test_a_change_that_could_not_be_made_leaves_a_second_line(admin: DirectAdministration) -> None:
    with pytest.raises(UnknownVersionError):
        admin.pin("default", 9, "x")
    arguments = {"route": "default", "version": 9, "reason": "x"}
    first, second = lines(admin)
    assert first == ("drafts.pin", "allowed", arguments)
    assert second[0] == "drafts.pin" and second[1].startswith("failed: ") and "not 9" in second[1]


def test_the_log_is_bounded_and_callers_without_a_key_push_nothing_out(redis_url: str) -> None:
    feeds: list[AdapterFeed] = [
        MemoryAdapterFeed(max_audit_lines=3),
        RedisAdapterFeed(redis_url, "revision", prefix="bounded", max_audit_lines=3),
    ]
    for feed in feeds:
        for number in range(5):
            feed.add_audit_line(audit_line(CALLER, f"change {number}", "allowed", at_s=number))
        for number in range(9):
            refusal = audit_line(CALLER, f"knock {number}", REFUSED_BY_KEY, at_s=10 + number)
            feed.add_audit_line(refusal)
        names = [line.operation for line in feed.audit_log()]
        assert names == ["change 2", "change 3", "change 4", "knock 6", "knock 7", "knock 8"]
        assert [line.operation for line in feed.audit_log(2)] == ["knock 7", "knock 8"]
        assert feed.audit_log(0) == []
        feed.close()


class FullFeed(MemoryAdapterFeed):
    """The audit log can be written `num_lines` times."""

    num_lines = 0

    def add_audit_line(self, line: AuditLine) -> None:
        if self.num_lines == 0:
            raise StoreUnavailableError("the disk is full")
        self.num_lines -= 1
        super().add_audit_line(line)


def test_what_cannot_be_noted_is_not_done(clock: FakeClock) -> None:
    feed, store = FullFeed(), MemoryRecordStore(clock=clock)
    feed.publish(make_manifest(1), b"weights")
    store.append(StreamKey("revision", "default"), [make_record()])
    admin = administration(feed, store, clock)
    changes: list[Callable[[], object]] = [
        lambda: admin.rollback("default", "worse"),
        lambda: admin.pin("default", 0, "x"),
        lambda: admin.unpin("default", "x"),
        admin.pause_learning,
        admin.resume_learning,
        lambda: admin.set_capture_rate(0.0),
        admin.drain,
        admin.undrain,
        lambda: admin.purge(route="default"),
    ]
    for change in changes:
        with pytest.raises(StoreUnavailableError, match=r"was refused, for the audit log.*disk is full"):
            change()
    assert [event.kind for event in feed.history("default")] == ["promoted"]
    assert feed.controls() is None
    assert store.size(StreamKey("revision", "default")).num_records == 1
    feed.num_lines = 1
    with pytest.raises(UnknownVersionError):
        admin.pin("default", 5, "x")


class StepwiseStore(MemoryRecordStore):
    """Away after its first step, which had another one to follow."""

    num_steps = 0

    def purge(self, key: StreamKey, meant: RecordFilter, cursor: int = 0) -> PurgeStep:
        self.num_steps += 1
        if self.num_steps > 1:
            raise StoreUnavailableError("away")
        return replace(super().purge(key, meant, cursor), cursor=7)


def test_a_purge_that_was_interrupted_says_how_far_it_came(clock: FakeClock) -> None:
    store = StepwiseStore(clock=clock)
    store.append(StreamKey("revision", "default"), [make_record("a-0"), make_record("b-0")])
    admin = administration(MemoryAdapterFeed(), store, clock)
    with pytest.raises(StoreUnavailableError, match=r"2 records were deleted.*call again"):
        admin.purge(route="default")


def test_another_process_follows_and_a_restarted_redis_keeps_it(tmp_path: Path, clock: FakeClock) -> None:
    server = EmbeddedRedis(folder=tmp_path).start()
    try:
        one, other = (RedisAdapterFeed(server.url, "revision") for _ in range(2))
        admin = administration(one, MemoryRecordStore(), clock)
        admin.pause_learning()
        assert other.controls() == Controls(is_learning_paused=True)
        server.stop()
        with pytest.raises(SeamError):
            admin.resume_learning()
        server.start()
        assert other.controls() == Controls(is_learning_paused=True)
        assert [line.operation for line in other.audit_log()] == ["learning.pause"]
        one.close()
        other.close()
    finally:
        server.stop()
