"""When to learn: enough records or old ones; slower once nothing is gained; awake when traffic shifts.

Pure: state in, state out. Knows no store and no clock. Invariant: the oldest record's age alone always
starts a cycle, so a slow trickle is never left unread.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Pace:
    """What the learner knows about its own progress."""

    slowdown: int = 1
    """Times the usual number of records that a cycle waits for."""
    short_acceptance: float | None = None
    long_acceptance: float | None = None
    """Moving averages of live acceptance over about 30 and 300 records."""

    def after_evaluation(self, gain: float, stall_gain: float, max_slowdown: int) -> "Pace":
        """`gain` is the candidate's held-out acceptance less the incumbent's, on the same records (so
        shifting traffic does not look like failure); under `stall_gain` the slowdown doubles."""
        if math.isnan(gain):
            return self
        return replace(self, slowdown=1 if gain >= stall_gain else min(max_slowdown, 2 * self.slowdown))

    def after_records(self, num_accepted: int, num_attempted: int, num_records: int) -> "Pace":
        """Follows live acceptance."""
        if num_attempted == 0:
            return self
        rate = num_accepted / num_attempted
        return replace(
            self,
            short_acceptance=_followed(self.short_acceptance, rate, num_records / 30),
            long_acceptance=_followed(self.long_acceptance, rate, num_records / 300),
        )

    def woken(self, shift_drop: float) -> "Pace":
        """Full speed again if live acceptance fell by `shift_drop`."""
        if self.short_acceptance is None or self.long_acceptance is None:
            return self
        if self.short_acceptance >= self.long_acceptance - shift_drop:
            return self
        return replace(self, slowdown=1, long_acceptance=self.short_acceptance)


def is_due(
    num_waiting: int, oldest_age_s: float, slowdown: int, min_records: int, max_record_age_s: float
) -> bool:
    """Start a cycle now?"""
    if num_waiting == 0:
        return False
    return num_waiting >= min_records * slowdown or oldest_age_s >= max_record_age_s * slowdown


def _followed(average: float | None, value: float, weight: float) -> float:
    weight = min(1.0, weight)
    return value if average is None else (1 - weight) * average + weight * value
