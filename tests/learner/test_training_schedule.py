"""When a cycle starts, when training slows and sleeps, and what wakes it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from learner.training_schedule import PATIENCE, HeldOutGain, ScheduleRule, TrainingSchedule, is_due

RULE = ScheduleRule()
RECORDS_A_DECISION = 24


def test_a_cycle_starts_at_size_or_at_age_and_never_without_records() -> None:
    assert is_due(20, 0.0, 1, min_records=20, max_record_age_s=10.0)
    assert is_due(1, 10.0, 1, min_records=20, max_record_age_s=10.0)
    assert not is_due(19, 9.9, 1, min_records=20, max_record_age_s=10.0)
    assert not is_due(0, 99.0, 1, min_records=20, max_record_age_s=10.0)
    assert not is_due(20, 0.0, 2, min_records=20, max_record_age_s=10.0)


def decided(
    schedule: TrainingSchedule, gain: float, *, noise: float = 0.004, promoted: bool = False
) -> TrainingSchedule:
    """After one decision whose bound is honest for so much noise."""
    return schedule.after_decision(HeldOutGain(gain, gain - 1.65 * noise), promoted, RULE)


def learning(
    level_after: Callable[[int], float], num_records: int, seed: int, noise: float = 0.004
) -> tuple[int, list[bool]]:
    """A learner whose candidate stands at `level_after(records trained on)`, and whose gate promotes what it
    can show. Returns the records trained on, and whether each decision's worth of records was."""
    rng = np.random.default_rng(seed)
    schedule, trained, candidate, incumbent, reference = TrainingSchedule(), 0, 0.0, 0.0, 0.0
    was_trained = []
    while len(was_trained) * RECORDS_A_DECISION < num_records:
        if schedule.resting:
            schedule = schedule.after_rest(RECORDS_A_DECISION)
            was_trained.append(False)
            continue
        stretch = schedule.slowdown(RULE)
        trained += stretch * RECORDS_A_DECISION
        was_trained += [True] * stretch
        candidate = level_after(trained)
        if schedule.num_decisions == 0:
            reference = incumbent
        gain = candidate - incumbent + noise * rng.standard_normal()
        promoted = gain > 1.65 * noise
        seen = candidate - reference + noise * rng.standard_normal()
        schedule = decided(schedule, seen, noise=noise, promoted=promoted)
        incumbent = candidate if promoted else incumbent
    return trained, was_trained


def test_on_a_stationary_stream_training_stops_and_little_is_lost() -> None:
    def level_after(records: int) -> float:
        return float(0.6 * (1 - np.exp(-records / 100)))

    runs = [learning(level_after, 4000, seed) for seed in range(10)]
    assert np.mean([trained for trained, _ in runs]) <= 2000, "half of the training is saved"
    assert min(level_after(trained) for trained, _ in runs) >= level_after(4000) - 0.005
    assert all(all(was_trained[:15]) for _, was_trained in runs), "it does not stop while it learns"


def test_a_slow_rise_is_never_given_up() -> None:
    """.002 a decision, half of what one decision can tell from noise: naps, but no standstill."""
    shares = [
        np.mean(learning(lambda records: 0.002 * records / RECORDS_A_DECISION, 2400, seed)[1])
        for seed in range(10)
    ]
    assert np.mean(shares) > 0.6
    assert min(shares) > 0.3


def test_a_gain_that_is_there_keeps_it_awake_and_one_that_cannot_be_shown_does_not() -> None:
    schedule = TrainingSchedule()
    for _ in range(50):
        schedule = decided(schedule, 0.02)
        assert not schedule.asleep
    schedule = TrainingSchedule()
    for slow, patience in ((False, PATIENCE), (True, 1)):
        for _ in range(patience * RULE.stall_decisions):
            assert (schedule.slow, schedule.asleep) == (slow, False)
            schedule = decided(schedule, 0.02, noise=0.1)
    assert schedule.asleep


def asleep() -> TrainingSchedule:
    schedule = TrainingSchedule()
    for stretch in (1, RULE.slow_stretch):
        for _ in range(RULE.stall_decisions):
            assert not schedule.asleep and schedule.slowdown(RULE) == stretch
            schedule = decided(schedule, 0.0)
    assert schedule.resting
    return schedule


def test_slow_it_stays_slow_while_it_gains_and_a_shift_ends_that() -> None:
    schedule = replace(TrainingSchedule(), slow=True)
    for _ in range(50):
        schedule = decided(schedule, 0.02, promoted=True)
        assert schedule.slow and not schedule.asleep
    rng = np.random.default_rng(0)
    shifted = schedule.after_records([*rates(rng, 300, 0.6), *rates(rng, 100, 0.3)], RULE)
    assert shifted.num_shifts == 1 and shifted.slowdown(RULE) == 1


def test_probes_grow_rare_and_one_that_gains_enough_ends_the_sleep() -> None:
    schedule, rests = asleep(), []
    for _ in range(6):
        rests.append(schedule.rest_left)
        schedule = schedule.after_rest(schedule.rest_left)
        assert schedule.asleep and not schedule.resting and schedule.slowdown(RULE) == RULE.slow_stretch
        schedule = decided(schedule, 0.0)
    assert rests == [192, 384, 768, 1536, 3072, 3072]
    probe = schedule.after_rest(3072)
    assert decided(probe, 0.009, promoted=True).rest_left == 3072, "too little to wake for"
    assert decided(probe, 0.02, promoted=True) == replace(schedule.resumed(), slow=True)


def test_a_decision_that_scored_nothing_says_nothing_and_sleep_can_be_forbidden() -> None:
    assert TrainingSchedule().after_decision(HeldOutGain(), False, RULE) == TrainingSchedule()
    never = ScheduleRule(max_rest_records=0)
    assert TrainingSchedule(num_decisions=99).after_decision(
        HeldOutGain(0.0, -0.1), False, never
    ) == TrainingSchedule(num_decisions=99)


def rates(rng: np.random.Generator, number: int, mean: float, deviation: float = 0.25) -> list[float]:
    return np.clip(rng.normal(mean, deviation, number), 0, 1).tolist()


@pytest.mark.parametrize("seed", range(10))
def test_a_fall_of_live_acceptance_wakes_it_within_a_hundred_records(seed: int) -> None:
    rng = np.random.default_rng(seed)
    schedule = asleep().after_records(rates(rng, 300, 0.6), RULE)
    assert schedule.resting
    resumed = schedule.after_records(rates(rng, 100, 0.4), RULE)
    assert not resumed.asleep
    assert resumed.num_shifts == 1, "the new level is the usual one now"
    assert not schedule.after_records(rates(rng, 60, 0.15), RULE).asleep


def test_noise_and_a_rise_wake_nothing() -> None:
    """About one false alarm in 10,000 records; more than 3 in 10,000 come by chance in 1 of 50 runs. Seeded,
    so it either holds or not."""
    num_shifts = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        unlike = [rates(rng, 1000, 0.8), rates(rng, 1000, 0.3)]  # two kinds of traffic, mixed
        mixed = [unlike[kind][index] for index, kind in enumerate(rng.integers(0, 2, 1000))]
        num_shifts += TrainingSchedule().after_records(mixed, RULE).num_shifts
        num_shifts += TrainingSchedule().after_records(rates(rng, 1000, 0.5), RULE).num_shifts
    assert num_shifts <= 3
    assert TrainingSchedule().after_records([*[0.4] * 100, *[0.8] * 100], RULE).num_shifts == 0


def test_it_is_restored_from_a_checkpoint_of_any_age() -> None:
    schedule = asleep()
    assert TrainingSchedule.restored({"slowdown": 4, "short_acceptance": 0.5}) == TrainingSchedule(
        short_acceptance=0.5
    )
    assert TrainingSchedule.restored(vars(schedule)) == schedule
