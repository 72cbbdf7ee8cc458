"""Held-out split and draws."""

import numpy as np
import pytest

from buffer.memory_store import MemoryRecordStore
from buffer.records import GenerationRecord
from buffer.store import StreamKey
from learner.draw import fresh_draws, is_held_out, num_steps, replay_draw
from tests.support.record_factory import RecordFactory
from tests.support.tiny_learner import tiny_pair


@pytest.fixture(scope="module")
def records() -> list[GenerationRecord]:
    return RecordFactory(*tiny_pair()).records(40, max_tokens=2)


def test_the_split_is_the_same_in_every_process_and_near_its_share() -> None:
    """A binomial count over 20,000 ids, 5 sigma: fails by chance once in a million choices of the hash."""
    assert [is_held_out(f"req-{index}", 0.2) for index in range(6)] == [
        False,
        False,
        False,
        False,
        True,
        False,
    ]
    held_out = sum(is_held_out(f"request {index}", 0.2) for index in range(20_000))
    assert abs(held_out - 4_000) < 5 * (20_000 * 0.2 * 0.8) ** 0.5


def test_every_fresh_record_is_drawn_once_before_any_is_drawn_twice(records: list[GenerationRecord]) -> None:
    draws = list(fresh_draws(records[:10], 4, 5, np.random.default_rng(0)))
    assert [len(draw) for draw in draws] == [4] * 5
    ids = [record.record_id for draw in draws for record in draw]
    assert len(set(ids[:10])) == 10
    assert len(set(ids[10:])) == 10
    assert [len(draw) for draw in fresh_draws(records[:2], 4, 2, np.random.default_rng(0))] == [2, 2]


def test_steps_follow_the_passes_wanted() -> None:
    assert num_steps(0, 12, 2.0, 16) == 0
    assert num_steps(3, 12, 2.0, 16) == 1
    assert num_steps(60, 12, 2.0, 16) == 10
    assert num_steps(6000, 12, 2.0, 16) == 16


def test_replay_takes_an_equal_share_of_every_route_and_nothing_held_out(
    records: list[GenerationRecord],
) -> None:
    store = MemoryRecordStore(clock=lambda: 1_000.0)
    busy, quiet = StreamKey("target-1", "busy"), StreamKey("target-1", "quiet")
    store.append(busy, records[:30])
    store.append(quiet, records[30:])
    quiet_ids = {record.record_id for record in records[30:]}
    drawn = replay_draw(store, [busy, quiet], 8, 0.2, np.random.default_rng(0))
    assert sum(record.record_id in quiet_ids for record in drawn) == 4
    assert len(drawn) == 8
    assert not any(is_held_out(record.request_id, 0.2) for record in drawn)
    assert replay_draw(store, [], 8, 0.2, np.random.default_rng(0)) == []
