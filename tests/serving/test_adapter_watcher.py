"""A replica follows the feed: good adapters are swapped in, bad ones refused, its absence costs nothing."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from buffer.errors import StoreUnavailableError
from buffer.memory_store import MemoryAdapterFeed
from buffer.records import AdapterManifest, ServingStatus
from buffer.store import AdapterFeed
from serving.adapter_watcher import AdapterWatcher
from serving.engine import SamplingParams
from serving.local import LocalEngine, load_engine
from serving.options import EngineOptions
from serving.status import serving_status
from tests.support.tiny_adapters import tiny_adapter


class AbsentFeed(MemoryAdapterFeed):
    """A feed whose server is away while `absent`."""

    absent = True

    def latest(self, route: str, replica_id: str | None = None) -> AdapterManifest | None:
        if self.absent:
            raise StoreUnavailableError("nobody answers; nothing was read")
        return super().latest(route, replica_id)

    def report(self, status: ServingStatus) -> None:
        if self.absent:
            raise StoreUnavailableError("nobody answers; nothing was stored")
        super().report(status)


@pytest.fixture
def engine(tiny_pair: tuple[str, str]) -> Iterator[LocalEngine]:
    with load_engine(
        *tiny_pair, options=EngineOptions(num_slots=2, max_seq_len=128, num_draft_tokens=3)
    ) as running:
        yield running


def watch(engine: LocalEngine, feed: AdapterFeed, replica_id: str = "r0") -> AdapterWatcher:
    def status() -> ServingStatus:
        return serving_status(
            engine,
            replica_id=replica_id,
            at_s=time.time(),
            num_dropped_records=3,
            last_error=watcher.last_error,
        )

    watcher = AdapterWatcher(
        engine.drafts,
        feed,
        replica_id=replica_id,
        status=status,
        watch_interval_s=0.01,
        status_interval_s=0.02,
    )
    return watcher


def publish(engine: LocalEngine, feed: AdapterFeed, draft_version: int) -> AdapterManifest:
    manifest, weights = tiny_adapter(
        engine.pair.draft_id,
        draft_version=draft_version,
        target_revision=engine.pair.target_revision,
        parent_version=draft_version - 1,
    )
    feed.publish(manifest, weights)
    return manifest


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


def test_a_published_adapter_serves_soon_and_a_rollback_leads_to_the_floor(engine: LocalEngine) -> None:
    feed = MemoryAdapterFeed()
    watcher = watch(engine, feed)
    watcher.start()
    publish(engine, feed, 1)
    wait_for(lambda: engine.draft_version == 1)
    feed.rollback("default", "a test")
    wait_for(lambda: engine.draft_version == 0)
    watcher.close()
    assert watcher.served_version == 0


def test_text_does_not_change_while_drafts_are_swapped_under_load(engine: LocalEngine) -> None:
    feed = MemoryAdapterFeed()
    watcher = watch(engine, feed)
    greedy = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    [alone] = engine.generate([[5, 6, 7]], greedy)
    stop = threading.Event()
    texts: list[list[int]] = []

    def load() -> None:
        while not stop.is_set():
            texts.append(engine.generate([[5, 6, 7]], greedy)[0].output_token_ids)

    thread = threading.Thread(target=load)
    thread.start()
    for version in (1, 2, 3):
        publish(engine, feed, version)
        watcher.follow()
    stop.set()
    thread.join()
    assert engine.draft_version == 3
    assert texts and all(text == alone.output_token_ids for text in texts)


def test_a_restarted_replica_serves_the_latest_before_it_is_ready(engine: LocalEngine) -> None:
    feed = MemoryAdapterFeed()
    publish(engine, feed, 1)
    publish(engine, feed, 2)
    assert watch(engine, feed).serve_latest_before_ready(timeout_s=5.0) == 2
    assert engine.draft_version == 2
    assert feed.statuses()[0].serving_versions == {"default": 2}


def test_a_replica_boots_on_the_floor_when_the_feed_is_absent_and_follows_when_it_comes(
    engine: LocalEngine,
) -> None:
    feed = AbsentFeed()
    publish(engine, feed, 1)
    watcher = watch(engine, feed)
    began_s = time.monotonic()
    assert watcher.serve_latest_before_ready(timeout_s=0.1) == 0
    assert time.monotonic() - began_s < 2.0
    assert "nobody answers" in watcher.last_error
    watcher.start()
    feed.absent = False
    wait_for(lambda: engine.draft_version == 1)
    wait_for(lambda: watcher.last_error == "")
    watcher.close()


def test_what_serves_goes_on_serving_when_the_feed_goes_away_or_forgets(engine: LocalEngine) -> None:
    feed = AbsentFeed()
    feed.absent = False
    publish(engine, feed, 1)
    watcher = watch(engine, feed)
    watcher.follow()
    feed.absent = True
    with pytest.raises(StoreUnavailableError):
        watcher.follow()
    assert engine.draft_version == 1
    forgetful = watch(engine, feed)
    forgetful._followed = watcher._followed
    forgetful._feed = MemoryAdapterFeed()
    forgetful.follow()
    assert engine.draft_version == 1


@pytest.mark.parametrize(
    "change",
    [{"target_revision": "another"}, {"sha256": "0" * 64}, {"adapter_config_json": "{}"}],
    ids=["foreign", "corrupt", "poisoned"],
)
def test_a_bad_adapter_is_refused_once_and_the_incumbent_stays(
    engine: LocalEngine, change: dict[str, str]
) -> None:
    feed = MemoryAdapterFeed()
    publish(engine, feed, 1)
    watcher = watch(engine, feed)
    watcher.follow()
    manifest, weights = tiny_adapter(
        engine.pair.draft_id, draft_version=2, target_revision=engine.pair.target_revision
    )
    feed.publish(dataclasses.replace(manifest, **change), weights)
    watcher.follow()
    watcher.follow()
    assert engine.draft_version == 1
    rejected = [event for event in feed.history("default") if event.kind == "rejected_by_replica"]
    assert [event.draft_version for event in rejected] == [2]
    assert "r0" in rejected[0].reason
    assert "draft_version=2" in watcher.last_error
    publish(engine, feed, 3)
    watcher.follow()
    assert (engine.draft_version, watcher.last_error) == (3, "")


def test_a_reused_version_number_is_told_apart_by_its_weights(engine: LocalEngine) -> None:
    first, second = MemoryAdapterFeed(), MemoryAdapterFeed()
    publish(engine, first, 1)
    watcher = watch(engine, first)
    watcher.follow()
    manifest, weights = tiny_adapter(
        engine.pair.draft_id, draft_version=1, target_revision=engine.pair.target_revision, size=0.1
    )
    second.publish(manifest, weights)
    watcher._feed = second
    watcher.follow()
    assert engine.stats().num_swaps == 2


def test_the_status_tells_counts_costs_and_drops(engine: LocalEngine) -> None:
    feed = MemoryAdapterFeed()
    engine.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True))
    watcher = watch(engine, feed)
    watcher.start()
    wait_for(lambda: bool(feed.statuses()))
    watcher.close()
    [status] = feed.statuses()
    assert (status.replica_id, status.num_dropped_records) == ("r0", 3)
    [counts] = status.counts
    assert (counts.drafter_id, counts.route, counts.draft_version) == ("draft", "default", 0)
    assert counts.num_output_tokens == 10
    assert status.costs is not None
    assert len(status.costs.target_pass_s) == len(status.costs.batch_sizes)
    assert all(len(row) == len(status.costs.token_counts) for row in status.costs.target_pass_s)
    assert status.num_draft_tokens == 3


def test_a_replica_without_a_draft_only_reports(tiny_pair: tuple[str, str]) -> None:
    feed = MemoryAdapterFeed()
    with load_engine(tiny_pair[0], options=EngineOptions(num_slots=1, max_seq_len=64)) as engine:
        watcher = watch(engine, feed)
        assert watcher.serve_latest_before_ready(timeout_s=1.0) == 0
    assert feed.statuses()[0].replica_id == "r0"
