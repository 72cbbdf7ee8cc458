"""Bounds on what waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.admission import Admission, QueueFullError, Ticket


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def admission(
    *, num_slots: int = 2, requests: int = 2, tokens: int = 100, clock: Clock | None = None
) -> Admission:
    return Admission(
        num_slots=num_slots,
        max_queued_requests=requests,
        max_queued_prompt_tokens=tokens,
        clock=clock or Clock(),
    )


def test_slots_and_queue_are_filled_and_then_requests_are_refused() -> None:
    bound = admission()
    tickets = [bound.admit(1, 10) for _ in range(4)]
    with pytest.raises(QueueFullError, match="max_queued_requests=2"):
        bound.admit(1, 10)
    tickets[0].release()
    bound.admit(1, 10)
    assert bound.num_rejected == 1


def test_n_counts_n() -> None:
    bound = admission()
    bound.admit(3, 3)
    with pytest.raises(QueueFullError):
        bound.admit(2, 2)
    bound.admit(1, 1)


def test_prompt_tokens_that_wait_are_bounded_and_started_ones_do_not_wait() -> None:
    bound = admission(num_slots=8, tokens=100)
    first = bound.admit(1, 90)
    with pytest.raises(QueueFullError, match="max_queued_prompt_tokens=100"):
        bound.admit(1, 20)
    first.start()
    bound.admit(1, 20)


def test_a_prompt_longer_than_all_that_may_wait_is_admitted_while_no_other_waits() -> None:
    bound = admission(tokens=10)
    bound.admit(1, 1000).release()
    assert bound.num_in_flight == 0


def test_more_generations_than_there_are_places_are_refused_even_when_alone() -> None:
    with pytest.raises(QueueFullError, match="max_queued_requests=2"):
        admission().admit(5, 5)


def test_the_last_quarter_of_each_bound_is_for_requests_of_one_generation() -> None:
    bound = admission(num_slots=1, requests=8, tokens=80)
    bound.admit(4, 40)
    with pytest.raises(QueueFullError):
        bound.admit(4, 4)
    with pytest.raises(QueueFullError):
        bound.admit(2, 21)
    bound.admit(3, 20)
    bound.admit(1, 10)
    bound.admit(1, 10)
    with pytest.raises(QueueFullError):
        bound.admit(1, 0)


def test_retry_after_follows_the_rate_of_ends() -> None:
    clock = Clock()
    bound = admission(requests=0, clock=clock)
    for _ in range(4):
        ticket = bound.admit(1, 1)
        clock.now_s += 5.0
        ticket.release()
    bound.admit(2, 1)
    with pytest.raises(QueueFullError) as refused:
        bound.admit(2, 1)
    assert 5 <= refused.value.retry_after_s <= 10


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 60), st.integers(0, 2)), max_size=40))
def test_whatever_comes_and_goes_nothing_is_counted_twice(steps: list[tuple[int, int, int]]) -> None:
    bound = admission()
    held: list[Ticket] = []
    for num_requests, num_tokens, act in steps:
        if act == 0 and held:
            held[-1].start()
        elif act == 1 and held:
            ticket = held.pop(0)
            ticket.release()
            ticket.release()
        else:
            try:
                held.append(bound.admit(num_requests, num_tokens))
            except QueueFullError as refused:
                assert 1 <= refused.retry_after_s <= 30
    for ticket in held:
        ticket.release()
    assert bound.num_in_flight == 0
    bound.admit(4, 1000)


# -- several owners -----------------------------------------------------------------------------------


def shared(*, num_slots: int = 1, requests: int = 8, tokens: int = 100) -> Admission:
    return Admission(
        num_slots=num_slots,
        max_queued_requests=requests,
        max_queued_prompt_tokens=tokens,
        clock=Clock(),
        has_owners=True,
    )


def fill(bound: Admission, owner: str | None, num_tokens: int = 0) -> int:
    """How many requests of this owner are admitted until one is refused."""
    for number in range(1000):
        try:
            bound.admit(1, num_tokens, owner)
        except QueueFullError:
            return number
    raise AssertionError("there is no bound")


def test_no_owner_can_fill_the_queue() -> None:
    bound = shared()
    assert fill(bound, "flood") == 5, "the slot and half of the queue"
    assert fill(bound, "second") >= 1
    assert fill(bound, "third") >= 1
    assert fill(bound, None) >= 1, "keys of no tenant are an owner, too"


def test_no_owner_can_fill_the_prompt_tokens_that_may_wait() -> None:
    bound = shared(num_slots=100, tokens=100)
    assert fill(bound, "flood", num_tokens=10) == 5
    assert fill(bound, "second", num_tokens=10) >= 1
    bound.admit(1, 5, "third")


def test_without_owners_one_may_fill_it() -> None:
    """The control: as services without tenants do."""
    bound = admission(num_slots=1, requests=8)
    for _ in range(9):
        bound.admit(1, 0, "flood")
    with pytest.raises(QueueFullError, match="max_queued_requests=8 reached"):
        bound.admit(1, 0, "second")


def test_an_owner_has_no_more_at_once_than_it_may() -> None:
    bound = shared(requests=100)
    ticket = bound.admit(2, 0, "a", max_concurrent=3)
    with pytest.raises(QueueFullError, match="max_concurrent=3"):
        bound.admit(2, 0, "a", max_concurrent=3)
    bound.admit(2, 0, "b", max_concurrent=3)
    ticket.release()
    bound.admit(3, 0, "a", max_concurrent=3)


def test_a_look_takes_no_place_and_says_what_admission_would() -> None:
    bound = admission(num_slots=1, requests=1)
    for _ in range(3):
        bound.check()
    bound.admit(1, 1)
    bound.check()
    bound.admit(1, 1)
    with pytest.raises(QueueFullError):
        bound.check()
    assert bound.num_in_flight == 2
