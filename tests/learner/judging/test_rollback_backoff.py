"""After a rollback, what misled the gate judges no more."""

from dataclasses import replace

from buffer.records import AdapterEvent
from learner.judging.held_out import HeldOutWindow
from learner.judging.rollback_backoff import RollbackBackoff, rollback_backoff
from tests.support.record_factory import RecordFactory
from tests.support.tiny_learner import tiny_pair


def history(kinds: str) -> list[AdapterEvent]:
    """p promoted, r rolled back, x refused, c closed, o opened; one a second."""
    names = {"p": "promoted", "r": "rolled_back", "x": "refused", "c": "closed", "o": "opened"}
    return [AdapterEvent(names[kind], "default", 1, "", float(at)) for at, kind in enumerate(kinds)]


def test_a_rollback_distrusts_everything_before_the_promotion_that_failed() -> None:
    assert rollback_backoff(history("")) == rollback_backoff(history("xpxpx")) == RollbackBackoff()
    assert rollback_backoff(history("pxpxxrx")) == RollbackBackoff(trusted_since_s=2.0, num_failures=1)
    assert rollback_backoff(history("rr")) == RollbackBackoff(), "nothing was promoted that could have failed"


def test_failures_in_a_row_ask_for_more_and_more_until_a_promotion_stands() -> None:
    found = [
        rollback_backoff(history(kinds)).min_records(16, 100)
        for kinds in ("", "pr", "prpr", "prprpr", "prprprpr")
    ]
    assert found == [16, 16, 32, 64, 100]
    stood = rollback_backoff(history("prprpp"))
    assert (stood.num_failures, stood.trusted_since_s) == (0, 2.0)
    assert RollbackBackoff(num_failures=1).min_records(16, 8) == 16


def test_a_route_that_was_closed_and_opened_again_starts_anew() -> None:
    assert rollback_backoff(history("oprco")) == RollbackBackoff()
    assert rollback_backoff(history("oprcopr")) == RollbackBackoff(trusted_since_s=5.0, num_failures=1)


def test_older_records_leave_the_window() -> None:
    records = RecordFactory(*tiny_pair()).records(3, max_tokens=2)
    window = HeldOutWindow(10)
    window.add(replace(record, created_at_s=float(at)) for at, record in enumerate(records))
    window.forget_before(1.0)
    assert len(window) == 2
    window.shrink(1)
    assert len(window) == 1
