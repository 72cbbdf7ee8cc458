"""The contract of RecordStore, sentence by sentence, on every implementation."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
from scipy import stats

from buffer.codec import encode
from buffer.store import Bounds, Delivery, RecordStore, StreamKey
from learner.record_inbox import RecordInbox
from tests.buffer.samples import START_S, FakeClock, OpenStore, borrowed, make_record

KEY = StreamKey("revision", "default")


def append(store: RecordStore, ids: Iterable[str], **changes: object) -> int:
    return store.append(KEY, [make_record(record_id, **changes) for record_id in ids])


def record_ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.record.record_id for delivery in deliveries]


def entry_ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.entry_id for delivery in deliveries]


def test_records_are_read_once_in_the_order_of_their_arrival(store: RecordStore) -> None:
    assert append(store, "abc") == 3
    assert record_ids(store.read_new(KEY, "learner", 2)) == ["a", "b"]
    assert record_ids(store.read_new(KEY, "learner", 9)) == ["c"]
    assert store.read_new(KEY, "learner", 9) == []


def test_a_record_comes_back_bit_for_bit(store: RecordStore) -> None:
    record = make_record(num_rounds=3, num_kept=32)
    store.append(KEY, [record])
    [delivery] = store.read_new(KEY, "learner", 1)
    assert encode(delivery.record) == encode(record)


def test_a_record_appended_twice_is_stored_once(store: RecordStore) -> None:
    assert append(store, "ab") == 2
    assert append(store, "bcc") == 1
    assert record_ids(store.read_new(KEY, "learner", 9)) == ["a", "b", "c"]
    assert store.size(KEY).num_records == 3


def test_a_malformed_record_stores_nothing_of_its_batch(store: RecordStore) -> None:
    good = make_record("a")
    bad = make_record("b", rounds=(good.rounds[0].__class__(**{**vars(good.rounds[0]), "retemper_E": []}),))
    with pytest.raises(ValueError, match="retemper_E"):
        store.append(KEY, [good, bad])
    assert store.size(KEY).num_records == 0


def test_two_consumers_share_the_records(store: RecordStore) -> None:
    append(store, "abcd")
    first, second = store.read_new(KEY, "one", 2), store.read_new(KEY, "two", 9)
    assert record_ids(first) + record_ids(second) == ["a", "b", "c", "d"]


def test_asking_for_no_records_gives_none(store: RecordStore) -> None:
    append(store, "a")
    assert store.read_new(KEY, "learner", 0) == []
    assert store.draw_replay(KEY, 0, seed=0) == []


def test_expired_records_are_skipped_and_counted(store: RecordStore, clock: FakeClock) -> None:
    append(store, "abc", expires_at_s=START_S + 10.0)
    append(store, "d")
    clock.advance(10.0)
    assert record_ids(store.read_new(KEY, "learner", 2)) == ["d"]
    assert store.size(KEY).num_dropped_records == 3
    assert store.size(KEY).num_pending == 1


def test_unacknowledged_records_are_read_again_by_a_consumer_that_restarts(store: RecordStore) -> None:
    append(store, "abc")
    store.ack(KEY, entry_ids(store.read_new(KEY, "learner", 1)))
    store.read_new(KEY, "learner", 1)
    claimed = store.claim(KEY, "learner", min_idle_s=3600.0)
    assert record_ids(claimed) == ["b"]
    assert record_ids(store.claim(KEY, "learner", min_idle_s=3600.0)) == ["b"]
    assert record_ids(store.read_new(KEY, "learner", 9)) == ["c"]


def test_what_another_consumer_holds_is_claimed_only_when_idle(store: RecordStore, clock: FakeClock) -> None:
    append(store, "ab")
    store.read_new(KEY, "dead", 9)
    assert store.claim(KEY, "heir", min_idle_s=3600.0) == []
    time.sleep(0.1)
    clock.advance(0.1)
    assert record_ids(store.claim(KEY, "heir", min_idle_s=0.05)) == ["a", "b"]
    assert store.claim(KEY, "dead", min_idle_s=3600.0) == []
    assert record_ids(store.claim(KEY, "heir", min_idle_s=3600.0)) == ["a", "b"]


def test_a_second_learner_takes_nothing_that_the_first_still_works_on(store: RecordStore) -> None:
    """Both start, in turn, with a claim; each record is learnt by one of them."""
    append(store, "abcd")
    first = RecordInbox(store, "revision", "one", {})
    second = RecordInbox(store, "revision", "two", {})
    first.reclaim()
    first.read([KEY], 2)
    second.reclaim()
    second.read([KEY], 9)
    held = [[record.record_id for record in inbox.records([KEY])] for inbox in (first, second)]
    assert held == [["a", "b"], ["c", "d"]]
    heir = RecordInbox(store, "revision", "two", {})
    heir.reclaim()
    assert [record.record_id for record in heir.records([KEY])] == ["c", "d"]


def test_nothing_is_claimed_from_a_stream_that_nobody_read(store: RecordStore) -> None:
    assert store.claim(KEY, "learner", 0.0) == []
    append(store, "a")
    assert store.claim(KEY, "learner", 0.0) == []


def test_pending_records_that_expire_are_not_claimed(store: RecordStore, clock: FakeClock) -> None:
    append(store, "a", expires_at_s=START_S + 10.0)
    append(store, "b")
    store.read_new(KEY, "learner", 9)
    clock.advance(11.0)
    assert record_ids(store.claim(KEY, "learner", 0.0)) == ["b"]
    assert store.size(KEY).num_dropped_records == 1


def test_acknowledged_records_are_never_delivered_again_but_stay_for_replay(store: RecordStore) -> None:
    append(store, "ab")
    deliveries = store.read_new(KEY, "learner", 9)
    assert store.size(KEY).num_pending == 2
    store.ack(KEY, entry_ids(deliveries))
    store.ack(KEY, entry_ids(deliveries))
    assert store.size(KEY).num_pending == 0
    assert store.claim(KEY, "learner", 0.0) == []
    assert store.read_new(KEY, "learner", 9) == []
    assert sorted(r.record_id for r in store.draw_replay(KEY, 9, seed=0)) == ["a", "b"]


def test_acknowledging_nothing_is_legal(store: RecordStore) -> None:
    store.ack(KEY, [])
    append(store, "a")
    store.ack(KEY, [])
    assert record_ids(store.read_new(KEY, "learner", 9)) == ["a"]


def test_the_oldest_leave_when_there_are_too_many(open_store: OpenStore) -> None:
    store = open_store(Bounds(max_records=3, max_bytes=None, max_age_s=None))
    append(store, "abcde")
    assert record_ids(store.read_new(KEY, "learner", 9)) == ["c", "d", "e"]
    assert store.size(KEY).num_records == 3
    assert store.size(KEY).num_dropped_records == 2


def test_the_oldest_leave_when_they_are_too_large(open_store: OpenStore) -> None:
    num_bytes = len(encode(make_record("a")))
    store = open_store(Bounds(max_records=None, max_bytes=2 * num_bytes + 1, max_age_s=None))
    append(store, "abc")
    assert record_ids(store.read_new(KEY, "learner", 9)) == ["b", "c"]
    assert store.size(KEY).num_bytes == 2 * num_bytes


def test_the_oldest_leave_when_they_are_too_old(open_store: OpenStore, clock: FakeClock) -> None:
    store = open_store(Bounds(max_records=None, max_bytes=None, max_age_s=60.0))
    append(store, "ab")
    clock.advance(40.0)
    append(store, "c")
    clock.advance(30.0)
    append(store, "d")
    assert record_ids(store.read_new(KEY, "learner", 9)) == ["c", "d"]


def test_an_append_removes_what_expired_wherever_it_stands(store: RecordStore, clock: FakeClock) -> None:
    append(store, "a")
    append(store, "b", expires_at_s=START_S + 10.0)
    append(store, "c")
    clock.advance(10.0)
    append(store, "d")
    assert store.size(KEY).num_records == 3
    assert record_ids(store.read_new(KEY, "learner", 9)) == ["a", "c", "d"]


def test_only_what_nobody_acknowledged_counts_as_dropped(open_store: OpenStore) -> None:
    store = open_store(Bounds(max_records=3, max_bytes=None, max_age_s=None))
    append(store, "abc")
    first = store.read_new(KEY, "learner", 2)
    store.ack(KEY, entry_ids(first)[:1])
    append(store, "def")
    size = store.size(KEY)
    assert size.num_dropped_records == 2  # b was pending, c was never read; a was used
    assert size.num_pending == 0
    assert store.claim(KEY, "learner", 0.0) == []
    assert record_ids(store.read_new(KEY, "learner", 9)) == ["d", "e", "f"]


def test_a_trimmed_record_may_be_appended_again(open_store: OpenStore) -> None:
    store = open_store(Bounds(max_records=1, max_bytes=None, max_age_s=None))
    append(store, "ab")
    assert append(store, "a") == 1
    assert record_ids(store.read_new(KEY, "learner", 9)) == ["a"]


def test_sizes_return_to_zero_with_the_records(store: RecordStore, clock: FakeClock) -> None:
    append(store, "abc", num_rounds=5)
    assert store.size(KEY).num_bytes == 3 * len(encode(make_record("a", num_rounds=5)))
    clock.advance(4000.0)
    append(store, [])
    size = store.size(KEY)
    assert (size.num_records, size.num_bytes, size.num_pending) == (0, 0, 0)


def test_what_expired_is_deleted_without_an_append(store: RecordStore, clock: FakeClock) -> None:
    append(store, ["early"], expires_at_s=clock() + 10)
    append(store, ["late"], expires_at_s=clock() + 100)
    clock.advance(11)
    assert store.size(KEY).num_records == 2, "nobody has looked"
    store.drop_expired(KEY)
    assert (store.size(KEY).num_records, store.size(KEY).num_dropped_records) == (1, 1)
    store.drop_expired(StreamKey("revision", "nowhere"))
    known = store.keys()
    assert StreamKey("revision", "nowhere") not in known


def test_a_draw_takes_read_and_unread_but_no_expired_records(store: RecordStore, clock: FakeClock) -> None:
    append(store, "ab")
    append(store, "cd", expires_at_s=START_S + 10.0)
    store.read_new(KEY, "learner", 1)
    assert sorted(r.record_id for r in store.draw_replay(KEY, 9, seed=1)) == ["a", "b", "c", "d"]
    clock.advance(10.0)
    assert sorted(r.record_id for r in store.draw_replay(KEY, 9, seed=1)) == ["a", "b"]
    assert sorted(record_ids(store.read_new(KEY, "learner", 9))) == ["b"]


def test_a_draw_is_repeatable_by_its_seed_and_without_replacement(store: RecordStore) -> None:
    append(store, map(str, range(50)))
    draws = [[r.record_id for r in store.draw_replay(KEY, 10, seed=seed)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(set(draw)) == 10 for draw in draws)


def uniformity_p_value(counts: Sequence[int], num_drawn: int) -> float:
    """Chi-square for draws without replacement: the plain statistic times (N - 1) / (N - n)."""
    population, expected = len(counts), sum(counts) / len(counts)
    statistic = sum((count - expected) ** 2 / expected for count in counts)
    return float(stats.chi2.sf(statistic * (population - 1) / (population - num_drawn), population - 1))


def test_a_draw_is_uniform(store: RecordStore) -> None:
    """False-alarm rate 1e-4 over the choice of seeds; a draw that favours one half 5:3 fails."""
    names = [f"{i:02d}" for i in range(40)]
    for i, name in enumerate(names):
        append(store, [name], expires_at_s=START_S + 100.0 + (i * 7) % 40)
    counts = Counter(r.record_id for seed in range(300) for r in store.draw_replay(KEY, 8, seed))
    assert sum(counts.values()) == 300 * 8
    assert uniformity_p_value([counts[name] for name in names], 8) > 1e-4
    assert uniformity_p_value([45] * 20 + [75] * 20, 8) < 1e-4


def test_streams_are_apart(store: RecordStore) -> None:
    assert store.keys() == []
    keys = {StreamKey(revision, route) for revision in ("r1", "r2") for route in ("a{b}", "ä:ö")}
    for key in keys:
        store.append(key, [make_record(f"{key.target_revision}{key.route}")])
    assert set(store.keys()) == keys
    for key in keys:
        assert record_ids(store.read_new(key, "learner", 9)) == [f"{key.target_revision}{key.route}"]


def tagged(store: RecordStore, *routes: str, revision: str = "revision") -> None:
    """A record of each route, none of which has a draft of its own."""
    for route in routes:
        record = borrowed(f"{revision}-{route}", route=route, target_revision=revision)
        store.append(StreamKey(revision, route), [record])


def open_routes(store: RecordStore, revision: str = "revision") -> list[str]:
    found = store.keys()
    return sorted(key.route for key in found if key.target_revision == revision)


def test_records_of_one_route_too_many_go_to_default_and_none_is_lost(open_store: OpenStore) -> None:
    store = open_store(Bounds(max_routes=3))
    tagged(store, *(f"tag-{number:03d}" for number in range(300)))
    assert open_routes(store) == ["default", "tag-000", "tag-001", "tag-002"]
    moved = [delivery.record for delivery in store.read_new(KEY, "learner", 999)]
    assert [record.record_id for record in moved] == [
        f"revision-tag-{number:03d}" for number in range(3, 300)
    ]
    assert {record.route for record in moved} == {"default"}
    assert store.num_rerouted_records == 297


def test_a_record_that_was_rerouted_is_stored_and_counted_once(open_store: OpenStore) -> None:
    store = open_store(Bounds(max_routes=1))
    tagged(store, "a", "b", "b", "a")
    assert (store.size(KEY).num_records, store.num_rerouted_records) == (1, 1)
    assert store.size(StreamKey("revision", "a")).num_records == 1


def test_default_is_always_open_and_counts_for_nothing(open_store: OpenStore) -> None:
    store = open_store(Bounds(max_routes=1))
    tagged(store, "a", "default", "b")
    assert open_routes(store) == ["a", "default"]
    store = open_store(Bounds(max_routes=0))
    tagged(store, "other", revision="third")
    assert open_routes(store, "third") == ["default"]


def test_each_target_has_streams_of_its_own(open_store: OpenStore) -> None:
    store = open_store(Bounds(max_routes=1))
    tagged(store, "a", "b")
    tagged(store, "b", "a", revision="other")
    assert (open_routes(store), open_routes(store, "other")) == (["a", "default"], ["b", "default"])


def test_a_route_with_a_draft_of_its_own_always_has_a_stream(open_store: OpenStore) -> None:
    """Its records name versions of that draft, which would be taken for `default`'s."""
    store = open_store(Bounds(max_routes=1))
    tagged(store, "a", "b")
    store.append(StreamKey("revision", "own"), [make_record("x", route="own")])
    assert open_routes(store) == ["a", "default", "own"]
    assert store.num_rerouted_records == 1


def test_a_record_of_an_isolated_route_never_goes_to_default(open_store: OpenStore) -> None:
    """`default`'s draft serves everybody. Without isolation the record goes there, as `b` does."""
    store = open_store(Bounds(max_routes=1))
    tagged(store, "a", "b")
    store.append(StreamKey("revision", "own"), [borrowed("x", route="own", isolated=True)])
    assert open_routes(store) == ["a", "default", "own"]
    [kept] = store.read_new(StreamKey("revision", "own"), "learner", 9)
    assert kept.record.isolated


def test_a_stream_that_nobody_appends_to_is_forgotten_and_makes_room(
    open_store: OpenStore, clock: FakeClock
) -> None:
    store = open_store(Bounds(max_age_s=60.0, max_routes=1))
    tagged(store, "a")
    clock.advance(50.0)
    tagged(store, "a", "default")
    clock.advance(50.0)
    assert open_routes(store) == ["a", "default"]
    clock.advance(11.0)
    assert store.keys() == []
    tagged(store, "b")
    assert open_routes(store) == ["b"]
    assert store.num_rerouted_records == 0


def test_a_stream_that_does_not_exist_is_empty(store: RecordStore) -> None:
    assert store.read_new(KEY, "learner", 9) == []
    assert store.draw_replay(KEY, 9, seed=0) == []
    assert store.size(KEY).num_records == 0
    assert store.keys() == []


def test_threads_that_append_and_read_lose_and_repeat_nothing(store: RecordStore) -> None:
    def write(writer: int) -> None:
        for i in range(20):
            append(store, [f"shared-{i}", f"{writer}-{i}"])

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in writers:
        thread.start()
    read: list[str] = []
    deadline_s = time.monotonic() + 20.0
    while len(read) < 80 and time.monotonic() < deadline_s:
        read += record_ids(store.read_new(KEY, "learner", 7))
    for thread in writers:
        thread.join()
    assert len(read) == len(set(read)) == 80
