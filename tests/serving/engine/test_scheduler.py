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


# -- several tenants ----------------------------------------------------------------------------------


def of(tenant: str | None, name: str, num_tokens: int = 3) -> Sequence:
    request = GenerationRequest(name, (1,) * num_tokens, tenant=tenant)
    return Sequence(request, frozenset(), lambda event: None)


def serve_next(scheduler: Scheduler, num_output: int = 7) -> str:
    """The tenant that gets the only slot, which its request then leaves with so many tokens."""
    assert scheduler.admit() == 0 and scheduler.prefilling is not None
    scheduler.finish_prefill()
    [served] = scheduler.running
    served.token_ids += [1] * num_output
    served.finish_reason = "length"
    scheduler.retire()
    return served.request.tenant or "nobody's"


def test_a_tenant_that_floods_waits_for_its_own_and_others_take_turns() -> None:
    scheduler = Scheduler(1)
    for number in range(50):
        scheduler.add(of("flood", str(number)))
    for number in range(3):
        scheduler.add(of("a", f"a{number}"))
        scheduler.add(of("b", f"b{number}"))
    turns = [serve_next(scheduler) for _ in range(9)]
    assert turns == ["flood", "a", "b"] * 3
    assert {serve_next(scheduler) for _ in range(47)} == {"flood"}
    assert not scheduler.has_work


def test_turns_are_of_tokens_not_of_requests() -> None:
    scheduler = Scheduler(1)
    for number in range(40):
        scheduler.add(of("long", f"l{number}", num_tokens=90))
        scheduler.add(of("short", f"s{number}", num_tokens=10))
    turns = [serve_next(scheduler, num_output=0) for _ in range(20)]
    assert turns.count("long") == 2 and turns.count("short") == 18


def test_a_pause_saves_up_nothing() -> None:
    scheduler = Scheduler(1)
    for number in range(100):
        scheduler.add(of("busy", str(number)))
    for _ in range(50):
        serve_next(scheduler)
    for number in range(20):
        scheduler.add(of("back", f"b{number}"))
    turns = [serve_next(scheduler) for _ in range(20)]
    assert turns.count("back") == 10


def test_what_runs_counts_before_it_ends() -> None:
    scheduler = Scheduler(2)
    scheduler.add(of("a", "a0"))
    scheduler.add(of("b", "b0", num_tokens=4))
    for _ in range(2):
        scheduler.admit()
        scheduler.finish_prefill()
    scheduler.running[0].token_ids += [1] * 100
    scheduler.add(of("a", "a1"))
    scheduler.add(of("b", "b1"))
    scheduler.running[1].finish_reason = "stop"
    scheduler.retire()
    scheduler.admit()
    assert scheduler.prefilling is not None and scheduler.prefilling.request.request_id == "b1"


@given(st.lists(st.integers(1, 9), max_size=30), st.sampled_from([None, "only"]))
def test_one_tenant_is_served_in_the_order_of_arrival(lengths: list[int], tenant: str | None) -> None:
    """Whatever was served before; the rule of services without tenants."""
    scheduler, order = Scheduler(1), list[str]()
    for number, length in enumerate(lengths):
        scheduler.add(of(tenant, str(number), length))
        if number % 3 == 2:
            order.append(scheduler.waiting[0].request.request_id)
            serve_next(scheduler, num_output=length)
    while scheduler.has_work:
        order.append(scheduler.waiting[0].request.request_id)
        serve_next(scheduler)
    assert order == [str(number) for number in range(len(lengths))]
