"""Slots stay contiguous whoever joins and leaves, first come is first served, and nobody is lost."""

from hypothesis import given
from hypothesis import strategies as st

from serving.engine import GenerationRequest
from serving.engine.scheduler import Move, Scheduler
from serving.engine.sequence import Sequence


def sequence(name: str, num_cached: int = 0) -> Sequence:
    found = Sequence(GenerationRequest(name, (1, 2, 3)), frozenset(), lambda event: None)
    found.num_cached = num_cached
    return found


def names(sequences: list[Sequence]) -> list[str]:
    return [one.request.request_id for one in sequences]


def running(*lengths: int, num_slots: int = 8) -> Scheduler:
    """Sequences a, b, c, … that run, of so many cached columns."""
    scheduler = Scheduler(num_slots)
    for name, length in zip("abcdefgh", lengths, strict=False):
        scheduler.waiting.append(sequence(name, length))
        scheduler.admit()
        scheduler.finish_prefill()
    return scheduler


def test_one_at_a_time_is_prefilled_in_the_slot_behind_those_that_run() -> None:
    scheduler = running(4, 5)
    scheduler.waiting.extend([sequence("c"), sequence("d")])
    assert scheduler.admit() == 2
    assert scheduler.admit() is None, "another one is in prefill"
    assert scheduler.prefilling is not None and scheduler.prefilling.request.request_id == "c"
    scheduler.finish_prefill()
    assert names(scheduler.running) == ["a", "b", "c"]
    assert scheduler.admit() == 3


def test_nobody_is_admitted_where_no_slot_is_free_or_nobody_waits() -> None:
    scheduler = running(4, 5, num_slots=2)
    scheduler.waiting.append(sequence("c"))
    assert scheduler.admit() is None
    assert (scheduler.prefilling, names(list(scheduler.waiting))) == (None, ["c"])
    scheduler.running[1].finish_reason = "stop"
    scheduler.retire()
    assert scheduler.admit() == 1
    scheduler.finish_prefill()
    assert running(4).admit() is None


def test_there_is_work_while_anyone_runs_waits_or_is_prefilled() -> None:
    scheduler = Scheduler(1)
    assert (scheduler.has_work, scheduler.num_active) == (False, 0)
    scheduler.waiting.append(sequence("a"))
    assert (scheduler.has_work, scheduler.num_active) == (True, 0)
    scheduler.admit()
    assert (scheduler.has_work, scheduler.num_active) == (True, 1)
    scheduler.finish_prefill()
    assert (scheduler.has_work, scheduler.num_active) == (True, 1)
    scheduler.running[0].finish_reason = "length"
    scheduler.retire()
    assert (scheduler.has_work, scheduler.num_active) == (False, 0)


def test_the_last_sequence_closes_the_gap_with_the_columns_it_has() -> None:
    scheduler = running(10, 20, 30, 40)
    scheduler.running[1].finish_reason = "stop"
    left, moves = scheduler.retire()
    assert names(left) == ["b"]
    assert names(scheduler.running) == ["a", "d", "c"]
    assert moves == [Move(source=3, destination=1, length=40)]


def test_where_the_last_leaves_nobody_moves() -> None:
    scheduler = running(10, 20)
    scheduler.running[1].finish_reason = "cancelled"
    left, moves = scheduler.retire()
    assert (names(left), moves, names(scheduler.running)) == (["b"], [], ["a"])


def test_the_one_in_prefill_follows_into_the_slot_behind_the_last() -> None:
    scheduler = running(10, 20, 30)
    scheduler.waiting.append(sequence("p"))
    scheduler.admit()
    assert scheduler.prefilling is not None
    scheduler.prefilling.num_cached = 7
    scheduler.running[0].finish_reason = "stop"
    _, moves = scheduler.retire()
    assert moves == [Move(2, 0, 30), Move(3, 2, 7)]
    scheduler.running[1].finish_reason = "stop"
    _, moves = scheduler.retire()
    assert moves == [Move(2, 1, 7)]


def test_who_finishes_in_prefill_or_while_waiting_leaves_too_and_the_others_keep_their_turn() -> None:
    scheduler = running(10)
    scheduler.waiting.extend(map(sequence, "pwxy"))
    scheduler.admit()
    assert scheduler.prefilling is not None
    scheduler.prefilling.finish_reason = scheduler.waiting[1].finish_reason = "cancelled"
    left, moves = scheduler.retire()
    assert (names(left), moves) == (["p", "x"], [])
    assert (scheduler.prefilling, names(list(scheduler.waiting))) == (None, ["w", "y"])


@given(st.data())
def test_following_the_moves_every_sequence_finds_its_columns_in_its_slot(data: st.DataObject) -> None:
    """`slots` is a cache that holds names; whoever moves by the moves alone must land on the own one."""
    scheduler, slots, come, gone = Scheduler(3), [""] * 3, list[str](), list[str]()
    for number in range(data.draw(st.integers(1, 30))):
        act = data.draw(st.sampled_from(["join", "admit", "finish prefill", "end"]))
        if act == "join":
            scheduler.waiting.append(sequence(str(number), num_cached=number))
            come.append(str(number))
        elif act == "admit":
            slot = scheduler.admit()
            if slot is not None and scheduler.prefilling is not None:
                slots[slot] = scheduler.prefilling.request.request_id
        elif act == "finish prefill" and scheduler.prefilling is not None:
            scheduler.finish_prefill()
        elif act == "end":
            started = [*scheduler.running, *([scheduler.prefilling] if scheduler.prefilling else [])]
            everyone = [*started, *scheduler.waiting]
            for index in data.draw(st.sets(st.integers(0, max(0, len(everyone) - 1)), max_size=3)):
                if everyone:
                    everyone[index].finish_reason = "stop"
            left, moves = scheduler.retire()
            gone += names(left)
            for move in moves:
                slots[move.destination] = slots[move.source]
        held = [*scheduler.running, *([scheduler.prefilling] if scheduler.prefilling else [])]
        assert slots[: len(held)] == names(held)
        here = [*names(held), *names(list(scheduler.waiting))]
        assert sorted(here + gone, key=int) == come, "one was lost, or left twice"
        assert sorted(names(list(scheduler.waiting)), key=int) == names(list(scheduler.waiting))
