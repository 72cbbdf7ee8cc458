"""Records that may be held for a while only: expiry and purges reach all that the learner holds."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from buffer.administration import DirectAdministration
from buffer.audit import Caller
from buffer.errors import StoreUnavailableError
from buffer.memory_store import MemoryAdapterFeed, MemoryRecordStore
from buffer.records import GenerationRecord, RecordSampling
from buffer.store import StreamKey
from buffer.two_stores import TwoStores
from learner.draw import is_held_out
from learner.loop import Learner
from tests.support.record_factory import RecordFactory
from tests.support.tiny_learner import quick_settings, tiny_draft, tiny_pair

START_S, TTL_S = 2_000.0, 100.0
DURABLE = StreamKey("target-1", "default")
_NUMBERS = count()
IN_MEMORY = replace(DURABLE, in_memory=True)


class Life:
    """A learner on two stores whose clock the test moves; records of mode `memory` live for TTL_S."""

    def __init__(self, folder: Path, traffic: list[GenerationRecord], **settings: object) -> None:
        self.now_s, self._number = START_S, next(_NUMBERS)
        self.folder, self.settings = folder, settings
        self._traffic = iter(traffic)
        self.feed = MemoryAdapterFeed(clock=self.clock)
        self.durable, self.in_memory = self.new_store(), self.new_store()
        self.learner = self.build()

    def clock(self) -> float:
        return self.now_s

    def new_store(self) -> MemoryRecordStore:
        return MemoryRecordStore(clock=self.clock)

    def build(self) -> Learner:
        return Learner(
            tiny_draft(),
            TwoStores(self.durable, self.in_memory),
            self.feed,
            quick_settings(checkpoint_folder=str(self.folder), **self.settings),
            target_revision="target-1",
            now_s=self.clock,
        )

    def serve(self, num_records: int, key: StreamKey = IN_MEMORY) -> list[GenerationRecord]:
        ttl_s = TTL_S if key.in_memory else 1e6
        lives = {"created_at_s": self.now_s, "expires_at_s": self.now_s + ttl_s}
        drawn = [next(self._traffic) for _ in range(num_records)]
        # names of their own, so that what an earlier test held is not taken for this one's
        records = [replace(one, record_id=f"{one.record_id}-{self._number}", **lives) for one in drawn]
        (self.in_memory if key.in_memory else self.durable).append(DURABLE, records)
        return records

    def purge(self, **meant: object) -> None:
        store = TwoStores(self.durable, self.in_memory)
        DirectAdministration(self.feed, store, "target-1", Caller("operator", "here")).purge(**meant)  # type: ignore[arg-type]

    @property
    def num_held_out(self) -> int:
        return int(self.learner.snapshot()["num_held_out_records"])

    @property
    def last_reason(self) -> str:
        return self.feed.history("default")[-1].reason


@pytest.fixture(scope="module")
def traffic() -> list[GenerationRecord]:
    factory = RecordFactory(*tiny_pair(), clock_s=START_S)
    return factory.records(240, RecordSampling(temperature=0.7), max_tokens=6)


@pytest.fixture
def life(tmp_path: Path, traffic: list[GenerationRecord]) -> Life:
    return Life(tmp_path, traffic)


def held_by_anyone(records: list[GenerationRecord]) -> set[str]:
    """Ids of those that some object of this process still is: a record is decoded anew at every reading, so
    the test's own objects do not count."""
    gc.collect()
    own, names = {id(record) for record in records}, {record.record_id for record in records}
    found = [each for each in gc.get_objects() if type(each) is GenerationRecord and id(each) not in own]
    return {each.record_id for each in found if each.record_id in names}


def test_records_of_both_stores_teach_one_draft_and_each_is_acknowledged_at_its_own(life: Life) -> None:
    life.serve(10, DURABLE)
    life.serve(15, IN_MEMORY)
    assert life.learner.run_cycle()
    assert life.learner.snapshot()["num_records_seen"] == 25
    assert (life.durable.size(DURABLE).num_pending, life.in_memory.size(DURABLE).num_pending) == (0, 0)
    after = life.build()
    life.learner = after
    assert not after.run_cycle(), "nothing is read twice"
    assert after.snapshot()["num_held_out_records"] > 0, "windows are refilled from both"


def test_the_learner_promotes_from_memory_alone(life: Life) -> None:
    while life.feed.latest("default") is None:
        life.serve(30)
        assert life.learner.run_cycle()
        life.now_s += 1.0
    assert life.durable.keys() == []


@pytest.mark.parametrize("state", ["waiting", "held out", "paused", "store away"])
def test_no_record_outlives_its_time_in_the_learners_memory(
    tmp_path: Path, traffic: list[GenerationRecord], state: str
) -> None:
    life = Life(tmp_path, traffic)
    records = life.serve(30 if state == "held out" else 10)
    assert life.learner.run_cycle() == (state == "held out")
    held = held_by_anyone(records)
    assert held, "the learner holds some of them"
    life.now_s += TTL_S
    if state == "paused":
        life.learner.pause()
        life.learner._idle()
    elif state == "store away":
        life.learner._wait_to_try_again("store unavailable", StoreUnavailableError("away"))
    else:
        assert not life.learner.run_cycle()
    assert held_by_anyone(records) == set()
    if state != "store away":
        assert life.in_memory.size(DURABLE).num_records == 0, "the store holds none either"


def test_durable_records_stay_as_long_as_they_may(life: Life) -> None:
    life.serve(10, DURABLE)
    assert not life.learner.run_cycle()
    life.now_s += TTL_S
    life.serve(10, DURABLE)
    assert life.learner.run_cycle()
    assert life.learner.snapshot()["num_records_seen"] == 20


def test_after_the_loss_of_the_memory_store_nothing_is_promoted_until_the_window_is_refilled(
    tmp_path: Path, traffic: list[GenerationRecord]
) -> None:
    """Everything went at once, and only the checkpoint is left, whose candidate has already learnt. The
    control is the same life without the loss, which promotes at this point."""
    promoted = {}
    for is_lost in (True, False):
        life = Life(tmp_path / str(is_lost), traffic, gate_min_records=20)
        for _ in range(3):
            life.serve(30)
            assert life.learner.run_cycle()
        assert life.feed.latest("default") is None, "its window is not full yet"
        if is_lost:
            life.in_memory = life.new_store()
            life.learner = life.build()
        life.serve(30)
        assert life.learner.run_cycle()
        promoted[is_lost] = life.feed.latest("default") is not None
        if is_lost:
            assert "20 are needed" in life.last_reason
            assert life.num_held_out < 20
            for _ in range(3):
                life.serve(30)
                assert life.learner.run_cycle()
            assert life.num_held_out >= 20
            assert life.feed.latest("default") is not None, "the refilled window judges again"
    assert promoted == {True: False, False: True}


def test_expired_held_out_records_judge_nothing(tmp_path: Path, traffic: list[GenerationRecord]) -> None:
    life = Life(tmp_path, traffic, gate_min_records=10)
    for _ in range(3):
        life.serve(30)
        assert life.learner.run_cycle()
    assert life.num_held_out >= 10, life.last_reason
    life.now_s += TTL_S
    life.serve(30)
    assert life.learner.run_cycle()
    assert "10 are needed" in life.last_reason


@pytest.mark.parametrize("key", [DURABLE, IN_MEMORY])
def test_a_purge_reaches_what_the_learner_holds(life: Life, key: StreamKey) -> None:
    records = life.serve(30, key)
    assert life.learner.run_cycle()
    waiting = life.serve(5, key)
    assert not life.learner.run_cycle()
    kept_out = next(r for r in records if is_held_out(r.request_id, 0.2))
    assert held_by_anyone([kept_out, waiting[0]]) == {kept_out.record_id, waiting[0].record_id}
    for gone in (kept_out, waiting[0]):
        life.purge(request_id=gone.record_id)
    assert not life.learner.run_cycle()
    assert held_by_anyone([kept_out, waiting[0]]) == set()
    assert held_by_anyone(waiting) == {record.record_id for record in waiting[1:]}, "the others wait on"


def test_a_learner_that_started_after_a_purge_lets_go_of_nothing(life: Life) -> None:
    life.serve(10)
    life.purge(older_than_s=1e6)
    waiting = life.serve(5)
    assert not life.learner.run_cycle()
    assert len(held_by_anyone(waiting)) == 5


def test_a_purge_ends_the_training_that_is_under_way(life: Life) -> None:
    life.learner._follow_orders()
    assert life.learner._rest("default", 0.0)
    life.purge(older_than_s=0.0)
    life.learner._follow_orders()
    assert not life.learner._rest("default", 0.0)


def checkpoints(folder: Path) -> Iterator[bytes]:
    return (path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_checkpoints_hold_no_token_ids(life: Life) -> None:
    """Searched as they would lie there: as raw int32, and as numbers in JSON. The adapter, searched the same
    way, is found."""
    records = life.serve(30)
    assert life.learner.run_cycle()
    contents = list(checkpoints(life.folder))
    assert any(b"adapter." in content for content in contents)
    for record in records:
        for ids in (record.prompt_token_ids, record.output_token_ids):
            assert not any(ids.tobytes() in content for content in contents)
            assert not any(str(ids.tolist())[1:-1].encode() in content for content in contents)
