"""The demo's part of the target learns from records of the demo's own pair, is measured, and is told of."""

import io
import time
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console

from buffer.memory_store import MemoryRecordStore
from buffer.names import DEFAULT_ROUTE
from buffer.records import GenerationRecord
from buffer.store import StreamKey
from deploy.commands.demo import PAIR
from deploy.demo.corpus import DOMAINS, prompts
from deploy.demo.figures import save_plot, series
from deploy.demo.plan import Timekeeper
from deploy.demo.self_draft import SelfDraft, SelfDraftArm, _arriving, records_in
from deploy.demo.session import DemoResult
from deploy.demo.summary import self_sentences
from learner.judging.live import drafted_by
from learner.settings import LearnerSettings
from serving.models.loading import load_pair
from serving.options import EngineOptions
from tests.support.record_factory import GREEDY, RecordFactory

TARGET = str(PAIR / "target")


@pytest.fixture(scope="module")
def records() -> list[GenerationRecord]:
    pair = load_pair(TARGET, str(PAIR / "draft"))
    assert pair.draft is not None
    factory = RecordFactory(pair.target, pair.draft, target_revision=pair.target_revision)
    made = factory.records(20, GREEDY, max_tokens=8, prompts=[[n, n + 1, 7] for n in range(20)])
    now_s = time.time()
    return [
        replace(record, created_at_s=now_s + number, expires_at_s=now_s + 3600.0)
        for number, record in enumerate(made)
    ]


@pytest.fixture(scope="module")
def arm(records: list[GenerationRecord]) -> SelfDraft:
    learner = LearnerSettings(min_records_per_cycle=8, max_steps_per_cycle=2, target_modules=("q_proj",))
    ticks = count()
    clock = Timekeeper(lambda: float(next(ticks)))  # a second for every look at it
    options = EngineOptions(num_slots=1, max_seq_len=512, num_draft_tokens=2, speculation="model")
    with closing(SelfDraftArm(TARGET, "self", records, learner, options)) as arm:
        assert not arm.is_compiling
        arm.learn(16, clock.begin(10_000.0))
        arm.measure({domain: prompts(domain, "heldout") for domain in DOMAINS[:2]}, 8, clock.begin(40.0))
        return arm.result


def test_it_learns_in_the_traffics_order_and_says_the_targets_words(arm: SelfDraft) -> None:
    numbers = [number for number, _ in arm.acceptance]
    assert numbers == sorted(numbers) and numbers[0] == 0 and len(numbers) == 16
    assert arm.num_kept == 20
    assert arm.num_compared == arm.num_identical > 0
    assert set(arm.rates) == set(arm.ratios) == set(DOMAINS[:2])
    assert arm.speed_up is not None and arm.speed_up > 0.0
    assert arm.costs is not None and arm.costs.learner_s > 0.0 and arm.costs.weights_bytes > 0


def test_what_it_costs_is_told_beside_the_draft_model(arm: SelfDraft, tmp_path: Path) -> None:
    result = DemoResult(self_draft=arm, draft_costs=arm.costs)
    console = Console(file=io.StringIO())
    sentences = self_sentences(result)
    for sentence in sentences:
        console.print(sentence)
    assert sentences[0].startswith("self, a part of the target, from nothing: 16 of the traffic's 20 records")
    assert "learner seconds" in sentences[-2] and sentences[-2].startswith("  self costs")
    assert sentences[-3].startswith("  the draft model costs")
    assert series(result)["self_draft"] == [[n, round(rate, 4)] for n, rate in arm.acceptance]
    save_plot(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_a_promotion_is_watched_on_the_records_that_come_after_it(records: list[GenerationRecord]) -> None:
    """They were drafted by another draft, whose versions have the same numbers, and long ago."""
    old = replace(
        records[0],
        created_at_s=0.0,
        expires_at_s=100.0,
        rounds=tuple(replace(trace, draft_version=1) for trace in records[0].rounds),
    )
    before_s = time.time()
    arriving = _arriving(old)
    assert drafted_by(old, 1) and not drafted_by(arriving, 1)
    assert arriving.created_at_s >= before_s
    assert arriving.expires_at_s - arriving.created_at_s == pytest.approx(100.0)


def test_time_that_is_used_up_ends_it_with_what_there_is(records: list[GenerationRecord]) -> None:
    ticks = count()
    used_up = Timekeeper(lambda: float(next(ticks))).begin(0.0)
    with closing(SelfDraftArm(TARGET, "self", records, LearnerSettings(), EngineOptions(num_slots=1))) as arm:
        arm.learn(800, used_up)
        arm.measure({}, 8, used_up)
    assert arm.result.acceptance == [] and arm.result.speed_up is None and arm.result.num_promotions == 0
    told = self_sentences(DemoResult(self_draft=arm.result))
    assert "self against no speculation was not measured" in told


def test_only_the_targets_own_records_are_taken_in_their_order(records: list[GenerationRecord]) -> None:
    store, revision = MemoryRecordStore(), records[0].target_revision
    store.append(StreamKey(revision, DEFAULT_ROUTE), records[:3])
    store.append(StreamKey(revision, "sql"), records[3:5])
    store.append(StreamKey("another", DEFAULT_ROUTE), records[5:])
    found = records_in(store, revision)
    assert {record.record_id for record in found} == {record.record_id for record in records[:5]}
    assert [record.created_at_s for record in found] == sorted(record.created_at_s for record in found)
