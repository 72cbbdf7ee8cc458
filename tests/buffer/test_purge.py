"""Records are deleted for good, on every implementation: those meant, and no others."""

import pytest

from buffer.store import RecordFilter, RecordStore, StreamKey
from learner.record_inbox import RecordInbox
from tests.buffer.samples import FakeClock, make_record

KEY = StreamKey("revision", "default")
OTHER = StreamKey("revision", "sql")


def append(store: RecordStore, *record_ids: str, key: StreamKey = KEY) -> None:
    store.append(key, [make_record(record_id, route=key.route) for record_id in record_ids])


def purge(store: RecordStore, meant: RecordFilter, key: StreamKey = KEY) -> int:
    """All steps."""
    num_records, cursor, is_first = 0, 0, True
    while is_first or cursor:
        step = store.purge(key, meant, cursor)
        num_records, cursor, is_first = num_records + step.num_records, step.cursor, False
    return num_records


def kept(store: RecordStore, key: StreamKey = KEY) -> list[str]:
    return sorted(record.record_id for record in store.draw_replay(key, 10_000, seed=0))


def test_a_requests_records_are_those_of_all_its_choices_and_segments(store: RecordStore) -> None:
    append(store, "cmpl-a", "cmpl-a-0-0-0", "cmpl-a-1-0-2", "cmpl-ab-0-0-0", "x-cmpl-a-0", "cmpl-")
    append(store, "cmpl-a-0-0-0", key=OTHER)
    assert purge(store, RecordFilter(request_id="cmpl-a")) == 3
    assert kept(store) == ["cmpl-", "cmpl-ab-0-0-0", "x-cmpl-a-0"]
    assert kept(store, OTHER) == ["cmpl-a-0-0-0"]
    assert purge(store, RecordFilter(request_id="cmpl-a")) == 0


@pytest.mark.parametrize("magic", [".*", "%a+", "cmpl-%-", "[ab]", ""])
def test_an_id_is_no_pattern(store: RecordStore, magic: str) -> None:
    append(store, "cmpl-a-0", "cmpl-b-0")
    assert purge(store, RecordFilter(request_id=f"cmpl-{magic}")) == 0
    assert len(kept(store)) == 2


def test_records_older_than_an_age_are_deleted(store: RecordStore, clock: FakeClock) -> None:
    append(store, "old-0", "old-1")
    clock.advance(10.0)
    append(store, "new-0")
    clock.advance(5.0)
    assert purge(store, RecordFilter(older_than_s=15.0)) == 0, "exactly so old is not older"
    assert purge(store, RecordFilter("old-1", older_than_s=14.0)) == 1
    assert purge(store, RecordFilter(older_than_s=14.0)) == 1
    assert kept(store) == ["new-0"]
    assert purge(store, RecordFilter(older_than_s=0.0)) == 1


def test_no_filter_deletes_the_whole_stream_and_it_goes_on(store: RecordStore) -> None:
    append(store, *(f"r{number}" for number in range(1_500)))  # several steps
    assert purge(store, RecordFilter()) == 1_500
    size = store.size(KEY)
    assert (size.num_records, size.num_bytes, size.num_dropped_records) == (0, 0, 0)
    append(store, "r1", "later")
    assert [each.record.record_id for each in store.read_new(KEY, "learner", 9)] == ["r1", "later"]


def test_what_is_not_there_has_nothing_to_delete(store: RecordStore) -> None:
    assert purge(store, RecordFilter()) == 0
    assert store.keys() == []


def test_delivered_records_are_deleted_and_a_consumer_goes_on_without_them(store: RecordStore) -> None:
    """Read and not acknowledged by a learner that was killed, then deleted, then claimed by its next life."""
    append(store, "a-0", "b-0", "c-0", "d-0")
    first = RecordInbox(store, "revision", "learner", {})
    assert len(first.read([KEY], 3)) == 3
    assert purge(store, RecordFilter("b")) == purge(store, RecordFilter("d")) == 1
    assert store.size(KEY).num_pending == 2

    again = RecordInbox(store, "revision", "learner", {})
    again.reclaim()
    assert [record.record_id for record in again.records([KEY])] == ["a-0", "c-0"]
    assert again.read([KEY], 9) == []
    again.ack([KEY])
    first.ack([KEY])  # the earlier life names the deleted one, too
    size = store.size(KEY)
    assert (size.num_records, size.num_pending, size.num_dropped_records) == (2, 0, 0)
