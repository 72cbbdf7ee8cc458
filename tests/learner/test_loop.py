"""The learner's whole life over the in-memory store and feed."""

import hashlib
import shutil
import threading
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from buffer.administration import DirectAdministration
from buffer.audit import Caller
from buffer.controls import Controls
from buffer.errors import StoreUnavailableError
from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.records import (
    AdapterEvent,
    AdapterManifest,
    GenerationRecord,
    RecordSampling,
    ServingStatus,
)
from buffer.redis_server import EmbeddedRedis
from buffer.redis_store import RedisRecordStore
from buffer.store import Delivery, RecordStore, StreamKey
from learner import checkpoint
from learner.draft import TrainableDraft, build_draft, export_weights, import_weights
from learner.loop import Learner
from learner.tracking.mlflow_tracker import NullTracker
from tests.support.record_factory import RecordFactory
from tests.support.tiny_learner import MODULES, quick_settings, tiny_draft, tiny_pair

NOW_S = 2_000.0
KEY = StreamKey("target-1", "default")


SAMPLING = RecordSampling(temperature=0.7)
Traffic = list[list[GenerationRecord]]
"""Batches of 30 records."""


class DiaryTracker(NullTracker):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.decisions: list[str] = []
        self.metrics: dict[str, float] = {}
        self.serving: list[tuple[int, int, str]] = []
        self.adapters: dict[int, str] = {}
        self.steps: list[int] = []

    def log_metrics(self, route: str, metrics: Mapping[str, float], num_records_seen: int) -> None:
        self.metrics |= metrics
        self.steps.append(num_records_seen)

    def log_decision(
        self, route: str, kind: str, draft_version: int, reason: str, num_records_seen: int
    ) -> None:
        self.decisions.append(f"{kind}: {reason}")

    def log_adapter(self, manifest: AdapterManifest, weights: bytes, reason: str) -> None:
        self.adapters[manifest.draft_version] = reason

    def mark_serving(self, route: str, draft_version: int, previous_version: int, reason: str) -> None:
        self.serving.append((draft_version, previous_version, reason))


class FlakyStore(MemoryRecordStore):
    """A real store behind a connection that fails every other call."""

    num_calls = 0

    def read_new(self, key: StreamKey, consumer: str, max_records: int) -> list[Delivery]:
        self._fail_every_other_time()
        return super().read_new(key, consumer, max_records)

    def draw_replay(self, key: StreamKey, num_records: int, seed: int) -> list[GenerationRecord]:
        self._fail_every_other_time()
        return super().draw_replay(key, num_records, seed)

    def ack(self, key: StreamKey, entry_ids: object) -> None:
        self._fail_every_other_time()
        super().ack(key, entry_ids)  # type: ignore[arg-type]

    def _fail_every_other_time(self) -> None:
        self.num_calls += 1
        if self.num_calls % 2:
            raise StoreUnavailableError("the store is away")


class LoopTestbed:
    """Store, feed, tracker and a learner that can be killed and built again."""

    def __init__(self, folder: Path, store: RecordStore | None = None) -> None:
        self.folder = folder
        self.store = store or MemoryRecordStore(clock=lambda: NOW_S)
        self.feed = MemoryAdapterFeed(clock=lambda: NOW_S)
        self.tracker = DiaryTracker()
        self.learner = self.build()

    def build(self, draft: TrainableDraft | None = None, **changes: object) -> Learner:
        settings = quick_settings(checkpoint_folder=str(self.folder), **changes)
        return Learner(
            draft or tiny_draft(),
            self.store,
            self.feed,
            settings,
            target_revision="target-1",
            tracker_for=lambda run_id: self.tracker,
            now_s=lambda: NOW_S,
        )

    def serve(self, records: list[GenerationRecord]) -> None:
        self.store.append(KEY, records)

    def learn_until_promoted(self, traffic: Traffic, least_gain: float = 0.0) -> AdapterManifest:
        """Cycle after cycle, until what serves gained so much on the floor."""
        for records in traffic:
            self.serve(records)
            assert self.learner.run_cycle()
            manifest = self.feed.latest("default")
            if manifest and gain(manifest) > least_gain:
                return manifest
        raise AssertionError(f"nothing was promoted: {self.learner.snapshot()}")


def gain(manifest: AdapterManifest) -> float:
    return manifest.evidence["acceptance_candidate"] - manifest.evidence["acceptance_floor"]


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    factory = RecordFactory(*tiny_pair(), clock_s=NOW_S)
    return [factory.records(30, SAMPLING, max_tokens=6) for _ in range(8)]


@pytest.fixture
def testbed(tmp_path: Path) -> LoopTestbed:
    return LoopTestbed(tmp_path)


def test_records_become_a_promoted_adapter_with_evidence_and_history(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    assert not testbed.learner.run_cycle()
    manifest = testbed.learn_until_promoted(traffic)
    assert (manifest.draft_version, manifest.parent_version) == (1, 0)
    assert manifest.evidence["acceptance_candidate"] > manifest.evidence["acceptance_incumbent"]
    assert manifest.target_revision == "target-1"
    assert manifest.num_bytes == len(testbed.feed.weights("default", 1))
    assert testbed.feed.history("default")[-1].kind == "promoted"
    assert testbed.tracker.decisions[-1].startswith("promoted: acceptance")
    assert testbed.tracker.serving[-1] == (1, 0, testbed.tracker.decisions[-1])
    assert testbed.tracker.steps[-1] == manifest.num_records_seen  # this cycle's records among them
    assert testbed.tracker.metrics["loss"] > 0
    assert testbed.store.size(KEY).num_pending == 0
    facts = testbed.learner.snapshot()
    assert facts["draft_version"] == 1
    assert facts["num_records_seen"] % 30 == 0
    assert facts["last_decision"]["kind"] == "promoted"


def test_too_few_held_out_records_are_a_refusal_in_the_history(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    testbed.learner = testbed.build(gate_min_records=1000)
    testbed.serve(traffic[0])
    assert testbed.learner.run_cycle()
    event = testbed.feed.history("default")[-1]
    assert event.kind == "refused"
    assert "1000 are needed" in event.reason
    assert testbed.feed.latest("default") is None


def test_a_killed_learner_resumes_and_repeats_no_acked_work(testbed: LoopTestbed, traffic: Traffic) -> None:
    testbed.learn_until_promoted(traffic)
    before = testbed.learner.snapshot()
    testbed.learner = testbed.build()
    assert not testbed.learner.run_cycle()
    after = testbed.learner.snapshot()
    for name in ("num_steps", "num_records_seen", "last_version", "draft_version"):
        assert after[name] == before[name]
    assert after["num_held_out_records"] > 0


def test_what_was_checkpointed_but_not_acked_is_acked_and_not_relearnt(
    testbed: LoopTestbed, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def die(*_: object) -> None:
        raise Killed

    testbed.serve(traffic[0])
    with monkeypatch.context() as context:
        context.setattr(testbed.store, "ack", die)
        with pytest.raises(Killed):
            testbed.learner.run_cycle()
    steps = testbed.learner.snapshot()["num_steps"]
    assert testbed.store.size(KEY).num_pending == 30
    testbed.learner = testbed.build()
    assert not testbed.learner.run_cycle()
    assert testbed.store.size(KEY).num_pending == 0
    assert testbed.learner.snapshot()["num_steps"] == steps


def test_what_was_read_but_not_checkpointed_is_read_again(testbed: LoopTestbed, traffic: Traffic) -> None:
    testbed.serve(traffic[0][:10])
    assert not testbed.learner.run_cycle()  # too few: they wait, unacknowledged
    assert testbed.learner.snapshot()["num_waiting_records"] == 10
    testbed.learner = testbed.build()
    testbed.serve(traffic[0][10:20])
    assert testbed.learner.run_cycle()
    assert testbed.learner.snapshot()["num_records_seen"] == 20


def test_a_feed_that_comes_back_empty_gets_its_adapter_back_and_versions_go_on(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    manifest = testbed.learn_until_promoted(traffic)
    testbed.feed = MemoryAdapterFeed(clock=lambda: NOW_S)
    testbed.learner = testbed.build()
    assert not testbed.learner.run_cycle()
    assert testbed.feed.latest("default") == manifest
    testbed.feed = MemoryAdapterFeed(clock=lambda: NOW_S)
    testbed.learner = testbed.build()
    assert testbed.learner.snapshot()["last_version"] == 1


def test_an_operators_rollback_is_adopted_and_a_pin_is_not_fought(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    testbed.learn_until_promoted(traffic)
    testbed.feed.rollback("default", "the operator said so")
    testbed.learner.run_cycle()
    assert testbed.learner.snapshot()["draft_version"] == 0
    assert testbed.tracker.serving[-1] == (0, 0, "rolled back: the operator said so")
    testbed.feed.pin("default", 0, "hands off")
    for records in traffic[-3:]:
        testbed.serve(records)
        testbed.learner.run_cycle()
    assert testbed.feed.last_version("default") == 1
    assert "pinned" in testbed.feed.history("default")[-1].reason


def test_a_broken_swap_is_rolled_back(testbed: LoopTestbed, traffic: Traffic) -> None:
    testbed.learner = testbed.build(live_records_per_cycle=1000, swap_check_margin=0.02)
    version = testbed.learn_until_promoted(traffic, least_gain=0.12).draft_version
    # replicas claim to serve the new version, and draft as the floor still does
    testbed.serve([served_as(version, record) for records in traffic for record in records])
    testbed.learner.run_cycle()
    event = [e for e in testbed.feed.history("default") if e.kind == "rolled_back"]
    assert event
    assert "broken swap" in event[0].reason
    assert [text for text in testbed.tracker.decisions if text.startswith("rolled_back: broken swap")]
    assert [why for _, _, why in testbed.tracker.serving if why.startswith("rolled back: broken swap")]


def report(testbed: LoopTestbed, *replica_ids: str) -> None:
    for replica_id in replica_ids:
        testbed.feed.report(ServingStatus(replica_id, NOW_S, {}, ()))


def seen_by(testbed: LoopTestbed, replica_id: str) -> int:
    manifest = testbed.feed.latest("default", replica_id)
    return manifest.draft_version if manifest else 0


def test_of_two_replicas_one_serves_first_and_the_other_once_its_records_were_looked_at(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    testbed.learner = testbed.build(swap_check_margin=0.2, swap_false_alarm=1e-12)
    report(testbed, "r1", "r2")
    version = testbed.learn_until_promoted(traffic).draft_version
    assert (seen_by(testbed, "r1"), seen_by(testbed, "r2")) == (version, 0)
    testbed.serve([again(record) for record in traffic[0]])
    testbed.learner.run_cycle()
    assert seen_by(testbed, "r2") == 0, "none of these records was drafted by the canary's draft"
    assert "on trial on one replica: 0 of 16" in testbed.feed.history("default")[-1].reason
    testbed.serve([served_as(version, again(record)) for record in traffic[0]])
    testbed.learner.run_cycle()
    assert seen_by(testbed, "r2") == version
    assert testbed.feed.history("default")[-2].kind == "confirmed"
    assert any(text.startswith("confirmed: ") for text in testbed.tracker.decisions)


def test_a_canary_with_a_draft_that_is_worse_live_is_rolled_back_and_no_other_replica_served_it(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    good = testbed.learn_until_promoted(traffic, least_gain=0.12)
    report(testbed, "r1", "r2")
    worse = export_weights(
        {key: tensor * 0 for key, tensor in import_weights(weights_of(testbed, good)).items()}
    )
    version = good.draft_version + 1
    manifest = replace(
        good,
        draft_version=version,
        parent_version=good.draft_version,
        sha256=hashlib.sha256(worse).hexdigest(),
    )
    testbed.feed.publish(manifest, worse, on_trial=True)
    assert (seen_by(testbed, "r1"), seen_by(testbed, "r2")) == (version, good.draft_version)
    for records in traffic[1:5]:
        testbed.serve([again(record) for record in records])
        testbed.learner.run_cycle()
        assert seen_by(testbed, "r2") == good.draft_version
    assert seen_by(testbed, "r1") == good.draft_version
    event = next(event for event in testbed.feed.history("default") if event.kind == "rolled_back")
    assert "worse on live traffic" in event.reason


def test_a_killed_learner_takes_up_the_trial(testbed: LoopTestbed, traffic: Traffic) -> None:
    testbed.learner = testbed.build(swap_check_margin=0.2, swap_false_alarm=1e-12)
    report(testbed, "r1", "r2")
    version = testbed.learn_until_promoted(traffic).draft_version
    testbed.learner = testbed.build(swap_check_margin=0.2, swap_false_alarm=1e-12)
    testbed.serve([served_as(version, again(record)) for record in traffic[0]])
    testbed.learner.run_cycle()
    assert seen_by(testbed, "r2") == version


def test_without_live_tests_there_is_no_trial(testbed: LoopTestbed, traffic: Traffic) -> None:
    testbed.learner = testbed.build(live_records_per_cycle=0)
    report(testbed, "r1", "r2")
    version = testbed.learn_until_promoted(traffic).draft_version
    assert seen_by(testbed, "r2") == version


def test_a_replicas_rejection_is_told_once_with_its_reason(testbed: LoopTestbed, traffic: Traffic) -> None:
    testbed.learn_until_promoted(traffic)
    rejection = AdapterEvent("rejected_by_replica", "default", 1, "r0: bytes were corrupted", NOW_S + 1)
    testbed.feed.add_event(rejection)
    for records in traffic[-2:]:
        testbed.serve(records)
        testbed.learner.run_cycle()
    told = [text for text in testbed.tracker.decisions if text.startswith("rejected_by_replica")]
    assert told == ["rejected_by_replica: r0: bytes were corrupted"]


def test_a_learner_of_another_target_takes_nothing_from_the_state_folder(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    """It would publish the other's draft as its own, since its feed has forgotten it, as it seems."""
    testbed.learn_until_promoted(traffic)
    before = testbed.learner.snapshot()
    store, feed = MemoryRecordStore(clock=lambda: NOW_S), MemoryAdapterFeed(clock=lambda: NOW_S)
    settings = quick_settings(checkpoint_folder=str(testbed.folder))
    other = Learner(tiny_draft(), store, feed, settings, target_revision="target-2", now_s=lambda: NOW_S)
    assert not other.run_cycle()
    assert (feed.latest("default"), other.snapshot()["num_steps"]) == (None, 0)
    testbed.learner = testbed.build()
    assert testbed.learner.snapshot()["num_steps"] == before["num_steps"]


def test_a_new_learner_tells_of_the_draft_that_it_finds_serving(
    testbed: LoopTestbed, traffic: Traffic, tmp_path: Path
) -> None:
    testbed.learn_until_promoted(traffic)
    told, testbed.tracker = testbed.tracker.decisions[-1], DiaryTracker()
    testbed.folder = tmp_path / "elsewhere"  # its checkpoint is lost
    testbed.learner = testbed.build()
    testbed.learner.run_cycle()
    assert testbed.tracker.serving == [(1, 0, testbed.tracker.decisions[-1])]
    assert testbed.tracker.adapters == {1: testbed.tracker.decisions[-1].removeprefix("promoted: ")}
    assert testbed.tracker.decisions[-1].startswith("promoted: ") and told.startswith("promoted: ")


def test_asleep_it_reads_holds_out_and_acks_but_does_not_train_and_says_what_it_saved(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    rest = {"first_rest_records": 60, "max_rest_records": 60}
    testbed.learner = testbed.build(stall_gain=1.0, stall_decisions=1, slow_stretch=1, **rest)
    for records in traffic[:2]:
        testbed.serve(records)
        assert testbed.learner.run_cycle()
    before = testbed.learner.snapshot()
    assert before["asleep"] and before["learner_s"] > 0
    for records in traffic[2:4]:
        testbed.serve(records)
        assert not testbed.learner.run_cycle()
    after = testbed.learner.snapshot()
    assert after["num_steps"] == before["num_steps"]
    assert after["num_held_out_records"] > before["num_held_out_records"]
    assert (after["num_rested_records"], after["num_records_seen"]) == (60, 120)
    assert after["learner_saved_s"] == pytest.approx(after["learner_s"])
    assert testbed.store.size(KEY).num_pending == 0
    for records in traffic[4:6]:
        testbed.serve(records)  # a probe
    assert testbed.learner.run_cycle()
    assert testbed.learner.snapshot()["num_steps"] > after["num_steps"]


def test_a_killed_learner_takes_up_its_watch_and_one_that_others_publish_is_watched(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    good = testbed.learn_until_promoted(traffic, least_gain=0.12)
    testbed.learner = testbed.build(live_trial_records=1000)
    testbed.serve([again(record) for record in traffic[0]])
    testbed.learner.run_cycle()
    assert (
        f"version {good.draft_version} is on trial: 30 of 1000" in testbed.feed.history("default")[-1].reason
    )
    floor = export_weights(
        {key: tensor * 0 for key, tensor in import_weights(weights_of(testbed, good)).items()}
    )
    unjudged = replace(
        good,
        draft_version=good.draft_version + 1,
        parent_version=good.draft_version,
        sha256=hashlib.sha256(floor).hexdigest(),
    )
    testbed.feed.publish(unjudged, floor)
    for records in traffic[1:5]:
        testbed.serve([again(record) for record in records])
        testbed.learner.run_cycle()
    event = next(event for event in testbed.feed.history("default") if event.kind == "rolled_back")
    assert (event.draft_version, "worse on live traffic" in event.reason) == (good.draft_version, True)


def test_what_no_replica_will_serve_is_taken_back_and_the_tracker_hears_why(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    version = testbed.learn_until_promoted(traffic).draft_version
    refusal = AdapterEvent("rejected_by_replica", "default", version, "replica-1: corrupted", NOW_S)
    testbed.feed.add_event(refusal)
    testbed.feed.report(ServingStatus("replica-2", NOW_S, {"default": version}, ()))
    testbed.learner.run_cycle()
    assert testbed.feed.latest("default") is not None, "another replica serves it"
    assert testbed.tracker.decisions[-1] == "rejected_by_replica: replica-1: corrupted"
    testbed.feed.report(ServingStatus("replica-2", NOW_S + 60, {"default": 0}, ()))
    testbed.learner.run_cycle()
    assert testbed.feed.latest("default") is None
    assert testbed.tracker.decisions[-1].startswith("rolled_back: refused by replicas")
    assert testbed.tracker.decisions.count("rejected_by_replica: replica-1: corrupted") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_rank": 4}, "has shape"),
        ({"lora_alpha": 8.0}, "alpha is 32, not 8"),
        ({"target_modules": ("q_proj",)}, "keys differ"),
    ],
)
def test_new_settings_never_replace_a_draft_that_they_cannot_score(
    testbed: LoopTestbed, traffic: Traffic, changes: dict[str, object], reason: str
) -> None:
    testbed.learn_until_promoted(traffic)
    settings = quick_settings(**({"target_modules": MODULES, "lora_rank": 16, "lora_alpha": 32.0} | changes))
    other = build_draft(tiny_pair()[1], settings, draft_id="tiny-draft", draft_revision="draft-1")
    testbed.learner = testbed.build(other)
    testbed.serve(traffic[-1])
    assert testbed.learner.run_cycle()
    event = testbed.feed.history("default")[-1]
    assert event.kind == "refused"
    assert reason in event.reason and "roll back to the floor" in event.reason
    testbed.feed.rollback("default", "as it was told", 0)
    testbed.serve(traffic[-2])
    testbed.learner.run_cycle()
    assert "cannot be scored" not in testbed.feed.history("default")[-1].reason


def test_a_store_that_keeps_failing_only_slows_it_down(tmp_path: Path, traffic: Traffic) -> None:
    testbed = LoopTestbed(tmp_path, FlakyStore(clock=lambda: NOW_S))
    testbed.serve(traffic[0])
    assert testbed.learner.run_cycle()
    assert testbed.store.size(KEY).num_pending == 0
    assert testbed.learner.snapshot()["num_records_seen"] == 30


def test_a_disk_that_takes_no_checkpoint_is_waited_for_and_no_record_is_lost(
    tmp_path: Path, traffic: Traffic
) -> None:
    testbed = LoopTestbed(tmp_path)
    folder = checkpoint.folder_of_target(tmp_path, "target-1")
    shutil.rmtree(folder, ignore_errors=True)
    folder.touch()  # where nothing can be written into
    testbed.serve(traffic[0])
    stop = threading.Event()
    thread = threading.Thread(target=testbed.learner.run, args=(stop,))
    thread.start()
    try:
        wait_until(lambda: testbed.learner.snapshot()["state"] == "checkpoint cannot be written", 120.0)
        assert "no checkpoint was written" in testbed.learner.snapshot()["last_error"]
        assert testbed.store.size(KEY).num_pending == 30
        folder.unlink()
        wait_until(lambda: testbed.store.size(KEY).num_pending == 0, 120.0)
        assert checkpoint.read_latest(folder) is not None
        assert not list(folder.glob("*.part"))
    finally:
        stop.set()
        thread.join()


def test_poisoned_and_foreign_records_are_counted_and_acked_without_harm(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    foreign = RecordFactory(*tiny_pair(), target_revision="target-2", clock_s=NOW_S).records(5, max_tokens=2)
    testbed.store.append(KEY, foreign)
    testbed.serve(traffic[0][:25])
    assert testbed.learner.run_cycle()
    assert testbed.learner.snapshot()["num_refused_records"] == 5
    assert testbed.store.size(KEY).num_pending == 0


def test_every_route_of_the_target_teaches_the_one_draft(testbed: LoopTestbed, traffic: Traffic) -> None:
    for route, part in (("sql", traffic[0][:15]), ("code", traffic[0][15:])):
        testbed.store.append(StreamKey("target-1", route), part)
    testbed.store.append(StreamKey("other", "sql"), traffic[1])
    assert testbed.learner.run_cycle()
    assert testbed.learner.snapshot()["num_records_seen"] == 30


def test_it_runs_pauses_resumes_and_stops_in_a_thread(testbed: LoopTestbed, traffic: Traffic) -> None:
    stop = threading.Event()
    testbed.learner.pause()
    testbed.serve(traffic[0])
    thread = threading.Thread(target=testbed.learner.run, args=(stop,))
    thread.start()
    try:
        wait_until(lambda: testbed.learner.snapshot()["state"] == "paused")
        assert testbed.learner.snapshot()["num_steps"] == 0
        testbed.learner.resume()
        wait_until(lambda: testbed.learner.snapshot()["num_records_seen"] == 30)
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    assert testbed.learner.snapshot()["state"] == "stopped"


def paused(controls: Controls) -> Controls:
    return controls.with_learning_paused(None)


def resumed(controls: Controls) -> Controls:
    return controls.with_learning_resumed(None)


def test_paused_by_an_operator_it_reads_holds_out_and_acks_but_neither_trains_nor_promotes(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    testbed.feed.change_controls(paused)
    for records in traffic[:3]:
        testbed.serve(records)
        assert not testbed.learner.run_cycle()
    shown = testbed.learner.snapshot()
    assert (shown["num_steps"], shown["num_records_seen"], shown["is_paused"]) == (0, 90, True)
    assert shown["num_held_out_records"] > 0
    size = testbed.store.size(KEY)
    assert (size.num_pending, size.num_records, size.num_dropped_records) == (0, 90, 0), "kept for replay"
    assert testbed.feed.history("default") == []

    testbed.learner = testbed.build()  # a restart
    testbed.serve(traffic[3])
    assert not testbed.learner.run_cycle()
    testbed.feed.change_controls(resumed)
    testbed.serve(traffic[4])
    assert testbed.learner.run_cycle()
    assert testbed.learner.snapshot()["num_steps"] > 0


def test_paused_by_an_operator_it_still_rolls_back_what_is_worse(
    testbed: LoopTestbed, traffic: Traffic
) -> None:
    first = testbed.learn_until_promoted(traffic, least_gain=0.02)
    testbed.feed.change_controls(paused)
    testbed.feed.add_event(
        AdapterEvent("rejected_by_replica", "default", first.draft_version, "r0: bytes", NOW_S)
    )
    testbed.learner.run_cycle()
    assert testbed.feed.latest("default") is None
    assert testbed.feed.history("default")[-1].kind == "rolled_back"


def test_a_pause_of_one_route_leaves_the_others(testbed: LoopTestbed, traffic: Traffic) -> None:
    testbed.feed.change_controls(lambda controls: controls.with_learning_paused("sql"))
    testbed.serve(traffic[0])
    assert testbed.learner.run_cycle()
    testbed.feed.change_controls(lambda controls: controls.with_learning_paused("default"))
    testbed.serve(traffic[1])
    assert not testbed.learner.run_cycle()


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_records_that_an_operator_deletes_while_they_wait_do_not_stop_it(
    tmp_path: Path, traffic: Traffic, kind: str
) -> None:
    """They are pending in its consumer group; it is killed, and its next life finds only the others."""
    with ExitStack() as opened:
        store: RecordStore = MemoryRecordStore(clock=lambda: NOW_S)
        if kind == "redis":
            url = opened.enter_context(EmbeddedRedis()).url
            store = opened.enter_context(closing(RedisRecordStore(url, clock=lambda: NOW_S)))
        testbed = LoopTestbed(tmp_path, store)
        few, rest = traffic[0][:15], traffic[0][15:]
        testbed.serve(few)
        assert not testbed.learner.run_cycle(), "too few"
        assert store.size(KEY).num_pending == 15
        admin = DirectAdministration(testbed.feed, store, "target-1", Caller("operator", "here"))
        num_deleted = sum(admin.purge(request_id=record.record_id).num_records for record in few[:5])
        assert (num_deleted, store.size(KEY).num_pending) == (5, 10)

        earlier, testbed.learner = testbed.learner, testbed.build()
        testbed.serve(rest)
        assert testbed.learner.run_cycle()
        assert testbed.learner.snapshot()["num_records_seen"] == 25
        testbed.serve(traffic[1][:20])
        assert earlier.run_cycle(), "it lets go of what it holds, the deleted ones among them"
        assert earlier.snapshot()["num_records_seen"] == 20
        size = store.size(KEY)
        assert (size.num_records, size.num_pending, size.num_dropped_records) == (45, 0, 0)


class PausedMeanwhile(MemoryAdapterFeed):
    """An operator pauses learning while the candidate is judged: history is read for that alone."""

    is_armed = False

    def history(self, route: str, max_events: int = 200) -> list[AdapterEvent]:
        if self.is_armed and max_events == 200:
            self.change_controls(paused)
        return super().history(route, max_events)


def events_until_promoted(folder: Path, traffic: Traffic, armed_in_cycle: int = -1) -> list[AdapterEvent]:
    """Cycle after cycle, until one promotes or the operator came in it."""
    testbed = LoopTestbed(folder)
    testbed.feed = feed = PausedMeanwhile(clock=lambda: NOW_S)
    testbed.learner = testbed.build()
    for number, records in enumerate(traffic):
        feed.is_armed = number == armed_in_cycle
        testbed.serve(records)
        testbed.learner.run_cycle()
        if feed.latest("default") or feed.is_armed:
            break
    return feed.history("default", 99)


def test_what_passed_the_gate_is_not_published_after_a_pause(tmp_path: Path, traffic: Traffic) -> None:
    without = events_until_promoted(tmp_path / "without", traffic)
    assert without[-1].kind == "promoted"
    with_pause = events_until_promoted(tmp_path / "with", traffic, armed_in_cycle=len(without) - 1)
    assert [event.kind for event in with_pause[:-1]] == [event.kind for event in without[:-1]]
    assert (with_pause[-1].kind, with_pause[-1].reason) == ("refused", "an operator has paused learning")
    assert with_pause[-1].evidence == without[-1].evidence


def test_published_bytes_are_the_candidates_own_weights(testbed: LoopTestbed, traffic: Traffic) -> None:
    testbed.learn_until_promoted(traffic)
    weights = testbed.feed.weights("default", 1)
    state = import_weights(weights)
    assert export_weights(state) == weights
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def again(record: GenerationRecord) -> GenerationRecord:
    return replace(record, record_id=f"again-{record.record_id}")


def weights_of(testbed: LoopTestbed, manifest: AdapterManifest) -> bytes:
    return testbed.feed.weights("default", manifest.draft_version)


def served_as(draft_version: int, record: GenerationRecord) -> GenerationRecord:
    """The same text under another name and version, for the store forgets no record id."""
    rounds = tuple(replace(trace, draft_version=draft_version) for trace in record.rounds)
    return replace(record, record_id=f"again-{record.record_id}", rounds=rounds)


def wait_until(holds: object, timeout_s: float = 20.0) -> None:
    pause = threading.Event()
    for _ in range(int(timeout_s / 0.02)):
        if holds():  # type: ignore[operator]
            return
        pause.wait(0.02)
    raise AssertionError(f"not true within {timeout_s} s")
