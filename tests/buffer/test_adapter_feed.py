"""The contract of AdapterFeed, sentence by sentence, on every implementation."""

import threading
import time

import pytest

from buffer.errors import UnknownVersionError, VersionConflictError
from buffer.records import AdapterEvent, DrafterCounts, PassCosts, ServingStatus
from buffer.store import AdapterFeed
from tests.buffer.samples import START_S, STATUS_TTL_S, FakeClock, make_manifest, make_table

ROUTE = "default"


def publish(feed: AdapterFeed, *versions: int) -> None:
    """Each judged against what serves."""
    for version in versions:
        feed.publish(make_manifest(version, serving(feed)), f"weights {version}".encode())


def serving(feed: AdapterFeed) -> int:
    latest = feed.latest(ROUTE)
    return latest.draft_version if latest else 0


def kept(feed: AdapterFeed) -> list[int]:
    return [manifest.draft_version for manifest in feed.versions(ROUTE)]


def last_event(feed: AdapterFeed) -> AdapterEvent:
    return feed.history(ROUTE)[-1]


def test_a_route_begins_on_the_floor(feed: AdapterFeed) -> None:
    assert feed.latest(ROUTE) is None
    assert feed.last_version(ROUTE) == 0
    assert feed.versions(ROUTE) == []
    assert feed.history(ROUTE) == []
    assert feed.routes() == []
    assert feed.pinned(ROUTE) is None


def test_what_is_published_serves_and_comes_back_whole(feed: AdapterFeed) -> None:
    weights = bytes(range(256)) * 4096
    feed.publish(make_manifest(1), weights)
    assert feed.latest(ROUTE) == feed.manifest(ROUTE, 1) == make_manifest(1)
    assert feed.weights(ROUTE, 1) == weights
    assert feed.last_version(ROUTE) == 1


def test_large_adapters_are_fewer_and_a_rollback_finds_its_own(feed: AdapterFeed) -> None:
    """Three versions of 3,000 bytes together are kept, and the parents of what serves in any case."""
    for version in range(1, 5):
        feed.publish(make_manifest(version, version - 1), bytes(1_000))
    assert kept(feed) == [2, 3, 4]
    for version in range(5, 8):
        feed.publish(make_manifest(version, version - 1), bytes(5_000))
    assert kept(feed) == [6, 7]
    assert feed.rollback(ROUTE, "worse") == 6
    assert feed.weights(ROUTE, 6) == bytes(5_000)


def test_a_publish_is_a_line_of_the_history(feed: AdapterFeed, clock: FakeClock) -> None:
    clock.advance(5.0)
    publish(feed, 1)
    event = last_event(feed)
    assert (event.kind, event.draft_version, event.at_s) == ("promoted", 1, START_S + 5.0)
    assert event.evidence == {"gain": 0.25}


@pytest.mark.parametrize("version", [0, 1, 4, 5])
def test_a_version_must_exceed_every_earlier_one(feed: AdapterFeed, version: int) -> None:
    publish(feed, 2, 5)
    feed.rollback(ROUTE, "worse")
    before = feed.history(ROUTE)
    with pytest.raises(VersionConflictError, match="does not exceed 5"):
        feed.publish(make_manifest(version), b"other")
    assert serving(feed) == 2
    assert kept(feed) == [2, 5]
    assert feed.weights(ROUTE, 5) == b"weights 5"
    assert feed.history(ROUTE) == before


def test_versions_may_skip_numbers(feed: AdapterFeed) -> None:
    """A learner counts in its checkpoint, and may know more than a store that came back empty."""
    publish(feed, 7, 12)
    assert feed.last_version(ROUTE) == 12


def test_the_last_versions_are_kept(feed: AdapterFeed) -> None:
    publish(feed, 1, 2, 3, 4, 5)
    assert kept(feed) == [3, 4, 5]
    for forgotten in (1, 2):
        with pytest.raises(UnknownVersionError):
            feed.weights(ROUTE, forgotten)
        with pytest.raises(UnknownVersionError):
            feed.manifest(ROUTE, forgotten)


def test_what_serves_and_its_parent_are_always_kept(feed: AdapterFeed) -> None:
    publish(feed, 1, 2)
    feed.pin(ROUTE, 2, "until Monday")
    for version in (3, 4, 5, 6):
        feed.publish(make_manifest(version, parent_version=1), b"")
    assert kept(feed) == [1, 2, 4, 5, 6]
    assert feed.weights(ROUTE, 2) == b"weights 2"


def test_the_floor_is_no_adapter(feed: AdapterFeed) -> None:
    publish(feed, 1)
    for version in (0, 2):
        with pytest.raises(UnknownVersionError, match="nothing changed"):
            feed.manifest(ROUTE, version)
        with pytest.raises(UnknownVersionError):
            feed.weights(ROUTE, version)


def test_a_rollback_goes_to_the_parent_then_to_the_floor_and_stays_there(feed: AdapterFeed) -> None:
    publish(feed, 1, 2)
    assert [feed.rollback(ROUTE, "worse") for _ in range(3)] == [1, 0, 0]
    assert feed.latest(ROUTE) is None
    assert feed.last_version(ROUTE) == 2


def test_a_rollback_names_what_serves_afterwards(feed: AdapterFeed) -> None:
    publish(feed, 1, 2)
    feed.rollback(ROUTE, "live acceptance fell")
    event = last_event(feed)
    assert (event.kind, event.draft_version, event.reason) == ("rolled_back", 1, "live acceptance fell")


def test_a_rollback_may_name_any_kept_version_or_the_floor(feed: AdapterFeed) -> None:
    publish(feed, 1, 2, 3)
    assert feed.rollback(ROUTE, "by hand", to_version=1) == 1
    assert feed.rollback(ROUTE, "by hand", to_version=3) == 3
    assert feed.rollback(ROUTE, "by hand", to_version=0) == 0
    before = feed.history(ROUTE)
    with pytest.raises(UnknownVersionError):
        feed.rollback(ROUTE, "by hand", to_version=9)
    assert feed.history(ROUTE) == before


def test_a_rollback_whose_parent_is_gone_goes_to_the_floor(feed: AdapterFeed) -> None:
    publish(feed, 1, 2, 3, 4, 5)
    assert [feed.rollback(ROUTE, "worse") for _ in range(3)] == [4, 3, 0]


def test_after_a_rollback_the_next_publish_serves(feed: AdapterFeed) -> None:
    publish(feed, 1, 2)
    feed.rollback(ROUTE, "worse")
    publish(feed, 3)
    assert serving(feed) == 3
    assert feed.manifest(ROUTE, 3).parent_version == 1
    assert feed.rollback(ROUTE, "worse") == 1


@pytest.mark.parametrize("pinned", [0, 1])
def test_a_pin_serves_whatever_is_published_until_unpinned(feed: AdapterFeed, pinned: int) -> None:
    publish(feed, 1, 2)
    feed.pin(ROUTE, pinned, "compare")
    assert feed.pinned(ROUTE) == pinned
    assert (last_event(feed).kind, last_event(feed).draft_version) == ("pinned", pinned)
    feed.publish(make_manifest(3, 2), b"")
    assert serving(feed) == pinned
    assert feed.unpin(ROUTE, "done") == 3
    assert serving(feed) == 3
    assert feed.pinned(ROUTE) is None
    assert (last_event(feed).kind, last_event(feed).draft_version) == ("unpinned", 3)


def test_a_pin_outlasts_a_rollback(feed: AdapterFeed) -> None:
    publish(feed, 1, 2, 3)
    feed.pin(ROUTE, 1, "compare")
    assert feed.rollback(ROUTE, "worse") == 1
    assert last_event(feed).draft_version == 1
    assert feed.unpin(ROUTE, "done") == 2


def test_only_a_kept_version_can_be_pinned(feed: AdapterFeed) -> None:
    publish(feed, 1)
    with pytest.raises(UnknownVersionError):
        feed.pin(ROUTE, 2, "typo")
    assert feed.pinned(ROUTE) is None


def test_unpinning_what_is_not_pinned_changes_nothing(feed: AdapterFeed) -> None:
    publish(feed, 1)
    assert feed.unpin(ROUTE, "habit") == serving(feed) == 1


def seen_by(feed: AdapterFeed, *replica_ids: str) -> list[int]:
    found = [feed.latest(ROUTE, replica_id) for replica_id in replica_ids]
    return [manifest.draft_version if manifest else 0 for manifest in found]


def report(feed: AdapterFeed, *replica_ids: str) -> None:
    for replica_id in replica_ids:
        feed.report(ServingStatus(replica_id, START_S, {}, ()))


def test_on_trial_one_replica_serves_it_until_it_is_confirmed(feed: AdapterFeed) -> None:
    report(feed, "r1", "r2", "r3")
    publish(feed, 1)
    assert seen_by(feed, "r1", "r2", "r3") == [1, 1, 1]
    feed.publish(make_manifest(2, 1), b"weights 2", on_trial=True)
    assert feed.is_on_trial(ROUTE) and serving(feed) == 2
    assert seen_by(feed, "r1", "r2", "r3") == [2, 1, 1]
    assert last_event(feed).reason.startswith("on one replica first")
    feed.confirm(ROUTE, "32 records")
    assert seen_by(feed, "r1", "r2", "r3") == [2, 2, 2]
    assert (last_event(feed).kind, last_event(feed).draft_version) == ("confirmed", 2)
    feed.confirm(ROUTE, "again")
    assert (last_event(feed).reason, feed.is_on_trial(ROUTE)) == ("32 records", False)


def test_a_trial_ends_with_a_rollback_and_rests_under_a_pin(feed: AdapterFeed) -> None:
    report(feed, "r1", "r2")
    publish(feed, 1)
    feed.publish(make_manifest(2, 1), b"", on_trial=True)
    feed.pin(ROUTE, 2, "all of them")
    assert seen_by(feed, "r1", "r2") == [2, 2]
    feed.unpin(ROUTE, "enough")
    assert seen_by(feed, "r1", "r2") == [2, 1]
    feed.rollback(ROUTE, "worse")
    assert seen_by(feed, "r1", "r2") == [1, 1] and not feed.is_on_trial(ROUTE)


def test_a_canary_that_is_gone_is_replaced(feed: AdapterFeed, clock: FakeClock) -> None:
    report(feed, "r2")
    feed.publish(make_manifest(1), b"", on_trial=True)
    assert seen_by(feed, "r1", "r2", "r3") == [1, 1, 0], "r1 is about to report"
    report(feed, "r1")
    assert seen_by(feed, "r1", "r2") == [1, 0]
    time.sleep(STATUS_TTL_S + 0.2)
    clock.advance(STATUS_TTL_S + 0.2)
    report(feed, "r2")
    assert seen_by(feed, "r2", "r3") == [1, 0]


def test_what_serves_beside_a_canary_is_kept_however_many_trials_follow(feed: AdapterFeed) -> None:
    report(feed, "r1", "r2")
    publish(feed, 1)
    for version in range(2, 9):
        feed.publish(make_manifest(version, version - 1), b"", on_trial=True)
    assert seen_by(feed, "r1", "r2") == [8, 1]
    assert feed.weights(ROUTE, 1) == b"weights 1"


def test_history_is_oldest_first_and_bounded(feed: AdapterFeed) -> None:
    for i in range(60):
        feed.add_event(AdapterEvent("refused", ROUTE, i, f"reason {i}", START_S, {"gain": -0.1}))
    assert [event.draft_version for event in feed.history(ROUTE)] == list(range(10, 60))
    assert [event.draft_version for event in feed.history(ROUTE, max_events=2)] == [58, 59]
    assert feed.history(ROUTE, max_events=0) == []
    assert feed.history(ROUTE)[-1] == AdapterEvent("refused", ROUTE, 59, "reason 59", START_S, {"gain": -0.1})


def test_routes_are_apart(feed: AdapterFeed) -> None:
    for route in ("a{b}", "ä:ö", "c"):
        feed.publish(make_manifest(1, route=route), route.encode())
    feed.add_event(AdapterEvent("refused", "d", 1, "too few records", START_S))
    feed.rollback("c", "worse")
    assert feed.routes() == sorted(["a{b}", "ä:ö", "c", "d"])
    assert feed.weights("ä:ö", 1) == "ä:ö".encode()
    assert feed.latest("a{b}") == make_manifest(1, route="a{b}")
    assert feed.latest("c") is None


def test_a_refused_publish_leaves_no_route(feed: AdapterFeed) -> None:
    with pytest.raises(VersionConflictError):
        feed.publish(make_manifest(0), b"")
    assert feed.routes() == []


def test_of_many_publishers_of_one_version_exactly_one_wins(feed: AdapterFeed) -> None:
    outcomes: list[int | None] = []

    def compete(number: int) -> None:
        try:
            feed.publish(make_manifest(1), f"publisher {number}".encode())
            outcomes.append(number)
        except VersionConflictError:
            outcomes.append(None)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [number for number in outcomes if number is not None]
    assert len(outcomes) == 8
    assert feed.weights(ROUTE, 1) == f"publisher {winner}".encode()
    assert len(feed.history(ROUTE)) == 1


def test_readers_never_see_a_version_without_its_adapter(feed: AdapterFeed) -> None:
    stop, failures = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            version = serving(feed)
            try:
                if version and feed.weights(ROUTE, version) != b"%d" % version:
                    failures.append(f"{version} has other weights")
            except UnknownVersionError:
                if serving(feed) <= version:  # not just a reader slower than three publishes
                    failures.append(f"{version} served without weights")

    reader = threading.Thread(target=read)
    reader.start()
    for version in range(1, 40):
        feed.publish(make_manifest(version, version - 1), b"%d" % version)
    stop.set()
    reader.join()
    assert failures == []


def test_prompts_are_routed_by_no_table_until_one_is_put(feed: AdapterFeed) -> None:
    assert feed.route_table() is None


def test_the_last_route_table_comes_back_whole(feed: AdapterFeed) -> None:
    feed.put_route_table(make_table("chat"))
    table = make_table("sql", "code", updated_at_s=START_S + 1.0, min_similarity=0.25)
    feed.put_route_table(table)
    found = feed.route_table()
    assert found is not None
    assert (found.routes, found.target_revision) == (("sql", "code"), "revision")
    assert (found.updated_at_s, found.min_similarity) == (START_S + 1.0, 0.25)
    assert (found.mean_H.tobytes(), found.centroids_RH.tobytes()) == (
        table.mean_H.tobytes(),
        table.centroids_RH.tobytes(),
    )


def test_a_route_table_opens_no_route(feed: AdapterFeed) -> None:
    feed.put_route_table(make_table("sql"))
    assert feed.routes() == []


def status(replica_id: str, at_s: float = START_S) -> ServingStatus:
    return ServingStatus(
        replica_id=replica_id,
        at_s=at_s,
        serving_versions={ROUTE: 2},
        counts=(DrafterCounts("draft", ROUTE, 2, 1, 2, 3, 4, 5), DrafterCounts("ngram", ROUTE, None)),
        costs=PassCosts((1, 8), (1, 5), ((0.1, 0.2), (0.3, 0.4)), (0.01, 0.02), (0.0, 0.01)),
    )


def test_a_replica_replaces_its_own_status(feed: AdapterFeed) -> None:
    feed.report(status("one"))
    feed.report(status("two"))
    feed.report(status("one", START_S + 1.0))
    assert feed.statuses() == [status("one", START_S + 1.0), status("two")]


def test_a_status_that_is_not_renewed_expires(feed: AdapterFeed, clock: FakeClock) -> None:
    feed.report(status("one"))
    time.sleep(STATUS_TTL_S + 0.2)
    clock.advance(STATUS_TTL_S + 0.2)
    feed.report(status("two"))
    assert feed.statuses() == [status("two")]
