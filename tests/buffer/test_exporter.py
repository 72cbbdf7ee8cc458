"""The exporter over a real Redis that is killed, stopped and started again: serving never waits."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from buffer.breaker import CircuitBreaker
from buffer.exporter import (
    BREAKER_OPEN,
    CLOSED,
    INVALID_RECORD,
    QUEUE_FULL,
    STORE_UNAVAILABLE,
    RecordExporter,
)
from buffer.memory_store import MemoryRecordStore
from buffer.records import GenerationRecord
from buffer.redis_server import EmbeddedRedis
from buffer.redis_store import RedisRecordStore
from buffer.store import StreamKey
from tests.buffer.samples import FakeClock, make_record

KEY = StreamKey("revision", "default")
MAX_SUBMIT_S = 0.1
"""Microseconds in truth; a tenth of a second on a machine that does other things."""


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def redis_store(server: EmbeddedRedis) -> Iterator[RedisRecordStore]:
    store = RedisRecordStore(server.url, clock=FakeClock(), timeout_s=0.5)
    yield store
    store.close()


def quick_breaker() -> CircuitBreaker:
    return CircuitBreaker(max_failures=2, min_backoff_s=0.1, max_backoff_s=0.3)


def send(server: EmbeddedRedis, signal_number: int) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal_number)


def timed_submits(exporter: RecordExporter, prefix: str, num_records: int) -> list[float]:
    """Seconds that each submit took, at about 1,000 a second."""
    latencies_s = []
    for i in range(num_records):
        record = make_record(f"{prefix}-{i}")
        began_s = time.perf_counter()
        exporter.submit(KEY, record)
        latencies_s.append(time.perf_counter() - began_s)
        time.sleep(0.001)
    return latencies_s


def holds_within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def assert_nothing_uncounted(exporter: RecordExporter) -> None:
    assert exporter.num_submitted == exporter.num_exported + exporter.num_dropped_records


def test_what_is_submitted_arrives_in_order() -> None:
    store = MemoryRecordStore(clock=FakeClock())
    exporter = RecordExporter(store, max_batch_records=7)
    for i in range(50):
        assert exporter.submit(KEY, make_record(str(i)))
    exporter.close()
    read = [delivery.record.record_id for delivery in store.read_new(KEY, "learner", 99)]
    assert read == [str(i) for i in range(50)]
    assert (exporter.num_submitted, exporter.num_exported, exporter.num_dropped_records) == (50, 50, 0)


def test_a_callable_is_called_on_the_exporters_thread() -> None:
    store, threads = MemoryRecordStore(clock=FakeClock()), []

    def make() -> GenerationRecord:
        threads.append(threading.current_thread().name)
        return make_record("made")

    exporter = RecordExporter(store)
    exporter.submit(KEY, make)
    exporter.close()
    assert threads == ["record-exporter"]
    assert store.size(KEY).num_records == 1


def test_records_go_to_their_own_streams() -> None:
    store = MemoryRecordStore(clock=FakeClock())
    exporter = RecordExporter(store)
    keys = [StreamKey("revision", route) for route in "abc"]
    for key in keys * 2:
        exporter.submit(key, make_record(f"{key.route}{exporter.num_submitted}"))
    exporter.close()
    assert [store.size(key).num_records for key in keys] == [2, 2, 2]


def test_a_bad_record_costs_only_itself() -> None:
    store, release = MemoryRecordStore(clock=FakeClock()), threading.Event()
    exporter = RecordExporter(store)

    def hold_back() -> GenerationRecord:
        release.wait(10.0)  # so that all of them meet in one batch
        return make_record("first")

    def fail() -> GenerationRecord:
        raise RuntimeError("no such tensor")

    torn = make_record("torn").rounds[0].__class__(**{**vars(make_record().rounds[0]), "retemper_E": []})
    exporter.submit(KEY, hold_back)
    for submitted in (fail, make_record("second"), make_record("torn", rounds=(torn,)), make_record("third")):
        exporter.submit(KEY, submitted)
    release.set()
    exporter.close()
    read = [delivery.record.record_id for delivery in store.read_new(KEY, "learner", 99)]
    assert read == ["first", "second", "third"]
    assert exporter.dropped_by_reason[INVALID_RECORD] == exporter.num_dropped_records == 2


def test_a_full_queue_drops_the_newest_and_counts_it() -> None:
    store, release, began = MemoryRecordStore(clock=FakeClock()), threading.Event(), threading.Event()
    exporter = RecordExporter(store, max_queue_records=3)

    def hold_back() -> GenerationRecord:
        began.set()
        release.wait(10.0)
        return make_record("first")

    exporter.submit(KEY, hold_back)
    assert began.wait(10.0)
    accepted = [exporter.submit(KEY, make_record(str(i))) for i in range(5)]
    assert accepted == [True, True, True, False, False]
    assert exporter.dropped_by_reason[QUEUE_FULL] == 2
    release.set()
    exporter.close()
    read = [delivery.record.record_id for delivery in store.read_new(KEY, "learner", 99)]
    assert read == ["first", "0", "1", "2"]
    assert_nothing_uncounted(exporter)


def test_records_that_would_hold_too_many_bytes_are_dropped_until_others_are_exported() -> None:
    store, release, began = MemoryRecordStore(clock=FakeClock()), threading.Event(), threading.Event()
    exporter = RecordExporter(store, max_queue_bytes=100)

    def hold_back() -> GenerationRecord:
        began.set()
        release.wait(10.0)
        return make_record("first")

    assert exporter.submit(KEY, hold_back, 60)
    assert began.wait(10.0)
    sizes = [50, 40, 1, 0]
    assert [exporter.submit(KEY, make_record(str(i)), size) for i, size in enumerate(sizes)] == [
        False,
        True,
        False,
        True,
    ]
    assert exporter.dropped_by_reason[QUEUE_FULL] == 2
    release.set()
    deadline_s = time.monotonic() + 10.0
    while not exporter.submit(KEY, make_record("whole"), 100):
        assert time.monotonic() < deadline_s, "what was exported still counts as held"
    exporter.close()
    assert_nothing_uncounted(exporter)


def test_a_closed_exporter_refuses_and_counts() -> None:
    exporter = RecordExporter(MemoryRecordStore())
    exporter.close()
    exporter.close()
    assert not exporter.submit(KEY, make_record())
    assert exporter.dropped_by_reason[CLOSED] == exporter.num_dropped_records == 1


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hanging_redis_costs_a_submit_nothing(
    server: EmbeddedRedis, redis_store: RedisRecordStore, signal_number: int
) -> None:
    exporter = RecordExporter(redis_store, max_queue_records=200, breaker=quick_breaker())
    before = timed_submits(exporter, "before", 50)
    assert holds_within(10.0, lambda: exporter.num_exported == 50)
    send(server, signal_number)
    during = timed_submits(exporter, "during", 1000)
    exporter.close(timeout_s=3.0)
    if signal_number == signal.SIGSTOP:
        send(server, signal.SIGCONT)
    assert max(before + during) < MAX_SUBMIT_S
    assert exporter.num_dropped_records == 1000
    assert exporter.dropped_by_reason[BREAKER_OPEN] > 0
    assert exporter.dropped_by_reason[STORE_UNAVAILABLE] > 0
    assert_nothing_uncounted(exporter)


def test_an_open_breaker_makes_no_record() -> None:
    made: list[int] = []

    def make() -> GenerationRecord:
        made.append(1)
        return make_record()

    breaker = CircuitBreaker(max_failures=1, min_backoff_s=60.0, max_backoff_s=60.0)
    exporter = RecordExporter(RedisRecordStore("redis://127.0.0.1:1"), breaker=breaker)
    exporter.submit(KEY, make)
    assert holds_within(10.0, lambda: exporter.breaker_open)
    assert not any(exporter.submit(KEY, make) for _ in range(20))
    exporter.close()
    assert len(made) == 1
    assert exporter.dropped_by_reason[BREAKER_OPEN] == 20


def test_the_breaker_closes_by_itself_when_redis_comes_back(
    server: EmbeddedRedis, redis_store: RedisRecordStore
) -> None:
    exporter = RecordExporter(redis_store, breaker=quick_breaker())
    timed_submits(exporter, "before", 20)
    assert holds_within(10.0, lambda: exporter.num_exported == 20)
    send(server, signal.SIGKILL)
    timed_submits(exporter, "during", 200)
    assert exporter.breaker_open
    server.start()

    def exports_again() -> bool:
        exporter.submit(KEY, make_record(f"probe-{exporter.num_submitted}"))
        return not exporter.breaker_open

    assert holds_within(10.0, exports_again)
    num_exported = exporter.num_exported
    assert max(timed_submits(exporter, "after", 100)) < MAX_SUBMIT_S
    exporter.close()
    assert exporter.num_exported >= num_exported + 100
    assert redis_store.size(KEY).num_records >= 100
    assert_nothing_uncounted(exporter)


def test_closing_does_not_wait_for_a_dead_redis(server: EmbeddedRedis, redis_store: RedisRecordStore) -> None:
    exporter = RecordExporter(redis_store, breaker=quick_breaker())
    send(server, signal.SIGSTOP)
    for i in range(100):
        exporter.submit(KEY, make_record(str(i)))
    began_s = time.monotonic()
    exporter.close(timeout_s=0.5)
    assert time.monotonic() - began_s < 1.5
    send(server, signal.SIGCONT)


def test_many_threads_submit_and_nothing_goes_uncounted() -> None:
    store = MemoryRecordStore(clock=FakeClock())
    exporter = RecordExporter(store, max_queue_records=50)
    submitters = [threading.Thread(target=timed_submits, args=(exporter, str(t), 100)) for t in range(4)]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    exporter.close()
    assert exporter.num_submitted == 400
    assert store.size(KEY).num_records == exporter.num_exported
    assert_nothing_uncounted(exporter)


def test_a_breaker_opens_backs_off_and_closes() -> None:
    breaker = CircuitBreaker(max_failures=2, min_backoff_s=1.0, max_backoff_s=3.0)
    breaker.failed(0.0)
    assert breaker.allows(0.0) and not breaker.is_open
    waits_s = []
    for _ in range(4):
        breaker.failed(10.0)
        waits_s.append(breaker.wait_s(10.0))
    assert waits_s == [1.0, 2.0, 3.0, 3.0]
    assert breaker.is_open and not breaker.allows(12.9) and breaker.allows(13.0)
    breaker.succeeded()
    assert breaker.allows(10.0) and not breaker.is_open
