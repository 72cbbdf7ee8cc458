"""When a cycle starts, and how the learner slows down and wakes."""

from learner.schedule import Pace, is_due


def test_a_cycle_starts_at_size_or_at_age_and_never_without_records() -> None:
    assert is_due(20, 0.0, 1, min_records=20, max_record_age_s=10.0)
    assert is_due(1, 10.0, 1, min_records=20, max_record_age_s=10.0)
    assert not is_due(19, 9.9, 1, min_records=20, max_record_age_s=10.0)
    assert not is_due(0, 99.0, 1, min_records=20, max_record_age_s=10.0)
    assert not is_due(20, 0.0, 2, min_records=20, max_record_age_s=10.0)


def test_cycles_that_gain_nothing_slow_it_down_and_a_gain_restores_it() -> None:
    pace = Pace()
    for wanted in (2, 4, 8, 8):
        pace = pace.after_evaluation(0.001, stall_gain=0.003, max_slowdown=8)
        assert pace.slowdown == wanted
    assert pace.after_evaluation(float("nan"), 0.003, 8).slowdown == 8
    assert pace.after_evaluation(0.01, 0.003, 8).slowdown == 1


def test_a_fall_of_live_acceptance_wakes_it_once() -> None:
    pace = Pace(slowdown=8)
    for _ in range(100):
        pace = pace.after_records(70, 100, num_records=5).woken(0.05)
    assert pace.slowdown == 8
    for _ in range(5):
        pace = pace.after_records(30, 100, num_records=5).woken(0.05)
    assert pace.slowdown == 1
    assert pace.after_records(0, 0, 0) == pace
